"""Browser sessions at the edge: who may use a Lab, as whom, and until when."""

from __future__ import annotations

import functools
import os
import pwd
import sys

import httpx
import pytest
import websocket

from certificates import Resolved
from harness import PATIENCE, edges_of, execute, kernel_websocket, start_kernel, until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]
PAGE = {"Accept": "text/html,*/*", "Sec-Fetch-Mode": "navigate"}
"""What browsers send when a person goes to a page."""


@pytest.fixture
def keeper(make_keeper):
    return make_keeper().start()


@pytest.fixture
def browse(keeper):
    """Make browsers, as far as cookies go."""
    made = []

    def make():
        browser = httpx.Client(
            base_url=keeper.url, trust_env=False, timeout=PATIENCE, follow_redirects=True
        )
        made.append(browser)
        return browser

    yield make
    for browser in made:
        browser.close()


def link_to(keeper, name, **body):
    answer = keeper.http.post(f"/api/servers/{name}/link", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["url"]


def link_by_ada(keeper, **token):
    """Return a link to the Lab that was made with a token named `ada`, and the token."""
    body = {"name": "ada", "scope": "manage"} | token
    made = keeper.http.post("/api/tokens", json=body).json()
    headers = {"Authorization": f"Bearer {made['token']}"}
    url = f"{keeper.url}/api/servers/lab/link"
    link = httpx.post(url, headers=headers, json={}, trust_env=False).json()["url"]
    return link, made


def signed_in(keeper, browse, name, **body):
    """Return a browser that has opened a link to a Lab."""
    browser = browse()
    page = browser.get(link_to(keeper, name, **body), headers=PAGE)
    assert page.status_code == 200, page.text
    assert page.url.path == f"/servers/{name}/lab"
    return browser


def xsrf_of(browser, site=None):
    """Return the header by which JupyterLab proves that a request is its own."""
    domain = None if site is None else httpx.URL(site).host
    return {"X-XSRFToken": browser.cookies.get("_xsrf", domain=domain)}


def open_kernel(keeper, browser, name):
    """Open a websocket to a new kernel, as the page of a Lab does."""
    answer = browser.post(
        f"/servers/{name}/api/kernels", json={"name": "python3"}, headers=xsrf_of(browser)
    )
    assert answer.status_code == 201, answer.text
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in browser.cookies.jar)
    return websocket.create_connection(
        f"{keeper.url}/servers/{name}/api/kernels/{answer.json()['id']}/channels".replace(
            "http", "ws"
        ),
        cookie=cookies,
        origin=keeper.url,
        timeout=PATIENCE,
    )


def is_closed(opened):
    """Receive a message, or return whether the connection was closed."""
    try:
        opened.recv()
    except (websocket.WebSocketConnectionClosedException, ConnectionError):
        return True
    return False


@pytest.mark.promise
def test_link_lets_a_browser_in_without_any_token(keeper, browse):
    server = keeper.post(name="lab").json()
    browser = browse()
    page = browser.get(link_to(keeper, "lab"), headers=PAGE)
    assert page.url == f"{keeper.url}/servers/lab/lab"
    assert server["token"] not in page.text
    seen = [(answer.request.url, answer.headers) for answer in (*page.history, page)]
    assert server["token"] not in str(seen)
    (cookie,) = [c for c in browser.cookies.jar if c.name == "labkeeper-session"]
    assert cookie.path == "/servers/lab/"
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"
    opened = open_kernel(keeper, browser, "lab")
    assert execute(opened, "6 * 7") == "42"
    opened.close()


def test_the_lab_knows_who_uses_it(keeper, browse):
    """By the token that the link was made with; the owner's token has no other name."""
    keeper.post(name="lab")
    link, _ = link_by_ada(keeper)
    browser = browse()
    browser.get(link, headers=PAGE)
    identity = browser.get("/servers/lab/api/me").json()["identity"]
    assert (identity["username"], identity["initials"]) == ("ada", "AD")
    assert identity["color"].startswith("var(--jp-collaborator-color")
    owner = signed_in(keeper, browse, "lab").get("/servers/lab/api/me").json()["identity"]
    assert owner["username"] == "owner"


