"""What is in a room is for whom it is meant, and for nobody else."""

from __future__ import annotations

import json
import os
import stat

import pytest

from labkeeper.backends.room import Room
from labkeeper.backends.standalone.wire import User
from labkeeper.core.model import ServerName, ServerSpec

SPEC = ServerSpec(ServerName("a"), "/")


def told(room):
    """Whose the note is, with which mode, and what it says."""
    note = room.path / "stop.json"
    return note.stat().st_uid, stat.S_IMODE(note.stat().st_mode), json.loads(note.read_text())


def test_how_it_is_to_end_is_told_to_the_server_alone(tmp_path):
    room = Room(tmp_path / "run" / "a")
    room.furnish(SPEC, None)
    room.note_stop(keep_kernels=True, within=2.0)
    assert told(room) == (os.geteuid(), 0o600, {"keep_kernels": True, "within": 2.0})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_so_it_is_to_the_server_of_another_user(tmp_path):
    room = Room(tmp_path / "run" / "a")
    room.furnish(SPEC, User(1, 1, []))
    room.note_stop(keep_kernels=False, within=2.0)
    assert told(room) == (1, 0o600, {"keep_kernels": False, "within": 2.0})
    # To be written to by its user is no way to anything else.
    assert stat.S_IMODE(room.path.stat().st_mode) & 0o022 == 0
