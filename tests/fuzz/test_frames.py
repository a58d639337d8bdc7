"""Fuzz frames between keeper, fork server and servers, launch records and files of servers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import DEPTHS, FUZZ, JSON, fields_of, nested
from labkeeper import discovery
from labkeeper.backends.local.server_dir import Record, ServerDir
from labkeeper.forkserver import wire
from labkeeper.forkserver.wire import Launch, User, WireError
from labkeeper.jupyter import records

NOTHING = Path(os.devnull)
TEXTS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
LAUNCHES = fields_of(
    server_dir=st.text(),
    title=st.text(),
    cwd=st.text(),
    env=TEXTS,
    kernel_env=TEXTS,
    umask=st.integers(0, 0o777),
    config=st.dictionaries(st.text(max_size=5), TEXTS, max_size=2),
    user=st.none()
    | fields_of(
        uid=st.integers(0), gid=st.integers(0), groups=st.lists(st.integers(0), max_size=2)
    ),
    cgroups=st.lists(st.text(), max_size=2),
    rlimits=st.dictionaries(st.text(max_size=5), st.integers(0), max_size=2),
    encrypt_kernels=st.booleans(),
    identity_key=st.text(max_size=9),
    zygote_cgroups=st.lists(st.text(), max_size=2),
    kernels_by=st.sampled_from(["fork", "exec"]),
)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
SESSIONS = fields_of(path=st.text(), name=st.text(), type=st.text(), kernel_id=IDS)
KERNELS = fields_of(
    kernels=st.lists(IDS, max_size=3),
    starting=st.lists(IDS, max_size=3),
    sessions=st.lists(SESSIONS, max_size=3),
)
INFOS = fields_of(
    base_url=st.text(), hostname=st.text(), password=st.booleans(), pid=st.just(7),
    port=st.integers(), root_dir=st.text(), secure=st.booleans(), token=st.text(), url=st.text(),
    version=st.text(),
)  # fmt: skip
ASKED = fields_of(hostname=st.text(), port=st.integers(), base_url=st.text(), secure=st.booleans())
RECORDS = fields_of(
    generation=st.integers(), pid=st.integers(), started=st.text(), boot=st.text(),
    gateway=st.booleans(), launched_by=st.sampled_from(["fork", "exec"]), limited_by=TEXTS,
    asked=ASKED,
)  # fmt: skip


def file_contents(about):
    """Return file contents: such JSON, arbitrary bytes, or deeply nested JSON."""
    return (
        about.map(lambda value: json.dumps(value).encode())
        | st.binary(max_size=200)
        | DEPTHS.map(nested)
    )


def count_descriptors():
    return len([*Path("/proc/self/fd").iterdir()])


def receive(data, files=0):
    """Send bytes and open files, close the connection, and return what `receive` makes of them."""
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as opened:
        handles = [opened.enter_context(NOTHING.open()).fileno() for _ in range(files)]

        def send():
            with contextlib.suppress(OSError), theirs:
                if files and data:
                    socket.send_fds(theirs, [data[:1]], handles)
                theirs.sendall(data[1:] if files else data)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            message, received = wire.receive(ours, within=5)
            for file in received:
                os.close(file)
            return message
        finally:
            ours.close()
            sender.join()


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 8))
def test_noise_is_rejected_and_received_descriptors_are_closed(data, files):
    before = count_descriptors()
    with contextlib.suppress(WireError, EOFError):
        assert isinstance(receive(data, files), dict)
    assert count_descriptors() == before


@FUZZ
@given(file_contents(JSON), st.integers(-3, 3) | st.integers(0, 2**32 - 1))
@example(nested(100_000), 0)
def test_frame_with_any_body_and_length_yields_an_object_or_an_error(body, off):
    length = len(body) + off if -len(body) <= off <= 3 else off
    with contextlib.suppress(WireError):
        assert isinstance(receive(struct.pack("!I", length % 2**32) + body), dict)


@FUZZ
@given(
    st.dictionaries(
        st.text(),
        JSON.filter(lambda value: value == value),  # noqa: PLR0124 - no NaN
        max_size=3,
    )
)
def test_message_survives_a_round_trip(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.send(theirs, message)
        assert json.dumps(wire.receive(ours, within=5)[0]) == json.dumps(message)


@FUZZ
@given(file_contents(LAUNCHES))
@example(nested(100_000))
def test_launch_is_read_completely_or_rejected(content):
    reading, writing = os.pipe()

    def send():
        with os.fdopen(writing, "wb") as stream:
            stream.write(content)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        launch = Launch.read(reading)
    except WireError:
        pass
    else:
        assert Launch.parse(launch.message()) == launch
        assert launch.user is None or isinstance(launch.user, User)
    finally:
        sender.join()


@FUZZ
@given(content=file_contents(KERNELS))
@example(content=nested(100_000))
def test_kernel_record_with_any_content_yields_valid_ids_only(tmp_path, content):
    path = tmp_path / "kernels.json"
    path.write_bytes(content)
    assert all(
        set(kernel.id) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")
        for kernel in records.read_kernels(path)
    )


@FUZZ
@given(content=file_contents(INFOS))
@example(content=nested(100_000))
def test_server_info_file_with_any_content_is_read_or_ignored(tmp_path, content):
    records.info_path(tmp_path, 7).write_bytes(content)
    found = records.read_info(tmp_path, 7)
    assert found is None or json.loads(content)["pid"] == 7


@FUZZ
@given(content=file_contents(RECORDS))
@example(content=nested(100_000))
def test_launch_record_with_any_content_is_read_or_ignored(tmp_path, content):
    (tmp_path / "launch.json").write_bytes(content)
    assert isinstance(ServerDir(tmp_path).read_record(), Record | None)


@FUZZ
@given(content=file_contents(fields_of(url=st.text())))
@example(content=nested(100_000))
def test_keeper_address_file_with_any_content_is_read_or_ignored(tmp_path, content):
    (tmp_path / "keeper.json").write_bytes(content)
    assert isinstance(discovery.read_address(tmp_path), str | None)
