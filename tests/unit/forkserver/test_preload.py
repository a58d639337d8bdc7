"""A fork server detects what its servers must not share."""

from __future__ import annotations

import os

import pytest

from labkeeper.forkserver import preload
from labkeeper.forkserver.wire import Launch

NO_LAUNCH = Launch(
    server_dir="",
    title="",
    cwd="",
    env={},
    kernel_env={},
    umask=0o077,
    config={},
    user=None,
    cgroups=[],
    rlimits={},
    encrypt_kernels=False,
    zygote_cgroups=[],
    kernels_by="exec",
    preload=[],
)


@pytest.mark.parametrize(
    ("parent", "code"), [(os.getpid, 7), (os.getppid, 1)], ids=["lives", "has ended"]
)
def test_a_rehearsal_ends_with_its_fork_server(monkeypatch, parent, code):
    """Also if that ended before the rehearsal could subscribe to its end."""
    monkeypatch.setattr(preload, "enter", lambda _: os._exit(7))
    expected = parent()
    pid = os.fork()
    if pid == 0:
        preload._perform(NO_LAUNCH, (), -1, expected)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
