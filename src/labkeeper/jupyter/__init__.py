"""What we know of Jupyter. Knows nothing of keepers, states or processes."""
