"""A pytest plugin by which the kernels of other projects' tests are launched as by our servers.

Their tests start kernels by jupyter_client. Here it has our provisioner, with a zygote of a real
kernel loader. `SUITE_KERNELS` is a directory: the loader works in it, and `launches` there gets a
line of JSON for each kernel: how it was launched, why it was executed, and in which test.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from traitlets.config import Config

from labkeeper.forkserver import provisioner, wire
from labkeeper.forkserver.commands import loading
from labkeeper.forkserver.wire import Launch
from labkeeper.forkserver.zygote_client import Zygote
from labkeeper.forkserver.zygote_pool import ZygotePool

PLACE = Path(os.environ["SUITE_KERNELS"])
LOADED_SECONDS = 60
LOADER = pytest.StashKey[tuple[subprocess.Popen[bytes], socket.socket]]()


class RecordingProvisioner(provisioner.KernelProvisioner):
    """Ours, which also records launches."""

    async def launch_kernel(self, cmd, **given):
        # Both streams of a kernel that a server launches go where the server's own go.
        if given.get("stderr") == subprocess.STDOUT:
            del given["stderr"]
        info = await super().launch_kernel(cmd, **given)
        launch = {
            "launched_by": self.launched_by,
            "exec_reason": self.exec_reason,
            "test": os.environ.get("PYTEST_CURRENT_TEST"),
        }
        with (PLACE / "launches").open("a") as launches:
            launches.write(f"{json.dumps(launch)}\n")
        return info


def pytest_collection_finish(session):
    """Load ipykernel once modules of the tests have set variables, and set the provisioner up."""
    loader, connection = _loader()
    session.config.stash[LOADER] = loader, connection
    zygote, its = socket.socketpair()
    with its:
        wire.send(connection, {}, [its.fileno()])
    launch = _launch()
    pool = ZygotePool(Zygote(zygote, launch), launch)
    pool.prepare()
    assert select.select([zygote], [], [], LOADED_SECONDS)[0], "ipykernel is not loaded"
    app = SimpleNamespace(config=Config())
    provisioner.provide(app, pool)
    KernelProvisionerFactory.provisioners[provisioner.NAME] = EntryPoint(
        provisioner.NAME,
        f"{__name__}:{RecordingProvisioner.__name__}",
        KernelProvisionerFactory.GROUP_NAME,
    )
    # Kernel managers without an application use this one.
    KernelProvisionerFactory.instance(config=app.config)


def pytest_unconfigure(config):
    """End the loader; kernels of the tests end after this, and the zygote after them."""
    if (started := config.stash.get(LOADER, None)) is not None:
        loader, connection = started
        connection.close()
        loader.wait()


def _loader():
    """Start a kernel loader, like a fork server, with the environment that the tests will have."""
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen(
            loading(sys.executable, (), "kernels", its.fileno(), ()),
            cwd=PLACE,
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )
    return process, ours


def _launch():
    """Return the launch of a server that is this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return Launch(
        server_dir=str(PLACE),
        title="jupyter-lab (of other tests)",
        cwd=str(Path.cwd()),
        env={},
        kernel_env={},
        umask=umask,
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
