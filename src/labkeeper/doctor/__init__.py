"""Finds out what is wrong with a keeper and its machine, and what mends it.

The checks call the code that the keeper itself uses, so that they cannot disagree with it. They
leave nothing behind.
"""
