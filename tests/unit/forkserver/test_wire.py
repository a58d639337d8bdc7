"""Frames arrive complete with their descriptors or not at all, and no descriptor leaks."""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import json
import os
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkeeper.forkserver import wire
from labkeeper.forkserver.wire import LARGEST, MOST_FILES, VERSION, Launch, User, WireError

NOTHING = Path(os.devnull)
LAUNCH = {
    "server_dir": "/run/a",
    "title": "jupyter-lab",
    "cwd": "/",
    "env": {"A": "b"},
    "kernel_env": {"KERNEL_A": "1"},
    "umask": 0o022,
    "config": {"ServerApp": {"port": 1}},
    "user": {"uid": 1, "gid": 2, "groups": [2, 3]},
    "cgroups": ["/sys/fs/cgroup/x/cgroup.procs"],
    "zygote_cgroups": [],
    "rlimits": {"RLIMIT_DATA": 1},
    "encrypt_kernels": True,
    "kernels_by": "fork",
    "preload": ["numpy"],
    "identity_key": "secret",
}
WRONG = {
    "server_dir": [None, 1, ["/run/a"]],
    "title": [None, 1],
    "cwd": [None, 1],
    "env": [None, [], {"A": 1}, {"A": None}],
    "umask": [None, -1, 0o1000, True, "22", 1.0],
    "config": [None, [], {"ServerApp": 1}],
    "user": [
        "root",
        {},
        {"uid": 1, "gid": 1},
        {"uid": 1, "gid": 1, "groups": None},
        {"uid": 1, "gid": 1, "groups": [-1]},
        {"uid": -1, "gid": 1, "groups": []},
        {"uid": True, "gid": 1, "groups": []},
        {"uid": 1, "gid": 1, "groups": [], "more": 1},
    ],
    "cgroups": [None, "/sys", [1]],
    "zygote_cgroups": [None, "/sys", [1]],
    "rlimits": [None, [], {"RLIMIT_DATA": -1}, {"RLIMIT_DATA": "1"}, {"RLIMIT_DATA": True}],
    "encrypt_kernels": [None, 1, "yes"],
    "kernels_by": [None, True, "spawn", ["fork"]],
    "preload": [None, "numpy", [1]],
}


