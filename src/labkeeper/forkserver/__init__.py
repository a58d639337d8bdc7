"""Code that runs in the servers' own interpreter, whose environment may differ from the keeper's.

It imports only its siblings, the standard library and, in a server, Jupyter. It runs under every
Python that JupyterLab 4 supports (3.9 and later).
"""
