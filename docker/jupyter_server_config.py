"""Configuration of every JupyterLab server in the image; labkeeper's own for a launch stands above it.

Yours goes beside it, with a name of Jupyter's choosing: `jupyter_server_config.json`, or `jupyter_server_config.d/*.json`.
"""

c = get_config()  # noqa: F821 - Jupyter provides it

# Deleted means deleted: a trash would be a hidden directory in the mounted notebooks.
c.FileContentsManager.delete_to_trash = False
# The shell of terminals, also for users that the image does not know.
c.ServerApp.terminado_settings = {"shell_command": ["/bin/bash"]}
