"""The HTTP interface: validate requests, ask the keeper, return its answers. Decides nothing."""
