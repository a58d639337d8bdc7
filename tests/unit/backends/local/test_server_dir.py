"""A server's directory: contents, permissions, stop requests, and its removal."""

from __future__ import annotations

import json
import os
import stat

import pytest

from labkeeper.backends.local import server_dir as module
from labkeeper.backends.local.server_dir import Asked, Record, ServerDir
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.files import remove_tree
from labkeeper.forkserver.wire import User

SPEC = ServerSpec(ServerName("a"), "/")
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIBaGVsbG8+/w==\n-----END CERTIFICATE-----"
TRUSTED = CERTIFICATE.replace(" CERT", " TRUSTED CERT")
KEY = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"


def test_only_certificates_of_a_file_that_the_keeper_can_read_reach_the_server(tmp_path):
    """Neither keys nor other lines, such as those of a file that a symbolic link now leads to."""
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


def test_a_reset_removes_files_of_an_abandoned_launch_and_keeps_the_certificates(tmp_path):
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


def test_a_gateway_without_own_certificates_needs_no_bundle(tmp_path):
    assert ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/"), None) is None


def test_a_file_without_a_certificate_is_refused_without_quoting_it(tmp_path):
    (tmp_path / "shadow").write_text("root:hash")
    gateway = Gateway("https://g", "wss://g", ca_certs=str(tmp_path / "shadow"))
    with pytest.raises(ValueError, match="shadow holds no certificate in PEM") as caught:
        ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/", gateway=gateway), None)
    assert "hash" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_certificate_file_replaced_by_something_else_does_not_block_the_launch(tmp_path, make):
    make(tmp_path / "ca.pem")
    gateway = Gateway("https://g", "wss://g", ca_certs=str(tmp_path / "ca.pem"))
    with pytest.raises(OSError, match="it is not a regular file"):
        ServerDir(tmp_path / "a").prepare(ServerSpec(ServerName("a"), "/", gateway=gateway), None)


def stop_request_of(server_dir):
    """Return owner, mode and content of the stop request."""
    note = server_dir.path / "stop.json"
    return note.stat().st_uid, stat.S_IMODE(note.stat().st_mode), json.loads(note.read_text())


def test_the_stop_request_is_readable_by_the_server_only(tmp_path):
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, None)
    server_dir.write_stop_request(keep_kernels=True, within=2.0)
    assert stop_request_of(server_dir) == (
        os.geteuid(),
        0o600,
        {"version": 1, "keep_kernels": True, "within": 2.0},
    )


@pytest.mark.root
def test_the_stop_request_belongs_to_the_servers_user(tmp_path):
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, User(1, 1, []))
    server_dir.write_stop_request(keep_kernels=False, within=2.0)
    assert stop_request_of(server_dir) == (
        1,
        0o600,
        {"version": 1, "keep_kernels": False, "within": 2.0},
    )
    # Its user cannot write to anything else in the directory.
    assert stat.S_IMODE(server_dir.path.stat().st_mode) & 0o022 == 0


@pytest.mark.root
def test_ownership_changes_while_the_servers_user_cannot_reach_the_directory(tmp_path, monkeypatch):
    """A symbolic link in place of a file would hand over its target; so the directory is last."""
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
def test_a_removal_interrupted_by_a_crash_leaves_no_record_and_is_completed_later(
    tmp_path, monkeypatch, at
):
    """A remaining stop request would make a killed server look as if it had shut down by itself."""
    asked = Asked(hostname="127.0.0.1", port=1, base_url="/", secure=False)
    record = Record(
        generation=1, pid=1, started="1", boot="b", gateway=False, ready=True, asked=asked
    )
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


def test_a_directory_is_removed_whatever_a_server_created_in_it(tmp_path):
    """Nested deeper than Python's recursion limit and the descriptor limit."""
    server_dir = ServerDir(tmp_path / "run" / "a")
    server_dir.prepare(SPEC, None)
    here = server_dir.jupyter
    for _ in range(1200):
        here = here / "d"
        here.mkdir()
    server_dir.remove()
    assert not server_dir.path.exists()
