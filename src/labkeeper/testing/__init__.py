"""Test support for labkeeper, for dependent projects, and for new backends.

`fakes` and `world` implement the core's ports in memory and need nothing; `contract` checks the
laws of a backend and needs pytest.
"""
