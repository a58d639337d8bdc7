"""What runs in the servers' own interpreter, which may be in another environment than the keeper's.

Nothing here imports anything of labkeeper but its siblings, or anything else but the standard library and, in a server, Jupyter.
It runs under every Python that JupyterLab 4 runs under (3.9 and later).
"""