def test_a_forged_identity_is_removed(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    forged = {"X-Labkeeper-Identity": "e30.abc", "x-labkeeper-identity": "e30.def"}
    identity = browser.get("/servers/lab/api/me", headers=forged).json()["identity"]
    assert identity["username"] == "owner"
    server = keeper.get("lab")
    # Nor does the server itself believe it, at its own port.
    direct = httpx.get(f"{server['url']}api/me", headers=forged, trust_env=False)
    assert direct.status_code == 403


def test_jupyters_checks_of_forged_requests_stay_on(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    path = "/servers/lab/api/kernels"
    assert browser.post(path, json={"name": "python3"}).status_code == 403
    other_site = xsrf_of(browser) | {"Origin": "http://evil.example"}
    # Jupyter's answer to a request of another site; the edge refuses those that change something.
    assert browser.get(path, headers=other_site).status_code == 404
    assert browser.post(path, json={"name": "python3"}, headers=other_site).status_code == 403
    assert browser.get(path).json() == []


@pytest.mark.promise
def test_without_a_session_a_page_says_so_and_nothing_else(keeper, browse):
    """The page is the same whether or not there is such a server."""
    keeper.post(name="lab")
    there = browse().get("/servers/lab/lab/tree", headers=PAGE)
    missing = browse().get("/servers/none/lab/tree", headers=PAGE)
    assert (there.status_code, missing.status_code) == (401, 401)
    assert there.text.replace("open lab`", "open none`") == missing.text
    assert "You are not signed in" in there.text
    for path in ("api", "api/kernels", "lab/api/settings", "static/lab/x.js"):
        refused = browse().get(f"/servers/lab/{path}")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), path


def test_a_session_is_for_one_lab(keeper, browse):
    keeper.post(name="lab")
    keeper.post(name="other")
    browser = signed_in(keeper, browse, "lab")
    cookie = browser.cookies["labkeeper-session"]
    headers = {"Cookie": f"labkeeper-session={cookie}"}
    assert browse().get("/servers/lab/api/me", headers=headers).status_code == 200
    assert browse().get("/servers/other/api/me", headers=headers).status_code == 401
    assert browse().get("/api/servers", headers=headers).status_code == 401


def test_two_session_cookies_are_none(keeper, browse):
    """A page of the same host could set another one, to make a browser use its own session."""
    keeper.post(name="lab")
    cookie = signed_in(keeper, browse, "lab").cookies["labkeeper-session"]
    headers = {"Cookie": f"labkeeper-session=x; labkeeper-session={cookie}"}
    assert browse().get("/servers/lab/api/me", headers=headers).status_code == 401
    assert browse().get("/servers/lab/lab", headers=headers | PAGE).status_code == 401


def test_programs_use_the_servers_token(keeper):
    server = keeper.post(name="lab").json()
    lab = server | {"url": f"{keeper.url}/servers/lab/"}
    with kernel_websocket(lab, start_kernel(lab)) as opened:
        assert execute(opened, "1 + 1") == "2"
    wrong = httpx.get(
        f"{lab['url']}api/kernels", headers={"Authorization": "token x"}, trust_env=False
    )
    assert wrong.status_code == 403


@pytest.mark.promise
def test_a_link_for_others_is_not_used_up_by_who_only_follows_it(keeper, browse):
    keeper.post(name="lab")
    link = keeper.cli("link", "lab").stdout.strip()
    for _ in range(3):
        shown = browse().get(link, headers=PAGE)
        assert shown.status_code == 200
        assert "<button" in shown.text
    browser = browse()
    opened = browser.post(link, headers=PAGE | {"Origin": keeper.url})
    assert opened.url.path == "/servers/lab/lab"
    assert browse().post(link, headers=PAGE).status_code == 410


@pytest.mark.promise
def test_a_revoked_session_is_shut_out_at_once(keeper, browse):
    keeper.post(name="lab")
    browser, other = (signed_in(keeper, browse, "lab") for _ in range(2))
    opened, stays = (open_kernel(keeper, one, "lab") for one in (browser, other))
    listed = keeper.http.get("/api/sessions").json()["sessions"]
    assert [(s["server"], s["actor"]) for s in listed] == [("lab", "token:owner")] * 2
    assert keeper.cli("session", "revoke", listed[0]["id"]).returncode == 0
    until(lambda: is_closed(opened), what="the websocket to be closed")
    assert browser.get("/servers/lab/api/me").status_code == 401
    assert execute(stays, "1 + 1") == "2"
    assert other.get("/servers/lab/api/me").status_code == 200
    stays.close()
    again = keeper.http.delete(f"/api/sessions/{listed[0]['id']}")
    assert (again.status_code, again.json()["code"]) == (404, "session_not_found")


def test_revoking_a_token_ends_the_sessions_of_its_links(keeper, browse):
    keeper.post(name="lab")
    link, _ = link_by_ada(keeper)
    browser = browse()
    browser.get(link, headers=PAGE)
    other = signed_in(keeper, browse, "lab")
    assert keeper.http.delete("/api/tokens/ada").status_code == 200
    assert browser.get("/servers/lab/api/me").status_code == 401
    assert other.get("/servers/lab/api/me").status_code == 200


def test_a_session_expires_with_the_token_that_made_its_link(keeper, browse):
    keeper.post(name="lab")
    link, made = link_by_ada(keeper, expires_in="1h")
    browse().get(link, headers=PAGE)
    (session,) = keeper.http.get("/api/sessions").json()["sessions"]
    assert session["expires_at"] == made["expires_at"]


@pytest.mark.promise
def test_logging_out_in_the_lab_ends_the_session(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    page = browser.get("/servers/lab/logout", headers=PAGE)
    assert "You are signed out" in page.text
    assert keeper.http.get("/api/sessions").json()["sessions"] == []
    assert browser.get("/servers/lab/lab", headers=PAGE).status_code == 401


def test_sessions_outlive_keepers_edges_and_launches(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    keeper.kill()
    keeper.start()
    assert browser.get("/servers/lab/api/me").status_code == 200
    (edge,) = edges_of(keeper)
    edge.kill()
    until(lambda: edges_of(keeper) not in ([], [edge]), what="another edge")
    assert browser.get("/servers/lab/api/me").status_code == 200
    assert keeper.http.post("/api/servers/lab/restart").status_code in {200, 201}
    assert browser.get("/servers/lab/api/me").status_code == 200


def test_a_revoked_session_stays_so_whatever_is_killed(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    (session,) = keeper.http.get("/api/sessions").json()["sessions"]
    assert keeper.http.delete(f"/api/sessions/{session['id']}").status_code == 200
    keeper.kill()
    (edge,) = edges_of(keeper)
    edge.kill()
    keeper.start()
    assert browser.get("/servers/lab/api/me").status_code == 401


@pytest.mark.promise
def test_a_stopped_lab_has_a_page_and_its_sessions_wait_for_it(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    keeper.http.post("/api/servers/lab/stop")
    page = browser.get("/servers/lab/lab", headers=PAGE)
    assert (page.status_code, "This Lab does not run" in page.text) == (503, True)
    assert browser.get("/servers/lab/api/me").status_code == 404
    keeper.http.post("/api/servers/lab/start")
    assert browser.get("/servers/lab/api/me").status_code == 200
    assert keeper.delete("lab").status_code == 200
    # Another server of this name is not theirs.
    keeper.post(name="lab")
    assert browser.get("/servers/lab/api/me").status_code == 401


def test_labs_have_another_host_name_than_the_keeper_on_this_machine(keeper, browse):
    keeper.post(name="lab")
    at_localhost = {"Host": f"localhost:{keeper.port}"}
    sent = browse().get("/servers/lab/lab?a=b", headers=PAGE | at_localhost, follow_redirects=False)
    assert sent.status_code == 307
    assert sent.headers["location"] == f"{keeper.url}/servers/lab/lab?a=b"
    headers = {"Authorization": f"Bearer {keeper.token}"} | at_localhost
    link = browse().post("/api/servers/lab/link", headers=headers, json={}).json()["url"]
    assert link.startswith(f"http://127.0.0.1:{keeper.port}/open/")


def test_open_prints_a_link_that_opens_the_lab(keeper, browse):
    server = keeper.post(name="lab").json()
    assert server["lab_url"] == f"{keeper.url}/servers/lab/lab"
    for command in (("open", "lab", "--print"), ("start", "lab")):
        printed = keeper.cli(*command)
        assert printed.returncode == 0, printed.stderr
        page = browse().get(printed.stdout.strip(), headers=PAGE)
        assert page.url == server["lab_url"], command


@pytest.fixture
def by_host(make_keeper):
    """A keeper whose Labs have host names of their own."""
    return make_keeper(lab_domain="labs.example.org").start()


@pytest.fixture
def resolving():
    with httpx.Client(transport=Resolved(), follow_redirects=True, timeout=PATIENCE) as browser:
        yield browser


@pytest.mark.promise
def test_with_a_domain_each_lab_is_a_site_of_its_own(by_host, resolving):
    server = by_host.post(name="lab").json()
    site = f"http://lab.labs.example.org:{by_host.port}"
    assert (server["base_url"], server["lab_url"]) == ("/", f"{site}/lab")
    link = link_to(by_host, "lab")
    assert link.startswith(f"{site}/open/")
    assert resolving.get(f"{site}/lab", headers=PAGE).status_code == 401
    page = resolving.get(link, headers=PAGE)
    assert (page.status_code, str(page.url)) == (200, f"{site}/lab")
    (cookie,) = [c for c in resolving.cookies.jar if c.name == "labkeeper-session"]
    # Host-only: no domain was set.
    assert (cookie.path, cookie.domain_specified) == ("/", False)
    assert resolving.get(f"{site}/api/me").json()["identity"]["username"] == "owner"
    # The API is not there, and Labs are not at the API's host name.
    assert resolving.get(f"{site}/api/servers").status_code == 404
    headers = {"Authorization": f"token {server['token']}"}
    bare = resolving.get(f"{by_host.url}/servers/lab/api/status", headers=headers)
    assert bare.status_code == 401
    assert "You are not signed in" in bare.text
    assert "You are signed out" in resolving.get(f"{site}/logout", headers=PAGE).text
    assert resolving.get(f"{site}/lab", headers=PAGE).status_code == 401


def test_websockets_work_at_a_labs_own_host(by_host, resolving):
    by_host.post(name="lab")
    site = f"http://lab.labs.example.org:{by_host.port}"
    resolving.get(link_to(by_host, "lab"), headers=PAGE)
    kernel = resolving.post(
        f"{site}/api/kernels", json={"name": "python3"}, headers=xsrf_of(resolving)
    ).json()["id"]
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in resolving.cookies.jar)
    for origin, status in ((site, None), ("http://evil.example", 403)):
        connect = functools.partial(
            websocket.create_connection,
            f"ws://127.0.0.1:{by_host.port}/api/kernels/{kernel}/channels",
            host=f"lab.labs.example.org:{by_host.port}",
            cookie=cookies,
            origin=origin,
            timeout=PATIENCE,
        )
        if status is None:
            opened = connect()
            assert execute(opened, "6 * 7") == "42"
            opened.close()
        else:
            with pytest.raises(websocket.WebSocketBadStatusException) as refused:
                connect()
            assert refused.value.status_code == status


def home_of(keeper):
    return f"http://labs.example.org:{keeper.port}"


def sign_in(keeper, browser):
    """Sign a browser in at the bare host, as a person does by a link."""
    printed = keeper.cli("dashboard", "--print")
    assert printed.returncode == 0, printed.stderr
    link, home = printed.stdout.strip(), home_of(keeper)
    assert link.startswith(f"{home}/open/")
    assert "<button" in browser.get(link, headers=PAGE).text
    page = browser.post(link, headers=PAGE | {"Origin": home})
    assert (page.status_code, str(page.url)) == (200, f"{home}/dashboard/"), page.text


@pytest.mark.promise
def test_a_browser_that_is_signed_in_at_the_bare_host_opens_each_lab(by_host, resolving):
    sites = [f"http://{name}.labs.example.org:{by_host.port}" for name in ("lab", "lab-2")]
    for name in ("lab", "lab-2"):
        by_host.post(name=name)
    sign_in(by_host, resolving)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for site in sites:
        page = resolving.get(f"{site}/lab/tree?reset", headers=PAGE)
        assert (page.status_code, str(page.url)) == (200, f"{site}/lab/tree?reset")
        assert resolving.get(f"{site}/api/me").json()["identity"]["username"] == user
    # The API has nothing to do with it, and a Lab never gets that cookie.
    assert resolving.get(f"{home_of(by_host)}/api/servers").status_code == 401
    (cookie,) = [c for c in resolving.cookies.jar if c.name == "labkeeper-sign-in"]
    assert (cookie.domain, cookie.domain_specified) == ("labs.example.org", False)
    listed = by_host.http.get("/api/sessions").json()["sessions"]
    parent = listed[0]["id"]
    assert [(s["server"], s["parent"]) for s in listed] == [
        (None, None),
        ("lab", parent),
        ("lab-2", parent),
    ]
    assert "all Labs" in by_host.cli("session", "ls").stdout


def test_whatever_follows_from_a_session_at_the_bare_host_ends_with_it(by_host, resolving):
    by_host.post(name="lab")
    site = f"http://lab.labs.example.org:{by_host.port}"
    sign_in(by_host, resolving)
    resolving.get(f"{site}/lab", headers=PAGE)
    kernel = resolving.post(
        f"{site}/api/kernels", json={"name": "python3"}, headers=xsrf_of(resolving, site)
    ).json()["id"]
    at_lab = [c for c in resolving.cookies.jar if c.domain == "lab.labs.example.org"]
    opened = websocket.create_connection(
        f"ws://127.0.0.1:{by_host.port}/api/kernels/{kernel}/channels",
        host=f"lab.labs.example.org:{by_host.port}",
        cookie="; ".join(f"{cookie.name}={cookie.value}" for cookie in at_lab),
        origin=site,
        timeout=PATIENCE,
    )
    assert execute(opened, "6 * 7") == "42"
    parent = by_host.http.get("/api/sessions").json()["sessions"][0]
    assert by_host.cli("session", "revoke", parent["id"]).returncode == 0
    until(lambda: is_closed(opened), what="the websocket to be closed")
    assert by_host.http.get("/api/sessions").json()["sessions"] == []
    page = resolving.get(f"{site}/lab", headers=PAGE)
    assert (page.status_code, page.url.host) == (401, "labs.example.org")
    assert "You are not signed in to this Lab" in page.text


def test_a_session_at_the_bare_host_outlives_keepers_and_edges(by_host, resolving):
    by_host.post(name="lab")
    sign_in(by_host, resolving)
    (edge,) = edges_of(by_host)
    by_host.kill()
    edge.kill()
    by_host.start()
    site = f"http://lab.labs.example.org:{by_host.port}"
    page = resolving.get(f"{site}/lab", headers=PAGE)
    assert (page.status_code, str(page.url)) == (200, f"{site}/lab")


def test_a_start_button_that_is_pressed_without_a_session_has_a_page(keeper, browse):
    keeper.post(name="lab")
    browser = signed_in(keeper, browse, "lab")
    keeper.http.post("/api/servers/lab/stop")
    assert "<button" in browser.get("/servers/lab/lab", headers=PAGE).text
    (session,) = keeper.http.get("/api/sessions").json()["sessions"]
    assert keeper.http.delete(f"/api/sessions/{session['id']}").status_code == 200
    pressed = browser.post(
        "/servers/lab/start", headers=PAGE | {"Origin": keeper.url}, follow_redirects=False
    )
    # There the browser may be signed in. On its way, it names no origin.
    asked = pressed.headers["location"]
    assert asked.startswith(f"http://localhost:{keeper.port}/session/lab?")
    page = browser.get(asked, headers=PAGE)
    assert (page.status_code, "You are not signed in" in page.text) == (401, True)
    assert page.headers["content-type"].startswith("text/html")
    assert keeper.get("lab")["state"] == "stopped"


def sessions_of(keeper):
    """Return the ids of all sessions, the oldest first."""
    return [session["id"] for session in keeper.http.get("/api/sessions").json()["sessions"]]


def test_a_session_ends_once_it_was_not_used_for_long_but_not_with_an_open_lab(keeper, browse):
    """Whoever was killed meanwhile."""
    keeper.post(name="lab")
    busy, idle = (signed_in(keeper, browse, "lab") for _ in range(2))
    opened = open_kernel(keeper, busy, "lab")
    used, unused = sessions_of(keeper)
    keeper.kill()
    # The edge stays, so the websocket does; all others have been idle for longer than this.
    keeper.settings["session_idle"] = "1s"
    keeper.start()
    until(lambda: sessions_of(keeper) == [used], what="the end of the idle session")
    assert idle.get("/servers/lab/api/me").status_code == 401
    assert execute(opened, "6 * 7") == "42"
    events = keeper.http.get("/api/events").json()["events"]
    ended = [event for event in events if "was not used for 1 s" in event["message"]]
    assert [event["details"]["id"] for event in ended] == [unused]
    # With the edge, the websocket ends, too; so the session does, whoever is killed.
    (edge,) = edges_of(keeper)
    keeper.kill()
    edge.kill()
    until(lambda: is_closed(opened), what="the websocket to be closed")
    keeper.start()
    until(lambda: sessions_of(keeper) == [], what="the end of the other session")


def test_host_names_need_a_domain(make_keeper):
    keeper = make_keeper(lab_address="host")
    failed = keeper.cli("serve")
    assert failed.returncode == 2
    assert "set LABKEEPER_LAB_DOMAIN" in failed.stderr
