"""A real browser works in Labs at the public address, whatever ends behind it."""

from __future__ import annotations

import random
import sys

import pytest

from certificates import Authority
from harness import alive, edges_of, until, upgrade
from pages import DOMAIN, notebook, run_cell_in_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]


LARGE = 200
"""Size of a large file in MiB."""


@pytest.fixture
def keeper(make_keeper):
    return make_keeper().start()


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def link_to(keeper, name, page=""):
    """Return a link to a file in a Lab, or to its launcher."""
    body = {"page": f"/lab/tree/{page}?reset" if page else "/lab?reset"}
    return keeper.http.post(f"/api/servers/{name}/link", json=body).json()["url"]


def open_notebook(keeper, page, code, name="lab"):
    """Open a notebook in a Lab by a link."""
    (keeper.notebook_dir / f"{name}.ipynb").write_text(notebook(code))
    page.goto(link_to(keeper, name, f"{name}.ipynb"))


SIZES = """
() => performance.getEntriesByType('resource')
    .filter(entry => new URL(entry.name).pathname.includes('/static/lab/'))
    .map(entry => [entry.transferSize, entry.encodedBodySize, entry.decodedBodySize])
"""


def test_bundles_are_loaded_compressed_and_only_once(keeper, page):
    keeper.post(name="lab")

    def load(url):
        """Return what the page's bundles took of the network, packed and unpacked."""
        page.goto(url)
        page.locator(".jp-LauncherCard").first.wait_for()
        sizes = page.evaluate(SIZES)
        assert len(sizes) > 20
        return map(sum, zip(*sizes, strict=True))

    body = {"page": "/lab?reset"}
    link = keeper.http.post("/api/servers/lab/link", json=body).json()["url"]
    took, packed, unpacked = load(link)
    assert packed <= took < unpacked / 3
    took, _, again = load(f"{keeper.url}/servers/lab/lab?reset")
    assert (took, again) == (0, unpacked)


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


TWICE = """
import os, time
for go in ('first', 'second'):
    while not os.path.exists(go): time.sleep(0.01)
    print(go, 'time')
"""


def saves(answer):
    """Whether it is the answer to a request that saves a notebook."""
    return answer.request.method == "PUT" and "/api/contents/lab.ipynb" in answer.url


def test_a_cell_runs_on_when_the_edge_is_upgraded(keeper, page, tmp_path):
    """The older edge keeps its websockets (see e2e); all else goes to the newer one."""
    keeper.post(name="lab")
    open_notebook(keeper, page, TWICE)
    # A cell that is run earlier asks for a kernel, and the notebook gets another one.
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for()
    (keeper.notebook_dir / "first").touch()
    until(lambda: run_cell_in_page(page, "first time"), what="the output before the upgrade")
    (old,) = edges_of(keeper)
    upgrade(keeper, tmp_path / "newer")
    (new,) = set(edges_of(keeper)) - {old}
    # The older one has closed the connections that it could be saved with.
    with page.expect_response(saves) as saved:
        page.keyboard.press("Control+S")
    assert saved.value.status == 200
    (keeper.notebook_dir / "second").touch()
    page.locator(".jp-OutputArea-output").get_by_text("second time").wait_for()
    assert page.locator(".jp-Dialog").count() == 0
    # New pages go to the newer one.
    other = page.context.new_page()
    other.goto(f"{keeper.url}/servers/lab/lab")
    page.close()
    until(lambda: not alive(old.pid), what="the older edge to end")
    assert alive(new.pid)
    assert other.evaluate(FETCH, "/servers/lab/api/status") == 200


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


def test_large_files_are_uploaded_and_downloaded(keeper, page, tmp_path):
    keeper.post(name="lab")
    page.goto(link_to(keeper, "lab"))
    content = random.Random(0).randbytes(2**20) * LARGE
    (tmp_path / "large.bin").write_bytes(content)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload Files").click()
    chooser.value.set_files(tmp_path / "large.bin")
    arrived = keeper.notebook_dir / "large.bin"
    page.get_by_role("button", name="Upload", exact=True).click()
    until(lambda: arrived.exists() and arrived.stat().st_size == len(content), what="the upload")
    assert arrived.read_bytes() == content
    page.locator(".jp-DirListing-item", has_text="large.bin").click(button="right")
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Download", exact=True).click()
    assert download.value.path().read_bytes() == content


def test_a_terminal_runs_what_is_typed(keeper, page):
    keeper.post(name="lab")
    page.goto(link_to(keeper, "lab"))
    page.locator(".jp-LauncherCard[title='Start a new terminal session']").click()
    page.locator(".jp-Terminal .xterm-screen").click()
    typed = keeper.notebook_dir / "typed"
    page.keyboard.type("echo $((6 * 7)) > typed\n")
    until(lambda: typed.exists() and typed.read_text() == "42\n", what="what the terminal writes")


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
    keeper = make_keeper(lab_domain=DOMAIN).start()
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


