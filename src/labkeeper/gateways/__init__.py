"""Kernel gateways: preflight checks, monitoring, and cleanup of orphaned kernels."""
