"""Knowledge about Jupyter. Knows nothing of keepers, states or processes."""