@pytest.fixture
def pair():
    """Both ends; the receiving one has a short timeout."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(0.2)
    with ours, theirs:
        yield ours, theirs


def frame(body):
    return struct.pack("!I", len(body)) + body


def descriptors():
    """Return the open descriptors, without the one that lists them."""
    listed = list(Path("/proc/self/fd").iterdir())
    return {int(entry.name) for entry in listed if os.path.lexists(entry)}


@pytest.fixture(autouse=True)
def _no_descriptor_leaks(pair):
    """Fail a test that leaks descriptors."""
    # What earlier tests have left to the garbage collector must not vanish during this one.
    gc.collect()
    before = descriptors()
    yield
    assert descriptors() == before


def test_a_frame_arrives_with_its_descriptors_which_are_not_inheritable(pair, tmp_path):
    ours, theirs = pair
    (tmp_path / "file").write_text("what is in it")
    message = {"do": "launch", "text": "ü€\0", "deep": [{"a": None}] * 3}
    with (tmp_path / "file").open() as first, (tmp_path / "file").open() as second:
        wire.send(ours, message, [first.fileno(), second.fileno()])
    received, files = wire.receive(theirs)
    assert received == message
    assert len(files) == 2
    for file in files:
        assert fcntl.fcntl(file, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.pread(file, 100, 0) == b"what is in it"
        os.close(file)


def test_frames_of_any_size_arrive_one_by_one(pair):
    ours, theirs = pair
    theirs.settimeout(10)
    messages = [{}, {"large": "x" * 1_000_000}, {"number": 1}]
    sender = threading.Thread(target=lambda: [wire.send(ours, message) for message in messages])
    sender.start()
    received = [wire.receive(theirs) for _ in messages]
    sender.join()
    assert received == [(message, []) for message in messages]


def test_a_frame_that_is_too_large_is_neither_sent_nor_read(pair):
    ours, theirs = pair
    with pytest.raises(WireError, match="too large"):
        wire.send(ours, {"text": "x" * LARGEST})
    ours.sendall(struct.pack("!I", LARGEST + 1))
    with pytest.raises(WireError, match=f"{LARGEST + 1} bytes is too large"):
        wire.receive(theirs)


@pytest.mark.parametrize(
    ("sent", "because"),
    [
        (frame(b"no json"), "no JSON"),
        (frame(b""), "no JSON"),
        (frame(b"\xff\xfe\xff"), "no JSON"),
        (frame(b"[" * 100_000), "no JSON"),
        (frame(b"9" * 5000), "no JSON|no object"),
        (frame(b"[1]"), "no object, but list"),
        (frame(b"null"), "no object, but NoneType"),
        (frame(b'{"a": 1}')[:-1], "closed within a frame"),
        (b"\0\0", "closed within a frame"),
    ],
    ids=[
        "text",
        "empty",
        "bytes",
        "deep",
        "number",
        "list",
        "null",
        "half a body",
        "half a length",
    ],
)
def test_an_invalid_frame_is_refused_and_its_descriptors_are_closed(pair, sent, because):
    ours, theirs = pair
    with NOTHING.open() as file:
        ours.sendmsg(
            [sent], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * 2))]
        )
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=because):
        wire.receive(theirs)


def test_a_frame_and_a_line_carry_the_version(pair):
    ours, theirs = pair
    wire.send(ours, {"do": "keep"})
    assert json.loads(theirs.recv(100)[4:]) == {"do": "keep", "version": VERSION}
    assert json.loads(wire.line({"status": 0})) == {"status": 0, "version": VERSION}
    assert wire.read_line(wire.line({"status": 0})) == {"status": 0}


def test_without_a_version_it_is_the_first(pair):
    """Fork servers outlive their keepers, and earlier ones send none."""
    ours, theirs = pair
    ours.sendall(frame(b'{"pid": 1}') + frame(b'{"pid": 1, "version": 1}'))
    assert [wire.receive(theirs), wire.receive(theirs)] == [({"pid": 1}, [])] * 2
    assert wire.read_line(b'{"status": 9}') == {"status": 9}


@pytest.mark.parametrize("version", [VERSION + 1, 0, "1", None, [1], "x" * 1000])
def test_another_version_is_refused(pair, version):
    ours, theirs = pair
    text = json.dumps({"pid": 1, "version": version}).encode()
    ours.sendall(frame(text))
    with pytest.raises(WireError, match=r"a frame has version .{1,20}, not 1"):
        wire.receive(theirs)
    with pytest.raises(WireError, match=r"a line has version"):
        wire.read_line(text)


def test_the_end_of_the_connection_raises_eof_error(pair):
    ours, theirs = pair
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        wire.receive(theirs)


def test_an_incomplete_frame_times_out(pair):
    ours, theirs = pair
    with NOTHING.open() as file:
        ours.sendmsg(
            [frame(b"{}")[:5]],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))],
        )
    with pytest.raises(TimeoutError):
        wire.receive(theirs)


@pytest.mark.parametrize("count", [MOST_FILES + 1, 100])
def test_too_many_descriptors_are_all_closed(pair, count):
    ours, theirs = pair
    with NOTHING.open() as file:
        wire.send(ours, {}, [file.fileno()] * count)
    with pytest.raises(WireError, match=f"more than {MOST_FILES} files"):
        wire.receive(theirs)


def test_descriptors_within_a_frame_are_ignored(pair):
    ours, theirs = pair
    with NOTHING.open() as file:
        ours.sendall(frame(b"{}")[:4])
        ours.sendmsg(
            [frame(b"{}")[4:]],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))],
        )
    assert wire.receive(theirs) == ({}, [])


PIECES = st.one_of(
    st.binary(max_size=40),
    st.binary(max_size=40).map(frame),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=5,
    ).map(lambda value: frame(json.dumps(value).encode())),
)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.tuples(PIECES, st.integers(0, MOST_FILES + 2)), max_size=4),
    closes=st.booleans(),
)
def test_random_input_is_a_frame_or_is_refused(pieces, closes):
    before = descriptors()
    ours, theirs = socket.socketpair()
    theirs.settimeout(0.001)
    with ours, theirs, NOTHING.open() as file:
        for piece, files in pieces:
            rights = array.array("i", [file.fileno()] * files)
            if piece:
                ours.sendmsg(
                    [piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if files else []
                )
        if closes:
            ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(WireError, EOFError, TimeoutError):
            while True:
                message, received = wire.receive(theirs)
                assert type(message) is dict
                assert len(received) <= MOST_FILES
                for each in received:
                    os.close(each)
        assert descriptors() == before | {ours.fileno(), theirs.fileno(), file.fileno()}


def test_a_launch_survives_a_round_trip():
    launch = Launch.parse(LAUNCH)
    assert launch.user == User(1, 2, [2, 3])
    assert launch.message() == LAUNCH
    assert Launch.parse(json.loads(json.dumps(launch.message()))) == launch
    assert Launch.parse({**LAUNCH, "user": None, "do": "launch"}).user is None


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_a_launch_with_an_invalid_field_is_refused_by_name(field, value):
    with pytest.raises(WireError, match=f"bad launch: {field} does not fit"):
        Launch.parse({**LAUNCH, field: value})


@pytest.mark.parametrize("field", sorted(LAUNCH.keys() - {"user"}))
def test_a_launch_with_a_missing_field_is_refused_by_name(field):
    with pytest.raises(WireError, match=f"bad launch: {field} does not fit"):
        Launch.parse({name: value for name, value in LAUNCH.items() if name != field})


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has the flag")
def test_received_descriptors_are_never_inheritable(pair, monkeypatch):
    """Setting the flag later would leave a moment in which a program could inherit them."""
    ours, theirs = pair
    monkeypatch.setattr(os, "set_inheritable", None)
    monkeypatch.setattr(fcntl, "fcntl", None)
    with NOTHING.open() as file:
        wire.send(ours, {}, [file.fileno()])
    _, (received,) = wire.receive(theirs)
    monkeypatch.undo()
    assert not os.get_inheritable(received)
    os.close(received)
