"""Configuration of every JupyterLab server in the image.

What labkeeper sets for a launch overrides this. Put your own configuration beside it, in
`jupyter_server_config.json` or `jupyter_server_config.d/*.json`.
"""

c = get_config()  # noqa: F821 - Jupyter provides it

# A trash would be a hidden directory in the mounted notebooks.
c.FileContentsManager.delete_to_trash = False
# The shell of terminals; users who are not in /etc/passwd have no other.
c.ServerApp.terminado_settings = {"shell_command": ["/bin/bash"]}
