"""Protection of browsers: DNS rebinding, cross-origin requests, and security headers."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from fake_keeper import TOKEN, fake_keeper
from labkeeper.api.app import create_app
from labkeeper.identity.authenticators import OpenAuthenticator
from labkeeper.identity.peers import PEER, Peer

SHOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def services(tmp_path):
    with fake_keeper(tmp_path) as made:
        yield replace(
            made.services,
            hosts=["labs.example.org", "*.internal.example.org"],
            origins=["https://hub.example.org"],
        )


@pytest.fixture
def client(services):
    return create_app(services).test_client()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST.",
        "a.localhost",
        "127.0.0.1:80",
        "10.1.2.3",
        "[::1]:8000",
        "[fe80::1]",
        "keeper",
        "labs.example.org",
        "Labs.Example.Org:443",
        "a.internal.example.org",
        "a.b.internal.example.org",
    ],
)
def test_host_names_of_the_keeper_are_accepted(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example.com",
        "labs.example.org.evil.com",
        "example.org",
        "xlabs.example.org",
        "127.0.0.1.evil.com",
        "bad host",
        "a<b",
        "[zz]",
        "localhost@evil.com",
        "internal.example.org",
        "evil.com:80:80",
        "999.1.1.1",
    ],
)
def test_other_host_names_are_refused_with_any_token(client, host):
    """A page could resolve its own name to the keeper and read the response (DNS rebinding)."""
    for path in ("/healthz", "/api/servers", "/api/openapi.json", "/open/x", "/nothing"):
        answer = client.get(path, headers={"Host": host} | SHOWN)
        assert (answer.status_code, answer.json["code"]) == (421, "host_not_known")
        assert "LABKEEPER_ALLOWED_HOSTS" in answer.json["detail"]


def test_a_wildcard_allows_every_host_name(services):
    client = create_app(replace(services, hosts=["*"])).test_client()
    assert client.get("/healthz", headers={"Host": "whatever.example.com"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "https://hub.example.org.evil.com",
        "http://hub.example.org",
        "http://[",
    ],
)
def test_cross_origin_requests_are_refused(services, origin):
    """Without access control, too, where it matters: nothing is done, and nothing can be read."""
    client = create_app(replace(services, authenticators=[OpenAuthenticator()])).test_client()
    for method, path in (
        ("GET", "/api/servers"),
        ("POST", "/api/servers"),
        ("OPTIONS", "/api/servers"),
    ):
        answer = client.open(
            path, method=method, headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        )
        assert (answer.status_code, answer.json["code"]) == (403, "not_allowed")
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert client.get("/api/servers").json["servers"] == []


def test_same_origin_requests_are_accepted(client):
    assert (
        client.get(
            "/api/servers", headers=SHOWN | {"Origin": "http://localhost", "Host": "localhost"}
        ).status_code
        == 200
    )


def test_an_allowed_origin_may_send_cors_requests(client):
    origin = {"Origin": "https://hub.example.org"}
    asked = client.options(
        "/api/servers", headers=origin | {"Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 204
    assert asked.headers["Access-Control-Allow-Origin"] == "https://hub.example.org"
    assert "Authorization" in asked.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in asked.headers
    made = client.post("/api/servers", json={}, headers=origin | SHOWN)
    assert made.status_code == 201
    assert made.headers["Access-Control-Allow-Origin"] == "https://hub.example.org"
    assert made.headers["Access-Control-Expose-Headers"] == "Location, Retry-After, X-Request-Id"
    assert "Origin" in made.headers["Vary"]
    assert client.post("/api/servers", json={}, headers=origin).status_code == 401


def test_without_allowed_origins_there_are_no_cors_headers(services):
    answer = create_app(replace(services, origins=())).test_client().get("/healthz")
    assert not {"Vary", "Access-Control-Allow-Origin"} & set(answer.headers.keys())


def test_the_unix_socket_accepts_any_host_name(client):
    overrides = {PEER: Peer(1, 0, 0)}
    assert (
        client.get(
            "/healthz", headers={"Host": "whatever.example.com"}, environ_overrides=overrides
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    "path", ["/healthz", "/api/servers", "/api/docs", "/api/openapi.json", "/nothing", "/open/x"]
)
def test_every_response_has_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Set-Cookie" not in headers


def test_the_csp_of_the_api_documentation_allows_its_one_script(client):
    page = client.get("/api/docs")
    (script,) = re.findall(r"<script>(.+?)</script>", page.text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in page.headers["Content-Security-Policy"]
