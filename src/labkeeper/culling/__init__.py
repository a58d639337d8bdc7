"""Stops what nobody uses: asks, warns, looks once more, stops. What is decided where is in `core.culling`."""
