"""The gateway client: a diagnosis within its time limit, whatever the gateway does."""

from __future__ import annotations

import os
import pwd
import ssl
import threading

import pytest
import trustme

from gateway_servers import HostileGateway, black_hole, server_context
from harness import until
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.server import FailureClass
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.gateways.client import GatewayClient
from labkeeper.testing.fakes import FakeClock

TIMEOUT = 1.0
CHECKS = {
    "401": ("gateway-refused", "a caller without a token (401); check gateway_auth_token"),
    "403": ("gateway-refused", "(403)"),
    "404": ("not-a-gateway", "(404); check the host, port and path of gateway_url"),
    "400": ("not-a-gateway", "(400)"),
    "500": ("gateway-unreachable", "answers 500: it is out of order"),
    "503": ("gateway-unreachable", "answers 503"),
    "redirect": ("not-a-gateway", "redirects to 'https://login.example/?next=here'"),
    "html": ("not-a-gateway", "not as a Jupyter kernel gateway does; check"),
    "other json": ("not-a-gateway", "not as a Jupyter kernel gateway does"),
    "json list": ("not-a-gateway", "not as a Jupyter kernel gateway does"),
    "nothing": ("not-a-gateway", "not as a Jupyter kernel gateway does"),
    "close": ("gateway-unreachable", "without a whole answer"),
    "die": ("gateway-unreachable", "without a whole answer"),
    "break off": ("gateway-unreachable", "without a whole answer"),
    "break off chunks": ("gateway-unreachable", "without a whole answer"),
    "garbage": ("not-a-gateway", "does not speak HTTP"),
    "hang": (
        "gateway-timeout",
        "did not answer within 1 s; look at it, or raise LABKEEPER_GATEWAY_TIMEOUT",
    ),
    "hang after headers": ("gateway-timeout", "did not answer within 1 s"),
    "drip": ("gateway-timeout", "did not answer within 1 s"),
    "drip chunk": ("gateway-timeout", "did not answer within 1 s"),
    "drip head": ("gateway-timeout", "did not answer within 1 s"),
    "endless": ("gateway-timeout", "did not answer within 1 s"),
}


@pytest.fixture
def client():
    return GatewayClient(FakeClock(time=5000.0), timeout=TIMEOUT)


@pytest.fixture
def hostile():
    with HostileGateway() as gateway:
        yield gateway


def at(url, **options):
    return Gateway(url, url.replace("http", "ws", 1), **options)


def assert_fails(client, gateway, kind, *texts):
    health = client.check(gateway)
    assert not health.reachable
    assert health.error.kind == kind, health.error
    assert health.error.message.startswith(f"the gateway {gateway.url} ")
    for text in texts:
        assert text in health.error.message
    assert health.kernelspecs is None


def test_a_gateway_that_responds_correctly_is_usable(client, hostile):
    health = client.check(at(hostile.url))
    assert (health.reachable, health.kernelspecs, health.since) == (True, 1, 5000.0)


@pytest.mark.parametrize("mode", CHECKS)
def test_each_problem_of_a_gateway_is_diagnosed_with_advice(client, hostile, mode):
    hostile.mode = mode
    kind, text = CHECKS[mode]
    assert_fails(client, at(hostile.url), kind, text)


@pytest.mark.parametrize("mode", ["drip", "drip head", "drip chunk", "endless"])
def test_a_check_that_timed_out_leaves_no_thread(client, hostile, mode):
    """Otherwise an endless response would cost one more with each check."""
    hostile.mode = mode
    client.check(at(hostile.url))
    until(
        lambda: not [t for t in threading.enumerate() if t.name == "ask-gateway"],
        what="the thread that asks the gateway to end",
    )


def test_a_refused_token_is_distinguished_from_a_missing_one(client, hostile):
    hostile.mode = "403"
    assert_fails(
        client,
        at(hostile.url, auth_token="wrong"),
        "gateway-refused",
        "refuses the token that it was shown (403)",
    )


def test_a_message_does_not_repeat_a_token_that_the_gateway_echoes(client, hostile):
    hostile.mode = "redirect"
    assert_fails(
        client,
        at(hostile.url, auth_token="login.example"),
        "not-a-gateway",
        "redirects to 'https://[secret]/?next=here'",
    )


def test_an_unknown_host_is_named(client):
    gateway = at("http://no-such-host.invalid:8888")
    assert_fails(client, gateway, "gateway-unreachable", "no host is called 'no-such-host.invalid'")


@pytest.mark.parametrize("host", ["a" * 70, "a..b"])
def test_an_invalid_host_name_is_diagnosed(client, host):
    assert_fails(client, at(f"http://{host}:8888"), "gateway-unreachable", "check gateway_url")


