"""A fork server detects what its servers must not share."""

from __future__ import annotations

import os

import pytest

from labkeeper.forkserver import preload
from launches import launch_in


@pytest.mark.parametrize(
    ("parent", "code"), [(os.getpid, 7), (os.getppid, 1)], ids=["lives", "has ended"]
)
def test_a_rehearsal_ends_with_its_fork_server(monkeypatch, parent, code):
    """Also if that ended before the rehearsal could subscribe to its end."""
    monkeypatch.setattr(preload, "enter", lambda _: os._exit(7))
    expected = parent()
    pid = os.fork()
    if pid == 0:
        preload._perform(launch_in("/"), (), -1, expected)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
