"""A pytest plugin that reserves the ports which Jupyter chooses for kernels, as our servers do."""

from labkeeper.forkserver.patches import hold_ports

hold_ports()
