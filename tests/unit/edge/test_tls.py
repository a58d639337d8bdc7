"""TLS of a real edge. The other tests of this directory marked `BOTH` run over it, too."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from edge_peers import SMALL, TOKEN, answer, get
from harness import PATIENCE, until
from labkeeper.edge.tls import EncryptedKeyError, context_of

HSTS = b"strict-transport-security"


@pytest.fixture
def context(issue):
    return issue("labs.example.org", "*.labs.example.org", "localhost", "127.0.0.1")


@pytest.fixture
def trusting(authority):
    """A client's context."""
    made = ssl.create_default_context()
    authority.configure_trust(made)
    return made


def request(host, target=b"/", *headers):
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: " + host, *headers, b"", b""])


def hello(context, name="labs.example.org"):
    """Return the first bytes of a handshake."""
    sent = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


@pytest.mark.parametrize("name", ["labs.example.org", "demo.labs.example.org", "127.0.0.1"])
def test_certificate_serves_the_names_of_all_labs(edge, name):
    client = edge.connect(name=name)
    assert client.ask(request(name.encode())).body == b"ok"
    assert client.socket.version() == "TLSv1.3"


@pytest.mark.parametrize("name", ["a.b.labs.example.org", "example.org"])
def test_client_notices_a_name_that_the_certificate_does_not_cover(edge, name):
    with pytest.raises(ssl.SSLCertVerificationError):
        edge.connect(name=name)


def greet(edge, context, name="labs.example.org"):
    client = edge.connect(plain=True)
    client.socket = context.wrap_socket(client.socket, server_hostname=name)
    return client


@pytest.mark.parametrize("alpn", [[], ["h2", "http/1.1"], ["h2"]])
def test_protocol_is_http_1(edge, trusting, alpn):
    if alpn:
        trusting.set_alpn_protocols(alpn)
    client = greet(edge, trusting)
    assert client.socket.selected_alpn_protocol() == ("http/1.1" if len(alpn) > 1 else None)
    assert client.ask(get()).status == 200


def test_version_1_2_works_with_ciphers_that_are_forward_secret_and_authenticated(edge, trusting):
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    client = greet(edge, trusting)
    assert client.socket.version() == "TLSv1.2"
    assert client.ask(get()).status == 200
    for refused in ("ECDHE+AES:!AESGCM:!AESCCM", "RSA+AESGCM", "DHE+AESGCM"):
        trusting.set_ciphers(refused)
        with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
            greet(edge, trusting)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_versions_are_refused_with_an_alert(edge, trusting):
    trusting.minimum_version = ssl.TLSVersion.TLSv1
    trusting.maximum_version = ssl.TLSVersion.TLSv1_1
    trusting.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        greet(edge, trusting)


def test_no_session_is_resumed_by_a_ticket(edge, trusting):
    client = greet(edge, trusting)
    assert client.ask(get()).status == 200
    assert not client.socket.session.has_ticket


def test_plain_http_gets_a_clear_answer(edge):
    client = edge.connect(plain=True)
    reply = client.ask(get())
    assert reply.status == 400
    assert b"this port speaks HTTPS" in reply.body
    assert client.drain() == (b"", False)
    assert edge.requests == []


@pytest.mark.parametrize("noise", [b"\x16" + b"\xff" * 500, b"\x16\x03\x01\x00\x05hello", b"\0"])
def test_noise_in_place_of_a_handshake_ends_the_connection(edge, noise):
    client = edge.connect(plain=True)
    client.send(noise)
    client.drain()
    edge.settle(0)
    assert edge.requests == []


