"""TLS of the WSGI server, with real sockets, handshakes and files."""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import ssl

import pytest
import structlog
import trustme
from cryptography.hazmat.primitives import serialization

from harness import PATIENCE, until
from labkeeper.api import tls
from labkeeper.api.tls import Certificate
from labkeeper.api.wsgi.channel import _HEAD_WITHIN
from labkeeper.core.errors import SettingsError
from serving import ask, ask_json, is_closed


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def issue(authority, tmp_path):
    """Write a new certificate and key over the previous ones, and return their paths."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def write():
        leaf = authority.issue_cert("127.0.0.1")
        for path, content in (
            (key, leaf.private_key_pem.bytes()),
            (cert, leaf.cert_chain_pems[0].bytes()),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(content)
            fresh.chmod(0o600)
            fresh.replace(path)
        return cert, key

    return write


@pytest.fixture
def greet(authority):
    """Wrap a connection in TLS, trusting the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    made = []

    def wrap(connection):
        made.append(context.wrap_socket(connection, server_hostname="127.0.0.1"))
        return made[-1]

    yield wrap
    for connection in made:
        connection.close()


def test_requests_and_responses_of_any_size_pass(serve, issue, greet):
    served = serve(Certificate(*issue()), max_body=2**22)
    connection = greet(served.connect())
    assert connection.version() in {"TLSv1.2", "TLSv1.3"}
    assert ask_json(connection)["wsgi.url_scheme"] == "https"
    upload = os.urandom(2**22)
    found = ask_json(connection, method="POST", body=upload)
    assert (found["size"], found["digest"]) == (len(upload), hashlib.sha256(upload).hexdigest())
    # Responses of unknown length end their connections.
    assert ask(greet(served.connect()), path="/large") == (200, bytes(40 * 2**20))
    assert ask(connection, path="/events") == (
        200,
        b"".join(b"data: %d\n\n" % number for number in range(5)),
    )
    # The Unix socket has no TLS.
    assert ask_json(served.connect_locally())["wsgi.url_scheme"] == "http"


def test_a_slow_reader_receives_everything(serve, issue, greet):
    served = serve(Certificate(*issue()))
    connection = greet(served.connect())
    connection.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    received = 0
    while piece := connection.recv(100_000):
        received += len(piece)
        select.select([], [], [], 0.001)
    assert received > 40 * 2**20


def test_old_protocol_versions_are_refused(serve, issue, authority):
    served = serve(Certificate(*issue()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(served.connect(), server_hostname="127.0.0.1")


def test_plain_http_is_refused_with_a_hint_to_use_https(serve, issue):
    """As a problem document."""
    connection = serve(Certificate(*issue())).connect()
    status, body = ask(connection)
    problem = json.loads(body)
    assert (status, problem["code"], problem["status"]) == (400, "bad_request", 400)
    assert "https://" in problem["detail"]
    assert is_closed(connection)


def test_stalled_handshakes_block_no_one_and_time_out(clock, serve, issue, greet):
    served = serve(Certificate(*issue()))
    stalled = [served.connect() for _ in range(50)]
    for connection in stalled[:25]:
        # The header of a record that never arrives.
        connection.sendall(b"\x16\x03\x01\x02\x00\x01")
    assert ask_json(greet(served.connect()))["size"] == 0
    clock.jump(_HEAD_WITHIN + 1)
    for connection in stalled:
        assert is_closed(connection)


def test_a_renewed_certificate_applies_to_new_connections(serve, issue, greet, monkeypatch):
    monkeypatch.setattr(tls, "_LOOK_EVERY", 0.0)
    served = serve(Certificate(*issue()))
    before = greet(served.connect())
    issue()
    after = greet(served.connect())
    assert before.getpeercert()["serialNumber"] != after.getpeercert()["serialNumber"]
    assert ask_json(before)["size"] == ask_json(after)["size"] == 0


def test_a_renewed_certificate_is_noticed_at_the_next_check(serve, issue, greet):
    served = serve(Certificate(*issue()))
    first = greet(served.connect()).getpeercert()["serialNumber"]
    issue()
    until(
        lambda: greet(served.connect()).getpeercert()["serialNumber"] != first,
        what="the new certificate",
    )


def test_an_unusable_pair_is_reported_once_and_the_previous_one_stays_in_use(issue, monkeypatch):
    monkeypatch.setattr(tls, "_LOOK_EVERY", 0.0)
    cert, key = issue()
    certificate = Certificate(cert, key)
    before = certificate._context
    with structlog.testing.capture_logs() as log:
        for broken in (lambda: key.write_text("no key"), key.unlink):
            broken()
            for _ in range(3):
                certificate._renew()
        assert certificate._context is before
        issue()
        certificate._renew()
    assert certificate._context is not before
    assert [entry["log_level"] for entry in log] == ["warning", "warning", "info"]
    assert "must be PEM" in log[0]["reason"]
    assert "cannot read the file" in log[1]["reason"]


def test_an_unusable_pair_at_startup_is_a_settings_error(issue, authority, tmp_path):
    cert, key = issue()
    other = tmp_path / "other.pem"
    other.write_bytes(authority.issue_cert("127.0.0.1").private_key_pem.bytes())
    with pytest.raises(SettingsError, match="they do not belong together"):
        Certificate(cert, other)
    secret = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    other.write_bytes(secret)
    with pytest.raises(SettingsError, match=r"\(LABKEEPER_KEY_FILE\): it is encrypted"):
        Certificate(cert, other)
    with pytest.raises(
        SettingsError, match=r"cannot read the file .*absent.pem \(LABKEEPER_LAB_CERT_FILE\)"
    ):
        tls.load(tmp_path / "absent.pem", key, prefix="LABKEEPER_LAB_")
    with pytest.raises(SettingsError, match="must be PEM"):
        Certificate(key, cert)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 1), (0o604, 1)])
