"""Kernel gateways: asked before a start, watched while a server runs, and freed of kernels that nobody is to have any more."""
