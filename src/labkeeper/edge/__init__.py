"""The edge: a process of its own that owns the public address.

It forwards requests to the keeper and to the Labs, and outlives the keeper. It decides nothing: the
keeper pushes its routes. It imports none of labkeeper but this package and
`labkeeper.forkserver.peers`, so that it stays small.
"""