def test_a_name_resolution_that_hangs_times_out(client, monkeypatch):
    """The resolver has no timeout of its own that could be set."""
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait())
    try:
        assert_fails(client, at("http://slow.example"), "gateway-timeout")
    finally:
        over.set()


def test_a_refused_connection_is_diagnosed(client, hostile):
    hostile.stop()
    assert_fails(
        client,
        at(hostile.url),
        "gateway-unreachable",
        "connection was refused; start it, or check the port",
    )


@pytest.mark.parametrize("full", [False, True], ids=["accepts nothing", "is full"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_port_that_never_responds_times_out(client, scheme, full):
    with black_hole(full=full) as url:
        assert_fails(
            client, at(url.replace("http", scheme)), "gateway-timeout", "did not answer within 1 s"
        )


def test_an_unreachable_network_is_diagnosed(client, monkeypatch):
    def unreachable(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    assert_fails(
        client,
        at("http://gateway.example"),
        "gateway-unreachable",
        "cannot be reached: Network is unreachable",
    )


# TLS


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture
def secure(authority):
    with HostileGateway(context=server_context(authority)) as gateway:
        yield gateway


@pytest.mark.parametrize("mode", ["well", "hang", "close"])
def test_https_to_a_plain_http_port_is_diagnosed(client, hostile, mode):
    """A server that waits for the end of a line, or closes, gives no evidence of that."""
    hostile.mode = mode
    gateway = at(hostile.url.replace("http", "https"))
    if mode == "well":
        assert_fails(
            client, gateway, "gateway-tls", "does not speak TLS; use http:// in gateway_url"
        )
    else:
        assert not client.check(gateway).reachable


def test_https_to_another_protocol_is_diagnosed(client, hostile):
    hostile.mode = "garbage"
    assert_fails(
        client, at(hostile.url.replace("http", "https")), "gateway-tls", "does not speak TLS"
    )


def test_http_to_a_tls_port_is_diagnosed(client, secure):
    assert_fails(
        client,
        at(secure.url.replace("https", "http")),
        "gateway-tls",
        "speaks TLS; use https:// in gateway_url",
    )


def test_a_certificate_is_trusted_by_its_ca_or_without_validation(client, secure, trusted):
    assert client.check(at(secure.url, ca_certs=trusted)).reachable
    assert client.check(at(secure.url, validate_cert=False)).reachable
    assert_fails(
        client, at(secure.url), "gateway-tls", "certificate that is not trusted", "gateway_ca_certs"
    )


def test_a_certificate_for_another_host_is_not_trusted(client, secure, trusted):
    gateway = at(secure.url.replace("127.0.0.1", "localhost"), ca_certs=trusted)
    assert_fails(client, gateway, "gateway-tls", "certificate that is not trusted")


def test_a_client_certificate_is_sent(client, authority, trusted, tmp_path):
    mine = authority.issue_cert("me.example")
    cert, key = tmp_path / "me.pem", tmp_path / "me.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in mine.cert_chain_pems))
    mine.private_key_pem.write_to_path(key)
    with HostileGateway(context=server_context(authority, wants_client=True)) as gateway:
        shown = at(gateway.url, ca_certs=trusted, client_cert=str(cert), client_key=str(key))
        assert client.check(shown).reachable
        assert_fails(
            client, at(gateway.url, ca_certs=trusted), "gateway-tls", "check gateway_client_cert"
        )


def test_a_missing_ca_file_is_diagnosed(client, secure, tmp_path):
    assert_fails(
        client, at(secure.url, ca_certs=str(tmp_path / "gone")), "gateway-tls", "gateway_ca_certs"
    )


@pytest.mark.parametrize("field", ["ca_certs", "client_cert"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_certificate_file_replaced_by_something_else_does_not_block_the_check(
    client, secure, tmp_path, field, make
):
    """A pipe without a writer, and an endless device."""
    path = tmp_path / "file.pem"
    make(path)
    assert_fails(
        client,
        at(secure.url, **{field: str(path)}),
        "gateway-tls",
        "its files cannot be read: it is not a regular file",
    )


@pytest.mark.root
def test_a_key_that_the_servers_user_cannot_read_is_not_used(client, authority, trusted, tmp_path):
    cert = tmp_path / "me.pem"
    authority.issue_cert("me.example").private_key_and_cert_chain_pem.write_to_path(cert)
    with HostileGateway(context=server_context(authority, wants_client=True)) as gateway:
        plain = at(gateway.url, ca_certs=trusted, client_cert=str(cert))
        others = ServerSpec(
            ServerName("a"), "/", gateway=plain, user=pwd.getpwuid(65534).pw_name
        ).gateway
        cert.chmod(0o600)
        assert client.check(plain).reachable
        assert_fails(client, others, "gateway-tls", "may not read it")
        os.chown(cert, 65534, 65534)
        assert client.check(others).reachable


def test_an_invalid_ca_file_is_diagnosed(client, secure, tmp_path):
    (tmp_path / "none.pem").write_text("nothing")
    assert_fails(
        client,
        at(secure.url, ca_certs=str(tmp_path / "none.pem")),
        "gateway-tls",
        "gateway_ca_certs",
    )


def test_a_tls_port_that_responds_to_plain_http_with_400_is_diagnosed(client, authority):
    """As nginx does."""

    class Polite(ssl.SSLContext):
        def wrap_socket(self, sock, *args, **options):
            if sock.recv(1, 2) != b"\x16":  # MSG_PEEK; 22 begins a handshake
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                raise OSError("no TLS")
            return super().wrap_socket(sock, *args, **options)

    context = Polite(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with HostileGateway(context=context) as gateway:
        assert_fails(
            client, at(gateway.url.replace("https", "http")), "gateway-tls", "use https://"
        )


# Requests


def test_path_token_and_headers_equal_those_that_jupyter_sends(client, hostile):
    gateway = at(
        f"{hostile.url}/deep/below/",
        auth_token="secret",
        auth_scheme="Bearer",
        headers={"X-Team": "blue"},
    )
    assert client.check(gateway).reachable
    client.check(at(hostile.url, auth_token="other", headers={"authorization": "overruled"}))
    client.check(at(hostile.url, headers={"X-Team": "red"}))
    first, second, third = hostile.asked
    assert (first.method, first.path) == ("GET", "/deep/below/api/kernelspecs")
    assert (first.headers["authorization"], first.headers["x-team"]) == ("Bearer secret", "blue")
    assert second.path == "/api/kernelspecs"
    assert second.headers["authorization"] == "token other"
    assert "authorization" not in third.headers
    assert third.headers["x-team"] == "red"


def test_a_header_that_cannot_be_sent_is_reported_without_its_value(client, hostile):
    gateway = at(hostile.url, headers={"X-Name": "Žofie"})
    assert_fails(
        client,
        gateway,
        "gateway-unreachable",
        "check gateway_url, gateway_auth_token and gateway_headers",
    )
    assert "017d" not in client.check(gateway).error.message


# Kernels


STATUSES = {"500": "it answered 500", "401": "it answered 401", "redirect": "it answered 302"}


def test_has_kernel(client, hostile):
    hostile.kernels["k1"] = {}
    assert client.has_kernel(at(hostile.url), "k1")
    assert not client.has_kernel(at(hostile.url), "k2")


@pytest.mark.parametrize("mode", STATUSES)
def test_has_kernel_raises_if_the_response_is_inconclusive(client, hostile, mode):
    hostile.mode = mode
    with pytest.raises(BackendUnavailable, match=f"about kernel k1: {STATUSES[mode]}"):
        client.has_kernel(at(hostile.url), "k1")


def test_ending_a_kernel_is_idempotent(client, hostile):
    hostile.kernels["k1"] = {}
    client.end_kernel(at(f"{hostile.url}/prefix"), "k1")
    assert not hostile.kernels
    client.end_kernel(at(hostile.url), "k1")
    assert [(asked.method, asked.path) for asked in hostile.asked] == [
        ("DELETE", "/prefix/api/kernels/k1"),
        ("DELETE", "/api/kernels/k1"),
    ]


@pytest.mark.parametrize("mode", STATUSES)
def test_a_kernel_that_cannot_be_ended_raises(client, hostile, mode):
    hostile.on_delete = mode
    with pytest.raises(
        BackendUnavailable,
        match=f"cannot end kernel k1 on the gateway {hostile.url}: {STATUSES[mode]}",
    ):
        client.end_kernel(at(hostile.url), "k1")


@pytest.mark.parametrize("mode", ["die", "close", "garbage", "hang"])
def test_ending_a_kernel_without_a_response_raises(client, hostile, mode, monkeypatch):
    monkeypatch.setattr("labkeeper.gateways.client._DELETE_WITHIN", TIMEOUT)
    hostile.on_delete = hostile.mode = mode
    with pytest.raises(BackendUnavailable, match=r"cannot ask the gateway .* about kernel k1: ."):
        client.end_kernel(at(hostile.url), "k1")


def test_every_gateway_failure_class_is_tested():
    met = {kind for kind, _ in CHECKS.values()} | {"gateway-tls"}
    assert met == {kind.value for kind in FailureClass if "gateway" in kind.value}