def test_noise_after_the_handshake_ends_the_connection(edge):
    client = edge.connect(name="labs.example.org")
    socket.socket.send(client.socket, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with contextlib.suppress(ssl.SSLError):
        client.drain()
    edge.settle(0)
    assert edge.requests == []


def test_bytes_may_arrive_one_by_one(edge, trusting):
    client = edge.connect(plain=True)
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting.wrap_bio(received, sent, server_hostname="labs.example.org")

    def exchange(act):
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                for byte in sent.read():
                    client.send(bytes([byte]))
                received.write(client.socket.recv(1))

    exchange(tls.do_handshake)
    tls.write(get())
    assert exchange(lambda: tls.read(SMALL)).startswith(b"HTTP/1.1 200")


# Clients that do not finish their handshake


@pytest.mark.parametrize("part", [0, 1, 100, None])
def test_unfinished_handshakes_are_closed_after_a_time(edge, trusting, part):
    begun = hello(trusting)[:part]
    crowd = [edge.connect(plain=True) for _ in range(500 if part == 0 else 50)]
    for client in crowd:
        client.send(begun)
    edge.settle(len(crowd))
    assert edge.connect(name="labs.example.org").ask(get()).status == 200
    edge.jump(edge.limits.head_within + 1)
    for client in crowd:
        client.drain()
    edge.settle(1)


def test_unfinished_handshakes_make_room_for_others(make_edge, trusting):
    edge = make_edge(most=3)
    edge.start_keeper()
    crowd = [edge.connect(plain=True) for _ in range(3)]
    crowd[1].send(hello(trusting)[:50])
    edge.settle(3)
    assert edge.connect(name="labs.example.org").ask(get()).status == 200
    # The longest waiting one had to go.
    assert crowd[0].drain()[0] == b""
    edge.settle(3)


def test_client_counts_once(make_edge):
    """With room for one, it would have to go, or be refused, if it counted twice."""
    edge = make_edge(most=1)
    edge.start_keeper()
    client = edge.connect(name="labs.example.org")
    assert client.ask(get()).status == client.ask(get()).status == 200
    edge.settle(1)


def test_handshake_ends_while_the_edge_drains(edge):
    client = edge.connect(plain=True)
    edge.settle(1)
    edge.call(edge.proxy.drain)
    assert client.drain() == (b"", False)


# Ends


def test_answer_whose_end_is_that_of_the_connection_is_whole_for_the_client(edge):
    """Not before the client was told so, the end could be anybody's doing."""
    edge.keeper.answers(answer(b"content"))
    client = edge.connect(name="labs.example.org")
    client.send(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    data, cut = client.drain()
    assert data.endswith(b"content")
    assert not cut


def test_refusal_is_read_by_a_client_that_still_sends(edge):
    client = edge.connect(name="labs.example.org")
    head = get(b"/servers/lab/", b"Content-Length: %d" % 2**26, method=b"POST")
    client.send(head.replace(TOKEN + b"\r\n", b""))
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 2**20:
            sent += client.socket.send(bytes(SMALL))
    assert client.receive(b"POST").status == 401


def test_client_may_end_its_half(edge):
    """As without TLS: a client that ends what it sends goes without an answer."""
    edge.keeper.answers(None)
    client = edge.connect(name="labs.example.org")
    client.send(get())
    until(lambda: edge.requests)
    with contextlib.suppress(OSError):
        client.socket.unwrap()
    edge.settle(0)


# Headers


def policy(edge, host, target):
    """Return the policy about TLS that an answer has."""
    client = edge.connect(name="labs.example.org")
    return client.ask(request(host, target, TOKEN)).headers.get(HSTS)


TARGETS = {
    "the keeper": b"/",
    "a Lab": b"/servers/lab/",
    "no Lab": b"/servers/ghost/",
    "the edge": b"/edge/healthz",
    "a redirect": b"/servers/lab",
    "a refusal": b"/servers/../x",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_browsers_are_told_to_use_nothing_but_tls(edge, lab, target):
    lab.answers(answer(b"lab", b"Strict-Transport-Security: max-age=0; includeSubDomains"))
    assert policy(edge, b"labs.example.org", target) is None
    edge.proxy.hsts = True
    expected = None if target == TARGETS["a refusal"] else b"max-age=15552000"
    assert policy(edge, b"labs.example.org", target) == expected
    # That would hold for all programs of the browser's own machine.
    assert policy(edge, b"localhost:8000", target) is None


# Certificates


def test_unusable_certificates_are_refused():
    authority = trustme.CA()
    one, other = authority.issue_cert("a.example.org"), authority.issue_cert("b.example.org")
    chain, key = one.cert_chain_pems[0].bytes(), one.private_key_pem.bytes()
    assert context_of(chain, key)
    private = serialization.load_pem_private_key(key, None)
    encrypted = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    with pytest.raises(EncryptedKeyError):
        context_of(chain, encrypted)
    for bad in ((chain, other.private_key_pem.bytes()), (b"", key), (chain, b""), (key, chain)):
        with pytest.raises(ssl.SSLError):
            context_of(*bad)


@pytest.mark.programs("openssl")
def test_renegotiation_is_refused(edge):
    """Each would cost the edge a signature."""
    host, port = edge.address
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-tls1_2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as client:
        client.stdin.write(b"R\n")
        client.stdin.flush()
        assert client.wait(PATIENCE)
        assert b"no renegotiation" in client.stderr.read()
