"""A real browser opens a Lab by its link and the API docs, and attacks from another site."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading

import pytest
from playwright import sync_api

from harness import PATIENCE, until

REBOUND = "rebound.example.org"
"""A host name that resolves to this machine, in the browser only."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
]
"""Root needs the first; the others stop the browser's own network requests."""

pytestmark = pytest.mark.browser


@pytest.fixture
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        context = browser.new_context()
        context.set_default_timeout(PATIENCE * 1000)
        yield context.new_page()
        browser.close()


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


def notebook(code):
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": code,
    }
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": spec, "cells": [cell]})


def run_cell_in_page(page, output):
    """Run the first cell, and return whether it shows that output.

    The Lab ignores the request until it is connected. On a busy machine it may open a dialog
    first, such as for the choice of a kernel, which is accepted.
    """
    question = page.locator(".jp-Dialog .jp-mod-accept")
    with contextlib.suppress(sync_api.TimeoutError):
        if question.count():
            question.first.click(timeout=2000)
        page.locator(".jp-Notebook .cm-content").first.click(timeout=2000)
        page.keyboard.press("Control+Enter")
        page.locator(".jp-OutputArea-output").get_by_text(output, exact=True).wait_for(timeout=2000)
        return True
    return False


def test_link_leads_to_a_running_cell_without_exposing_the_token(keeper, page):
    """The token is in one request only: not in the page, its history, or the browser's storage."""
    (keeper.notebook_dir / "sum.ipynb").write_text(notebook("print(6 * 7)"))
    token = keeper.post().json()["token"]
    link = keeper.post("/default/link", page="/lab/tree/sum.ipynb?reset").json()["url"]
    shown, requested, referred = [], [], []
    page.on("framenavigated", lambda frame: shown.append(frame.url))
    page.on("request", lambda request: requested.append(request.url))
    page.on("request", lambda request: referred.append(request.headers.get("referer", "")))
    page.goto(link)
    until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
    assert [url for url in requested if token in url] == [
        url for url in requested if "/login?" in url
    ]
    assert sum(token in url for url in requested) == 1
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
