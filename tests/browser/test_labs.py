"""A real browser opens a Lab by its link and the API docs, and attacks from another site."""

from __future__ import annotations

import contextlib
import http.server
import threading

import pytest

from harness import until
from pages import REBOUND, notebook, run_cell_in_page

pytestmark = pytest.mark.browser


@contextlib.contextmanager
def serve_another_site():
    """Serve an empty page on its own port, which makes it another site."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_link_leads_to_a_running_cell_without_exposing_the_token(keeper, page):
    """The browser never has the token, and the link is in no page, history or Referer."""
    (keeper.notebook_dir / "sum.ipynb").write_text(notebook("print(6 * 7)"))
    token = keeper.post().json()["token"]
    link = keeper.post("/default/link", page="/lab/tree/sum.ipynb?reset").json()["url"]
    shown, requested, referred = [], [], []
    page.on("framenavigated", lambda frame: shown.append(frame.url))
    page.on("request", lambda request: requested.append(request.url))
    page.on("request", lambda request: referred.append(request.headers.get("referer", "")))
    page.goto(link)
    until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
    assert not [url for url in requested if token in url]
    assert requested.count(link) == 1
    assert not [url for url in (*shown, *referred) if token in url or link in url]
    kept = (
        "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage},"
        " performance.getEntries(), location.href])"
    )
    for content in (page.content(), page.evaluate(kept)):
        assert token not in content
    assert page.goto(link).status == 410
    assert page.get_by_role("heading").inner_text() == "This link opens nothing any more"


def test_api_docs_page_renders_under_its_content_security_policy(keeper, page):
    errors = []
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.goto(f"{keeper.url}/api/docs")
    page.locator(".opblock-summary-path").get_by_text("/api/servers/{name}/link").wait_for()
    assert errors == []


FETCH = "url => fetch(url, {method: 'POST'}).then(answer => answer.status, error => error.name)"


def test_pages_of_other_sites_are_refused_even_without_access_control(make_keeper, page):
    """Cross-site requests and DNS rebinding fail; requests of the keeper's own page succeed."""
    keeper = make_keeper(auth="none").start()
    servers = f"{keeper.url}/api/servers?wait=0"
    with serve_another_site() as elsewhere:
        page.goto(elsewhere)
        assert page.evaluate(FETCH, servers) == "TypeError"
    assert page.goto(f"http://{REBOUND}:{keeper.port}/api/servers").status == 421
    assert keeper.http.get("/api/servers").json()["servers"] == []
    page.goto(f"{keeper.url}/api/docs")
    assert page.evaluate(FETCH, servers) == 202
