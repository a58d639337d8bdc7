"""Configuration of every JupyterLab server in the image.

What labkeeper sets for a launch overrides it. Put your own configuration beside it, in
`jupyter_server_config.json` or `jupyter_server_config.d/*.json`.
"""

c = get_config()  # noqa: F821 - Jupyter provides it

# Deleted means deleted: a trash would be a hidden directory in the mounted notebooks.
c.FileContentsManager.delete_to_trash = False
# The shell of terminals, also for users that the image does not know.
c.ServerApp.terminado_settings = {"shell_command": ["/bin/bash"]}
