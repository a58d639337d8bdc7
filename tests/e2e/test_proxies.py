"""nginx, Caddy and Traefik in front of the edge, configured as the documentation says."""

from __future__ import annotations

import sys

import httpx
import pytest
import websocket

from certificates import DOMAIN, Authority, Resolved
from edges import edge_in
from harness import PATIENCE, execute
from labkeeper.edge.forwarded import networks
from proxies import PROXIES, running

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]
PAGE = {"Accept": "text/html,*/*", "Sec-Fetch-Mode": "navigate"}
MARKS = {"nginx": [pytest.mark.programs("nginx")]}
ELSEWHERE = "127.0.0.2"
"""A client's address, which is not that of the proxy."""


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in PROXIES])
def proxy(request):
    return request.param


@pytest.fixture
def authority(tmp_path, monkeypatch):
    directory = tmp_path / "proxy"
    directory.mkdir()
    made = Authority(directory)
    monkeypatch.setenv("WEBSOCKET_CLIENT_CA_BUNDLE", str(made.file))
    return made


@pytest.fixture
def client(authority):
    transport = Resolved(verify=authority.context(), local_address=ELSEWHERE)
    with httpx.Client(transport=transport, follow_redirects=True, timeout=PATIENCE) as made:
        yield made


def test_edge_learns_the_clients_address_and_scheme(proxy, tmp_path, authority, client):
    """Whatever the client itself says about that."""
    with edge_in(tmp_path) as edge:
        edge.start_keeper()
        edge.proxy.trusted = networks(["127.0.0.1"])
        forged = {
            "X-Forwarded-For": "1.2.3.4",
            "X-Forwarded-Proto": "http",
            "X-Forwarded-Host": "evil.example",
            "Forwarded": "for=1.2.3.4;proto=http",
            "X-Real-IP": "1.2.3.4",
        }
        with running(proxy, authority, edge.address[1]) as port:
            for headers in ({}, forged):
                url = f"https://lab.{DOMAIN}:{port}/"
                assert client.get(url, headers=headers).text == "ok"
            # Its connections to the edge end before the edge does.
            client.close()
        for head in edge.keeper.heads:
            told = dict(head.headers)
            assert told[b"x-forwarded-for"] == ELSEWHERE.encode()
            assert told[b"x-forwarded-proto"] == b"https"
            assert told[b"host"] == f"lab.{DOMAIN}:{port}".encode()
            assert b"1.2.3.4" not in str(head.headers).encode()
            assert b"evil" not in str(head.headers).encode()
        assert len(edge.keeper.heads) == 2


def test_lab_works_through_a_proxy(proxy, make_keeper, authority, client):
    """A link, the session's cookie, pages, kernels, and a large upload and download."""
    keeper = make_keeper(lab_domain=DOMAIN, trusted_proxies="127.0.0.1").start()
    keeper.post(name="lab")
    with running(proxy, authority, keeper.port) as port:
        site = f"https://lab.{DOMAIN}:{port}"
        api = {"Authorization": f"Bearer {keeper.token}"}
        url = f"https://{DOMAIN}:{port}/api/servers/lab"
        assert client.get(url, headers=api).json()["lab_url"] == f"{site}/lab"
        link = client.post(f"{url}/link", headers=api, json={}).json()["url"]
        page = client.get(link, headers=PAGE)
        assert (page.status_code, str(page.url)) == (200, f"{site}/lab")
        assert "strict-transport-security" not in page.headers
        (cookie,) = [c for c in client.cookies.jar if "session" in c.name]
        assert (cookie.name, cookie.secure) == ("__Host-labkeeper-session", True)
        xsrf = {"X-XSRFToken": client.cookies["_xsrf"], "Origin": site}
        content = bytes(range(256)) * 2**18
        sent = {"type": "file", "format": "text", "content": content.hex()}
        path = f"{site}/api/contents/large.txt"
        assert client.put(path, headers=xsrf, json=sent).status_code == 201
        # Jupyter wants to know from which page a file is loaded.
        loaded = client.get(f"{site}/files/large.txt", headers={"Referer": f"{site}/lab"})
        assert loaded.text == content.hex()
        made = client.post(f"{site}/api/kernels", json={"name": "python3"}, headers=xsrf)
        opened = websocket.create_connection(
            f"wss://127.0.0.1:{port}/api/kernels/{made.json()['id']}/channels",
            host=f"lab.{DOMAIN}:{port}",
            sslopt={"server_hostname": f"lab.{DOMAIN}"},
            cookie="; ".join(f"{cookie.name}={cookie.value}" for cookie in client.cookies.jar),
            origin=site,
            timeout=PATIENCE,
        )
        assert execute(opened, "6 * 7") == "42"
        opened.close()
        # A session that began over TLS is none without.
        headers = {"Host": f"lab.{DOMAIN}:{keeper.port}"}
        direct = {"Cookie": f"{cookie.name}={cookie.value}"} | headers
        reply = httpx.get(f"{keeper.url}/api/me", headers=direct, trust_env=False)
        assert reply.status_code == 401


def test_trusted_proxies_change_with_the_keeper(make_keeper):
    keeper = make_keeper().start()
    said = {"X-Forwarded-Proto": "https"}
    keeper.post(name="lab")

    def scheme():
        keeper.wait_for("running", "lab")
        found = keeper.http.get("/api/servers/lab", headers=said).json()["lab_url"]
        return found.partition(":")[0]

    assert scheme() == "http"
    keeper.kill()
    keeper.settings["trusted_proxies"] = "10.0.0.0/8, 127.0.0.1"
    keeper.start()
    assert scheme() == "https"
    bad = make_keeper(trusted_proxies="127.0.0.1/8").cli("serve")
    assert (bad.returncode, "LABKEEPER_TRUSTED_PROXIES" in bad.stderr) == (2, True)
