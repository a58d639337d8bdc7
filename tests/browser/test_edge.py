"""A real browser works in Labs at the public address, whatever ends behind it."""

from __future__ import annotations

import sys

import pytest

from certificates import Authority
from harness import alive, edges_of, until
from pages import DOMAIN, notebook, run_cell_in_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]


@pytest.fixture
def keeper(make_keeper):
    return make_keeper(edge="on").start()


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def link_to(keeper, name, page):
    body = {"page": f"/lab/tree/{page}?reset"}
    return keeper.http.post(f"/api/servers/{name}/link", json=body).json()["url"]


def open_notebook(keeper, page, code, name="lab"):
    """Open a notebook in a Lab by a link."""
    (keeper.notebook_dir / f"{name}.ipynb").write_text(notebook(code))
    page.goto(link_to(keeper, name, f"{name}.ipynb"))


WAITS = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('gone on')"


def test_a_person_sees_no_token_and_can_sign_out(keeper, page):
    token = keeper.post(name="lab").json()["token"]
    requested = []
    page.on("request", lambda request: requested.append(request))  # noqa: PLW0108 - it cannot take a method
    open_notebook(keeper, page, "print(6 * 7)")
    until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
    sent = str([(request.url, request.headers) for request in requested])
    assert token not in sent + page.content()
    assert page.evaluate("document.cookie.includes('labkeeper')") is False
    assert page.url.startswith(f"{keeper.url}/servers/lab/lab/tree/lab.ipynb")
    page.goto(f"{keeper.url}/servers/lab/logout")
    assert page.get_by_role("heading").inner_text() == "You are signed out"
    assert page.goto(f"{keeper.url}/servers/lab/lab").status == 401


def test_a_notebook_notices_nothing_when_the_keeper_is_killed(keeper, page):
    keeper.post(name="lab")
    open_notebook(keeper, page, WAITS)
    busy = page.locator(".jp-Notebook-ExecutionIndicator[data-status='busy']")

    def runs():
        run_cell_in_page(page, "never printed")
        return busy.count()

    until(runs, what="the cell to run")
    closed = []
    page.on("websocket", lambda opened: closed.append(opened.url))
    keeper.kill()
    keeper.start()
    (keeper.notebook_dir / "go").touch()
    output = page.locator(".jp-OutputArea-output").get_by_text("gone on", exact=True)
    output.wait_for()
    # No websocket was opened anew.
    assert closed == []


def test_a_notebook_reconnects_by_itself_when_the_edge_is_killed(keeper, page):
    keeper.post(name="lab")
    open_notebook(keeper, page, "print(6 * 7)")
    until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
    (edge,) = edges_of(keeper)
    with page.expect_websocket():
        edge.kill()
    until(lambda: not alive(edge.pid), what="the edge to end")
    page.locator(".jp-Notebook .cm-content").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("print(6 * 8)")
    until(lambda: run_cell_in_page(page, "48"), what="the output of the cell")


FETCH = """
url => fetch(url, {credentials: 'include'}).then(answer => answer.status, error => error.name)
"""


def test_a_notebooks_page_cannot_act_on_the_keeper(keeper, page):
    """Neither at its own host name, where it would need a token, nor at the keeper's."""
    keeper.post(name="lab")
    open_notebook(keeper, page, "1")
    page.locator(".jp-Notebook").wait_for()
    assert page.evaluate(FETCH, "/api/servers") == 401
    assert page.evaluate(FETCH, f"http://localhost:{keeper.port}/api/servers") == "TypeError"
    assert page.evaluate(FETCH, "/servers/lab/api/status") == 200


def test_a_link_for_others_shows_a_button_that_opens_the_lab(keeper, page):
    keeper.post(name="lab")
    page.goto(keeper.cli("link", "lab").stdout.strip())
    page.get_by_role("button", name="Open").click()
    page.locator("#jp-main-dock-panel").wait_for()
    assert page.url == f"{keeper.url}/servers/lab/lab"


FRAME = """
url => new Promise(resolve => {
    const frame = document.createElement('iframe');
    frame.onload = () => {
        try { resolve(frame.contentDocument === null ? 'hidden' : frame.contentDocument.title); }
        catch (error) { resolve(error.name); }
    };
    frame.src = url;
    document.body.append(frame);
})
"""


TOSS = "domain => { document.cookie = `labkeeper-session=x; domain=${domain}; path=/` }"


def test_two_labs_in_one_browser_cannot_reach_each_other_or_the_keeper(make_keeper, page):
    """What notebook JavaScript tries: requests, frames, storage, cookies of its own for others."""
    keeper = make_keeper(edge="on", lab_domain=DOMAIN).start()
    sites = {name: f"http://{name}.{DOMAIN}:{keeper.port}" for name in ("ada", "bob")}
    for name, site in sites.items():
        keeper.post(name=name)
        open_notebook(keeper, page, "1", name)
        page.locator(".jp-Notebook").wait_for()
        assert page.url.startswith(site)
        assert page.evaluate(FETCH, "/api/contents") == 200
        page.evaluate("name => localStorage.setItem('secret', name)", name)
    # The page is Bob's now, and the browser has a session for Ada's Lab, too.
    for other in (f"{sites['ada']}/api/contents", f"{keeper.url}/api/servers"):
        assert page.evaluate(FETCH, other) == "TypeError"
    assert page.evaluate(FRAME, f"{sites['ada']}/lab") == "hidden"
    assert page.evaluate("localStorage.getItem('secret')") == "bob"
    assert "session" not in page.evaluate("document.cookie")
    page.evaluate(TOSS, DOMAIN)
    # Ada's Lab accepts neither of two cookies, rather than one that Bob has chosen.
    assert page.goto(f"{sites['ada']}/lab/tree").status == 401


def test_over_tls_no_other_lab_can_sign_a_browser_out(make_keeper, authority, page):
    """Without TLS, a second cookie is enough for that. A browser refuses one with this prefix."""
    files = authority.issue(f"*.{DOMAIN}", DOMAIN, "127.0.0.1")
    keeper = make_keeper(edge="on", lab_domain=DOMAIN, **files)
    keeper.verify = authority.context()
    keeper.start()
    context = page.context.browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    sites = {name: f"https://{name}.{DOMAIN}:{keeper.port}" for name in ("ada", "bob")}
    for name, site in sites.items():
        keeper.post(name=name)
        open_notebook(keeper, page, "print(6 * 7)", name)
        until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
        assert page.url.startswith(site)
    for name in ("labkeeper-session", "__Host-labkeeper-session", "__Secure-labkeeper-session"):
        page.evaluate(TOSS.replace("labkeeper-session", name), f"{DOMAIN}; secure")
    assert page.goto(f"{sites['ada']}/lab/tree").status == 200
