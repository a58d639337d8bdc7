"""Decides what happens to servers, and does none of it.

Pure: standard library only, no input or output, no clock of its own, no thread. Whatever this package needs of the world
it declares as a protocol in `ports`; time arrives through `ports.Clock`. Everything here can be tested by calling it.
"""