def test_a_key_readable_by_others_causes_a_warning(issue, mode, warnings):
    cert, key = issue()
    key.chmod(mode)
    with structlog.testing.capture_logs() as log:
        Certificate(cert, key)
    assert len(log) == warnings


def test_a_socket_reports_that_it_waits_for_writing(issue):
    """A peer that does not read leaves no buffer space for the handshake's response."""
    ours, its = socket.socketpair()
    with its:
        ours.setblocking(False)
        connection = Certificate(*issue()).wrap(ours)
        try:
            with pytest.raises(tls.NotYet):
                connection.recv(1)
            assert not connection.wants_write
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            caller = context.wrap_bio(incoming, outgoing, server_hostname="x")
            with pytest.raises(ssl.SSLWantReadError):
                caller.do_handshake()
            its.sendall(outgoing.read())
            fill(connection)
            with pytest.raises(tls.NotYet):
                connection.recv(1)
            assert connection.wants_write
        finally:
            connection.close()


def fill(connection):
    """Write until the buffer is full."""
    sent = 1
    while sent:
        try:
            sent = socket.socket.send(connection._connection, bytes(65536))
        except BlockingIOError:
            sent = 0


def test_a_handshake_larger_than_the_buffers_continues_when_the_client_reads(
    serve, issue, authority
):
    cert, key = issue()
    cert.write_bytes(cert.read_bytes() + authority.cert_pem.bytes() * 100)
    served = serve(Certificate(cert, key))
    served.server._doors[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        plain.settimeout(PATIENCE)
        plain.connect(served.address)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        caller = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            caller.do_handshake()
        plain.sendall(outgoing.read())
        until(
            lambda: any(
                one._tls.wants_write for one in served.server._doors[0].active_channels.values()
            ),
            what="the handshake to fill the send buffer",
        )
        greeted = False
        while not greeted:
            incoming.write(plain.recv(65536))
            try:
                caller.do_handshake()
                greeted = True
            except ssl.SSLWantReadError:
                pass
        caller.write(b"GET / HTTP/1.0\r\n\r\n")
        plain.sendall(outgoing.read())
        until(lambda: answered(caller, incoming, plain), what="a response")


def answered(caller, incoming, plain):
    incoming.write(plain.recv(65536))
    try:
        return caller.read(65536).startswith(b"HTTP/1.0 200")
    except ssl.SSLWantReadError:
        return False


def test_writing_to_a_broken_connection_raises_connection_reset(issue):
    ours, its = socket.socketpair()
    with its:
        connection = Certificate(*issue()).wrap(ours)
        connection.setblocking(False)
        its.sendall(b"\x16\x03\x01\x00\x01no handshake")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(ConnectionResetError):
            connection.send(b"x")
        connection.close()