def test_a_visit_wakes_a_lab_that_sleeps(make_keeper, page):
    """At the same address, with the same session; and nothing sleeps while the page is open."""
    quick = {"sleep_after": "1s", "cull_period": 0.2, "cull_grace": 0, "cull_warning": 0.2}
    keeper = make_keeper(**quick | {"cull_period": "366d"}).start()
    keeper.post(name="lab")
    (keeper.notebook_dir / "notes.txt").write_text("remember the milk")
    page.goto(link_to(keeper, "lab", "notes.txt"))
    page.get_by_text("remember the milk").wait_for()
    held = keeper.http.get("/api/servers/lab/idle").json()["held_by"]
    assert [holder["kind"] for holder in held] == ["visitor"]
    (session,) = page.context.cookies([f"{keeper.url}/servers/lab/"])[:1]
    address = page.url
    page.goto("about:blank")
    keeper.kill()
    keeper.settings |= quick
    keeper.start()
    assert keeper.wait_for("stopped", "lab")["stopped_by"]["actor"] == "culler"
    keeper.kill()
    keeper.settings["cull_period"] = "366d"
    keeper.start()
    page.goto(address)
    page.get_by_text("remember the milk").wait_for()
    assert page.url.partition("?")[0] == address.partition("?")[0]
    assert session in page.context.cookies([f"{keeper.url}/servers/lab/"])
    assert keeper.get("lab")["generation"] == 2


def test_a_stopped_lab_has_a_button_that_starts_it(keeper, page):
    keeper.post(name="lab")
    (keeper.notebook_dir / "notes.txt").write_text("remember the milk")
    page.goto(link_to(keeper, "lab", "notes.txt"))
    page.get_by_text("remember the milk").wait_for()
    keeper.http.post("/api/servers/lab/stop")
    page.goto(f"{keeper.url}/servers/lab/lab/tree/notes.txt?reset")
    page.get_by_text("It was stopped by token:owner.").wait_for()
    page.get_by_role("button", name="Start").click()
    page.get_by_text("remember the milk").wait_for()
    assert page.url.startswith(f"{keeper.url}/servers/lab/lab/tree/notes.txt")


def test_over_tls_no_other_lab_can_sign_a_browser_out(make_keeper, authority, page):
    """Without TLS, a second cookie is enough for that. A browser refuses one with this prefix."""
    files = authority.issue(f"*.{DOMAIN}", DOMAIN, "127.0.0.1")
    keeper = make_keeper(lab_domain=DOMAIN, **files)
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


def sign_in(keeper, page):
    """Sign the browser in at the bare host by a link."""
    page.goto(keeper.cli("dashboard", "--print").stdout.strip())
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Servers", exact=True).wait_for()


def test_a_browser_that_is_signed_in_lands_in_each_lab_and_can_sign_out(make_keeper, page):
    keeper = make_keeper(lab_domain=DOMAIN).start()
    home = f"http://{DOMAIN}:{keeper.port}"
    sites = {name: f"http://{name}.{DOMAIN}:{keeper.port}" for name in ("ada", "bob")}
    sign_in(keeper, page)
    assert page.url == f"{home}/dashboard/"
    for name, site in sites.items():
        keeper.post(name=name)
        (keeper.notebook_dir / f"{name}.ipynb").write_text(notebook("print(6 * 7)"))
        page.goto(f"{site}/lab/tree/{name}.ipynb?reset")
        until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
        assert page.url.startswith(f"{site}/lab/tree/{name}.ipynb")
    # A notebook's page gets nothing of what the browser may do at the bare host.
    asked = f"{home}/session/lab?lab=ada&page=lab&nonce={'0' * 64}"
    for other in (f"{home}/dashboard/", asked, f"{home}/api/servers", f"{sites['ada']}/lab"):
        assert page.evaluate(FETCH, other) == "TypeError"
    assert page.evaluate(FRAME, f"{home}/dashboard/") == "hidden"
    assert "labkeeper" not in page.evaluate("document.cookie")
    assert len(keeper.http.get("/api/sessions").json()["sessions"]) == 3
    page.goto(f"{sites['bob']}/logout")
    assert page.get_by_role("heading").inner_text() == "You are signed out"
    for site in sites.values():
        assert page.goto(f"{site}/lab").status == 401
        assert page.url.startswith(f"{home}/session/lab?")


def test_over_tls_no_lab_can_sign_a_browser_in_or_out(make_keeper, authority, page):
    keeper = make_keeper(lab_domain=DOMAIN, **authority.issue(f"*.{DOMAIN}", DOMAIN, "127.0.0.1"))
    keeper.verify = authority.context()
    keeper.start()
    page = page.context.browser.new_context(ignore_https_errors=True).new_page()
    home = f"https://{DOMAIN}:{keeper.port}"
    sites = {name: f"https://{name}.{DOMAIN}:{keeper.port}" for name in ("ada", "bob")}
    for name in sites:
        keeper.post(name=name)
    sign_in(keeper, page)
    for site in sites.values():
        page.goto(f"{site}/lab?reset")
        page.locator(".jp-LauncherCard").first.wait_for()
    # The page is Bob's now.
    for name in ("labkeeper-sign-in", "labkeeper-nonce", "labkeeper-session"):
        for prefix in ("", "__Host-", "__Secure-"):
            page.evaluate(TOSS.replace("labkeeper-session", prefix + name), f"{DOMAIN}; secure")
    # Nor by the address that signs out, which another site's page can load.
    page.evaluate(
        "url => new Promise(done => { const image = new Image();"
        " image.onload = image.onerror = () => done(); image.src = url; })",
        f"{sites['ada']}/logout",
    )
    assert page.goto(f"{home}/dashboard/").status == 200
    for site in sites.values():
        assert page.goto(f"{site}/lab/tree").status == 200
        assert page.url == f"{site}/lab/tree"
