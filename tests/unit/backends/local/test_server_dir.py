"""What a server finds in its room, and who else may look."""

from __future__ import annotations

import json
import os
import stat

import pytest

from labkeeper.backends.local import server_dir as module
from labkeeper.backends.local.server_dir import Record, ServerDir
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.files import remove_tree
from labkeeper.forkserver.wire import User

SPEC = ServerSpec(ServerName("a"), "/")
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIBaGVsbG8+/w==\n-----END CERTIFICATE-----"
TRUSTED = CERTIFICATE.replace(" CERT", " TRUSTED CERT")
KEY = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"


def test_of_a_file_that_the_keeper_can_read_the_server_gets_certificates_alone(tmp_path):
    """Not the key beside them, nor a line of a file that is none, such as one that has become a link to another."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(
        f"root:hash\n{KEY}\n{CERTIFICATE}\nmore\n{TRUSTED}\n".encode()
        + b"\xff\n-----BEGIN CERTIFICATE-----\nroot:x\n"
    )
    spec = ServerSpec(
        ServerName("a"), "/", gateway=Gateway("https://g", "wss://g", ca_certs=str(ca))
    )
    bundle = ServerDir(tmp_path / "run" / "a").prepare(spec, None).read_text()
    assert bundle.endswith(f"{CERTIFICATE}\n{TRUSTED}")
    assert bundle.count("MIIBaGVsbG8") == 2
    assert "PRIVATE" not in bundle
    assert "root:" not in bundle


def test_a_reset_removes_what_an_abandoned_launch_wrote_and_keeps_the_certificates(tmp_path):
    (tmp_path / "ca.pem").write_text(CERTIFICATE)
    server_dir = ServerDir(tmp_path / "a")
    bundle = server_dir.prepare(
        ServerSpec(
            ServerName("a"),
            "/",
            gateway=Gateway("https://g", "wss://g", ca_certs=str(tmp_path / "ca.pem")),
        ),
        None,
    )
    (server_dir.jupyter / "jpserver-1.json").touch()
    (server_dir.jupyter / "outside").symlink_to(tmp_path)
    (server_dir.jupyter / "more" / "of it").mkdir(parents=True)
    server_dir.reset()
    assert list(server_dir.jupyter.iterdir()) == [bundle]
    assert (tmp_path / "ca.pem").exists()


def test_without_certificates_of_its_own_a_gateway_needs_no_file(tmp_path):
    assert ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/"), None) is None


def test_a_file_without_a_certificate_is_named(tmp_path):
    (tmp_path / "shadow").write_text("root:hash")
    gateway = Gateway("https://g", "wss://g", ca_certs=str(tmp_path / "shadow"))
    with pytest.raises(ValueError, match="shadow holds no certificate in PEM") as caught:
        ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/", gateway=gateway), None)
    assert "hash" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_file_that_has_become_something_else_since_holds_no_launch_up(tmp_path, make):
    make(tmp_path / "ca.pem")
    gateway = Gateway("https://g", "wss://g", ca_certs=str(tmp_path / "ca.pem"))
    with pytest.raises(OSError, match="it is not a regular file"):
        ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/", gateway=gateway), None)


def told(server_dir):
    """Whose the note is, with which mode, and what it says."""
    note = server_dir.path / "stop.json"
    return note.stat().st_uid, stat.S_IMODE(note.stat().st_mode), json.loads(note.read_text())


def test_how_it_is_to_end_is_told_to_the_server_alone(tmp_path):
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, None)
    server_dir.write_stop_request(keep_kernels=True, within=2.0)
    assert told(server_dir) == (
        os.geteuid(),
        0o600,
        {"version": 1, "keep_kernels": True, "within": 2.0},
    )


@pytest.mark.root
def test_so_it_is_to_the_server_of_another_user(tmp_path):
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, User(1, 1, []))
    server_dir.write_stop_request(keep_kernels=False, within=2.0)
    assert told(server_dir) == (
        1,
        0o600,
        {"version": 1, "keep_kernels": False, "within": 2.0},
    )
    # To be written to by its user is no way to anything else.
    assert stat.S_IMODE(server_dir.path.stat().st_mode) & 0o022 == 0


@pytest.mark.root
def test_what_is_given_to_a_servers_user_is_given_while_that_user_cannot_reach_it(
    tmp_path, monkeypatch
):
    """A link in place of a file would be given away, with what it leads to; so the directory that holds it is given last."""
    ca = tmp_path / "ca.pem"
    ca.write_text(CERTIFICATE)
    spec = ServerSpec(
        ServerName("a"), "/", gateway=Gateway("https://g", "wss://g", ca_certs=str(ca))
    )
    server_dir, real, given = ServerDir(tmp_path / "run" / "a"), os.chown, []

    def chown(path, uid, gid, **how):
        given.append(
            (
                path.name,
                server_dir.jupyter.stat().st_uid,
                stat.S_IMODE(server_dir.jupyter.stat().st_mode),
                how,
            )
        )
        real(path, uid, gid, **how)

    monkeypatch.setattr(os, "chown", chown)
    bundle = server_dir.prepare(spec, User(1, 1, []))
    last = {"follow_symlinks": False}
    assert given == [("gateway-ca.pem", 0, 0o700, last), ("jupyter", 0, 0o700, last)]
    assert (bundle.stat().st_uid, server_dir.jupyter.stat().st_uid) == (1, 1)


@pytest.mark.parametrize("at", [1, 2])
def test_a_keeper_that_is_killed_while_it_removes_a_room_leaves_nothing_that_tells_of_a_server(
    tmp_path, monkeypatch, at
):
    """Else the next one takes a server that was killed for one that has shut itself down; and it goes on where this one ended."""
    record = Record(generation=1, pid=1, started="1", boot="b", gateway=False, ready=True)
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, None)
    server_dir.write_record(record)
    server_dir.write_stop_request(keep_kernels=False, within=1.0)
    left = iter(range(1, at))

    def die(directory):
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove_tree(directory)

    monkeypatch.setattr(module, "remove_tree", die)
    with pytest.raises(KeyboardInterrupt):
        server_dir.remove()
    monkeypatch.undo()
    assert (server_dir.read_record(), server_dir.recognised) == (None, True)
    server_dir.remove()
    assert not server_dir.path.exists()


def test_a_room_goes_whatever_a_server_has_made_in_it(tmp_path):
    """More directories in each other than Python recurses, or a process may hold open."""
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, None)
    here = server_dir.jupyter
    for _ in range(1200):
        here = here / "d"
        here.mkdir()
    server_dir.remove()
    assert not server_dir.path.exists()
