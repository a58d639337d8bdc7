"""For the tests of labkeeper, and of whoever builds on it or adds a backend.

`fakes` implements the core's ports in memory and needs nothing; `contract` holds a backend to its laws and needs pytest.
"""
