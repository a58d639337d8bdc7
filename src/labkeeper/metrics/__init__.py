"""Prometheus metrics: the list of families, and the collector that fills them."""
