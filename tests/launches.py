"""Launches of servers, for what is tested without a keeper."""

from __future__ import annotations

from labkeeper.forkserver.wire import Launch


def launch_in(directory):
    """Return the launch of a server in a directory: this user's, without limits."""
    return Launch(
        server_dir=str(directory),
        title="jupyter-lab (a test)",
        cwd=str(directory),
        env={},
        kernel_env={},
        umask=0o077,
        config={},
        user=None,
        cgroups=[],
        rlimits={},
        encrypt_kernels=False,
        zygote_cgroups=[],
        kernels_by="fork",
        preload=[],
        identity_key="",
    )
