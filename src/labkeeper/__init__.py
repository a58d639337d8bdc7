"""JupyterLab servers on demand, by HTTP API."""
