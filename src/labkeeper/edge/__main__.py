"""Runs `python -m labkeeper.edge`, which a keeper starts."""

from labkeeper.edge.main import main

main()
