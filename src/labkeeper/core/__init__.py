"""Decide what happens to servers; perform none of it.

Pure: standard library only; no I/O, clock or thread of its own. What this package needs from the
world it declares as a protocol in `ports`; time arrives through `ports.Clock`. All of it can be
tested by calling it.
"""
