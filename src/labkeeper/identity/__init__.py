"""Authentication: the identity of callers, and their permissions."""
