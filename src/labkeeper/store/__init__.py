"""Snapshots, orphaned kernels, events and API tokens in SQLite, in the state directory."""
