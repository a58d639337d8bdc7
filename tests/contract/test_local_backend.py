"""The local backend passes the contract for backends, with real JupyterLab servers."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from harness import alive, children, free_port, no_descriptors, plain_python, until
from labkeeper.backends.local.backend import LocalBackend
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.paths import Paths
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.jupyter.client import JupyterClient
from labkeeper.testing.contract import BackendContract


class LocalRig:
    patience = 60.0

    def __init__(self, base: Path, launch_by):
        self._base = base
        self._launch_by = launch_by
        (base / "notebooks").mkdir()

    def backend(self, report):
        return LocalBackend(
            report,
            LocalOptions(
                python=plain_python(self._base / "bin"),
                runtime_dir=self._base / "run",
                log_dir=self._base / "logs",
                launch_by=self._launch_by,
            ),
            paths=Paths(self._base / "notebooks"),
            client=JupyterClient(),
        )

    def abandon(self, backend):
        backend.close()

    def spec(self):
        return ServerSpec(
            ServerName("contract"),
            str(self._base / "notebooks"),
            base_url="/some/where/",
            port=free_port(),
        )

    def refused(self):
        return ServerSpec(ServerName("refused"), "/no/such/directory")

    def strike(self, instance):
        os.kill(instance.pid, signal.SIGKILL)
        until(lambda: not alive(instance.pid))

    def exists(self, instance):
        return alive(instance.pid)


@pytest.fixture
def _reaped():
    """This process reaps a test's servers, which init would do for a keeper that crashed."""
    before = children()
    yield
    until(lambda: not any(_lives(pid) for pid in children() - before), what="children to be reaped")


def _lives(pid):
    """Reap a child; a killed one can be reaped only once all its threads have ended."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    return False


@pytest.mark.usefixtures("_reaped")
class TestExecutedServers(BackendContract):
    @pytest.fixture
    def rig(self, tmp_path):
        return LocalRig(tmp_path, "exec")


@pytest.mark.usefixtures("_reaped")
class TestForkedServers(BackendContract):
    @pytest.fixture
    def rig(self, tmp_path):
        return LocalRig(tmp_path, "fork")


@pytest.mark.parametrize("call", ["launch", "terminate", "kill", "observe"])
def test_a_call_without_free_descriptors_fails_immediately(tmp_path, call):
    """The caller does not wait for a launch that never begins."""
    rig = LocalRig(tmp_path, "exec")
    backend, spec = rig.backend(lambda _report: None), rig.spec()
    arguments = {
        "launch": (spec, 1),
        "terminate": (spec.name, 1, 1.0),
        "kill": (spec.name, 1),
        "observe": (spec.name, 1),
    }
    try:
        with no_descriptors(), pytest.raises(BackendUnavailable, match="Too many open files"):
            getattr(backend, call)(*arguments[call])
    finally:
        backend.close()
