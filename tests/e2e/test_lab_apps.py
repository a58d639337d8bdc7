"""What else than Jupyter's own pages Labs have works through the edge, with a browser's session.

Language servers, documents that people edit together, and apps below jupyter-server-proxy. They run
in an environment of their own, through `LABKEEPER_JUPYTER_PYTHON`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import websocket

import environments
from certificates import DOMAIN, Resolved
from harness import PATIENCE, KeeperProcess, until

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]
APPS = Path(__file__).parents[1] / "apps"
LARGE = os.urandom(3 * 2**20)
"""Above the megabyte that many proxies allow."""


class Site:
    """A Lab, as browsers reach it at the edge."""

    def __init__(self, keeper, python):
        self.keeper = keeper
        self.python = python
        self.server = keeper.post(name="lab").json()
        assert self.server["launched_by"] == "fork", self.server
        self.url = httpx.URL(self.server["lab_url"]).join(self.server["base_url"])

    @property
    def origin(self):
        return f"http://{self.url.netloc.decode()}"

    def browse(self, user):
        """Return a browser whose user has opened a link to the Lab."""
        body = {"name": user, "scope": "manage"}
        made = self.keeper.http.post("/api/tokens", json=body).json()
        headers = {"Authorization": f"Bearer {made['token']}"}
        link = self.keeper.http.post("/api/servers/lab/link", json={}, headers=headers).json()
        browser = httpx.Client(
            transport=Resolved(), base_url=self.url, timeout=PATIENCE, follow_redirects=True
        )
        page = browser.get(link["url"], headers={"Sec-Fetch-Mode": "navigate"})
        assert page.status_code == 200, page.text
        # What JupyterLab sends with each request that changes something.
        browser.headers["X-XSRFToken"] = browser.cookies["_xsrf"]
        browser.headers["Origin"] = self.origin
        return browser

    def connection(self, browser, path, origin=None):
        """Return what opens a websocket, as a page of the Lab does."""
        return {
            "url": f"ws://127.0.0.1:{self.keeper.port}{self.url.path}{path}",
            "host": self.url.netloc.decode(),
            "origin": origin or self.origin,
            "cookie": "; ".join(f"{c.name}={c.value}" for c in browser.cookies.jar),
            "timeout": PATIENCE,
        }


@pytest.fixture(scope="module", params=["path", "host"])
def site(request, tmp_path_factory):
    python = environments.create(environments.LAB_APPS) / "bin" / "python"
    settings = {"lab_domain": DOMAIN} if request.param == "host" else {}
    keeper = KeeperProcess(
        tmp_path_factory.mktemp(request.param) / "keeper",
        jupyter_python=python,
        **settings,
    )
    app = {"command": [str(python), str(APPS / "echo.py"), "{port}"]}
    keeper.configure_jupyter(f"c.ServerProxy.servers = {{'app': {app}}}")
    try:
        yield Site(keeper.start_to_fork(), python)
    finally:
        keeper.close()


@pytest.fixture
def people(site):
    """Two browsers with sessions of their own."""
    browsers = [site.browse(user) for user in ("ada", "bob")]
    yield browsers
    for browser in browsers:
        browser.close()
    for user in ("ada", "bob"):
        site.keeper.http.delete(f"/api/tokens/{user}")


@pytest.fixture
def browser(people):
    return people[0]


class LanguageClient:
    """Speaks the Language Server Protocol over a websocket of jupyter-lsp."""

    def __init__(self, opened):
        self._opened = opened
        self._ids = itertools.count()

    def tell(self, method, params):
        self._opened.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))

    def ask(self, method, params):
        id_ = next(self._ids)
        message = {"jsonrpc": "2.0", "id": id_, "method": method, "params": params}
        self._opened.send(json.dumps(message))
        while True:
            answer = json.loads(self._opened.recv())
            if answer.get("id") == id_ and "method" not in answer:
                return answer["result"]


def test_language_server_completes_code(site, browser):
    assert "pylsp" in browser.get("lsp/status").json()["specs"]
    opened = websocket.create_connection(**site.connection(browser, "lsp/ws/pylsp"))
    server = LanguageClient(opened)
    known = server.ask("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
    assert known["serverInfo"]["name"] == "pylsp"
    server.tell("initialized", {})
    document = {"uri": "file:///tmp/a.py", "languageId": "python", "version": 1}
    text = "import textwrap\ntextwrap.shor"
    server.tell("textDocument/didOpen", {"textDocument": document | {"text": text}})
    place = {"textDocument": document, "position": {"line": 1, "character": 13}}
    found = server.ask("textDocument/completion", place)["items"]
    assert "shorten" in {item["insertText"] for item in found}
    opened.close()


def test_two_people_edit_a_document_together(site, people):
    path = site.keeper.notebook_dir / "notes.txt"
    path.write_text("a shared file\n")
    connections = []
    for browser in people:
        session = browser.put(
            "api/collaboration/session/notes.txt", json={"format": "text", "type": "file"}
        )
        assert session.status_code in {200, 201}, session.text
        told = session.json()
        room = f"api/collaboration/room/text:file:{told['fileId']}?sessionId={told['sessionId']}"
        connections.append(site.connection(browser, room))
    ended = subprocess.run(
        [site.python, APPS / "editors.py"],
        input=json.dumps(connections),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    expected = "a shared file\nthe first was here\nthe second, too\n"
    assert json.loads(ended.stdout) == [expected] * 2
    until(lambda: path.read_text() == expected, what="the document to be saved")


def test_app_gets_requests_as_they_were_sent(browser):
    bodies = {"GET": b"", "POST": LARGE, "PUT": LARGE, "PATCH": b"few", "DELETE": b""}
    # Without a type, jupyter-server-proxy would declare a form.
    browser.headers["Content-Type"] = "application/octet-stream"
    for method, body in bodies.items():
        told = browser.request(method, "app/a/b?c=d%2Fe%20f", content=body).json()
        assert (told["method"], told["uri"]) == (method, "/a/b?c=d%2Fe%20f")
        assert told["sha256"] == hashlib.sha256(body).hexdigest()
    pieces = (LARGE[start : start + 2**16] for start in range(0, len(LARGE), 2**16))
    told = browser.post("app/", content=pieces).json()
    assert told["sha256"] == hashlib.sha256(LARGE).hexdigest()


def test_app_sends_events_as_they_happen(site, browser):
    """The second one is only sent once the first one has arrived."""
    accept = {"Accept": "text/event-stream"}
    with browser.stream("GET", "app/events", headers=accept) as stream:
        lines = stream.iter_lines()
        assert [next(lines), next(lines)] == ["data: first", ""]
        assert browser.post("app/events").status_code == 200
        assert [next(lines), next(lines)] == ["data: second", ""]


def test_large_messages_pass_an_apps_websocket_in_both_directions(site, browser):
    opened = websocket.create_connection(**site.connection(browser, "app/echo"))
    opened.recv()
    opened.send_binary(LARGE)
    assert opened.recv() == LARGE
    opened.send(LARGE.hex()[: len(LARGE)])
    assert opened.recv() == LARGE.hex()[: len(LARGE)]
    opened.close()


def test_app_does_not_learn_how_its_user_signed_in(site, browser):
    """Neither the session nor the signed name: with either, it could act as the user."""
    cookies = {cookie.name: cookie.value for cookie in browser.cookies.jar}
    assert set(cookies) == {"_xsrf", "labkeeper-session"}
    opened = websocket.create_connection(**site.connection(browser, "app/echo"))
    for headers in (browser.get("app/").json()["headers"], json.loads(opened.recv())):
        names = {name.lower() for name in headers}
        # Other cookies do arrive, which may be its own.
        assert f"_xsrf={cookies['_xsrf']}" in headers["Cookie"]
        assert not {"x-labkeeper-identity", "authorization"} & names
        assert cookies["labkeeper-session"] not in str(headers)
        assert site.server["token"] not in str(headers)
        assert headers["X-Forwarded-For"].split(",")[0] == "127.0.0.1"
    opened.close()


WEBSOCKETS = {
    "language server": "lsp/ws/pylsp",
    "room": "api/collaboration/room/JupyterLab:globalAwareness",
    "app": "app/echo",
}


@pytest.mark.parametrize("path", WEBSOCKETS.values(), ids=WEBSOCKETS)
def test_pages_of_other_sites_open_no_websocket(site, browser, path):
    """Not all extensions check that; and a browser sends cookies to other Labs of a domain."""
    websocket.create_connection(**site.connection(browser, path)).close()
    for other in ("http://evil.example", f"http://other.{DOMAIN}:{site.keeper.port}", "null"):
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            websocket.create_connection(**site.connection(browser, path, other)).close()
        assert refused.value.status_code == 403


def test_pages_of_other_sites_change_nothing_in_an_app(site, browser):
    """jupyter-server-proxy leaves that to the apps."""
    for other in ("http://evil.example", f"http://other.{DOMAIN}:{site.keeper.port}", "null"):
        assert browser.post("app/", headers={"Origin": other}).status_code == 403
    form = {"Sec-Fetch-Site": "same-site", "Origin": "null"}
    assert browser.post("app/", headers=form).status_code == 403


def test_without_a_session_nothing_is_there(site):
    with httpx.Client(transport=Resolved(), base_url=site.url) as nobody:
        for path in ("app/", "lsp/status", "api/collaboration/session/notes.txt"):
            assert nobody.get(path).status_code == 401
