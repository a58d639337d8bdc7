"""Sleep: an unused Lab is stopped, and the next visit to its page starts it again."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import websocket

from harness import PATIENCE, edges_of, start_kernel, until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]
PAGE = {"Accept": "text/html,*/*", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
"""What browsers send when a person goes to a page."""
QUICK = {"cull_period": 0.2, "cull_grace": 0, "cull_warning": 0.2}
LATER = QUICK | {"cull_period": "366d"}
"""For a keeper that culls nothing, so that even a slow test has time."""
TARGET = "/servers/lab/lab/tree/a%20b%2Fc.ipynb?x=1&y=%26"


@pytest.fixture
def keeper(make_keeper):
    return make_keeper(launch_by="fork", sleep_after="1s", **LATER).start_to_fork()


def start_again(keeper, settings):
    """Replace the keeper by one with other settings; its servers and its edge stay."""
    keeper.kill()
    keeper.settings |= settings
    keeper.start()


@pytest.fixture
def sign_in(request):
    """Return clients that have a session for a Lab, as browsers have."""
    made = []

    def make(keeper, name="lab"):
        browser = httpx.Client(base_url=keeper.url, trust_env=False, timeout=PATIENCE)
        made.append(browser)
        link = keeper.http.post(f"/api/servers/{name}/link", json={}).json()["url"]
        assert browser.get(link, headers=PAGE).status_code == 303
        return browser

    yield make
    for browser in made:
        browser.close()


def asleep(keeper, sign_in):
    """Return a browser that was signed in to a Lab, which sleeps now."""
    keeper.post(name="lab")
    browser = sign_in(keeper)
    start_again(keeper, QUICK)
    stopped = keeper.wait_for("stopped", "lab")
    assert stopped["stopped_by"]["actor"] == "culler"
    assert stopped["stopped_by"]["reason"].startswith("sleep_after: without kernels, terminals")
    start_again(keeper, LATER)
    return browser


def visit(browser, target):
    """Go to a page as a browser does, until the Lab answers; return the answer."""

    def answered():
        answer = browser.get(target, headers=PAGE)
        if answer.status_code == 303:
            assert answer.headers["location"] == target
        else:
            assert "Refresh" in answer.headers or answer.status_code == 200
        return answer if answer.status_code == 200 else None

    return until(answered, what="the Lab to answer")


def idle(keeper, name="lab"):
    return keeper.http.get(f"/api/servers/{name}/idle").json()


@pytest.mark.promise
def test_a_visit_wakes_a_lab_that_sleeps_at_the_same_address_with_the_same_session(keeper, sign_in):
    """Also if another keeper has been started meanwhile; what is no visit does not wake it."""
    browser = asleep(keeper, sign_in)
    cookie = browser.cookies["labkeeper-session"]
    # Polls of an open page, requests of programs, and pages that are loaded ahead of time.
    assert browser.get("/servers/lab/api/kernels").status_code == 404
    assert browser.post("/servers/lab/api/kernels").status_code == 404
    assert browser.head(TARGET, headers=PAGE).status_code == 503
    assert browser.get(TARGET, headers=PAGE | {"Sec-Purpose": "prefetch"}).status_code == 503
    assert browser.get(TARGET, headers=PAGE | {"Sec-Fetch-Dest": "iframe"}).status_code == 503
    with httpx.Client(base_url=keeper.url, trust_env=False) as stranger:
        # It may be signed in at the other host name: a page there says that it is not.
        sent = stranger.get(TARGET, headers=PAGE)
        assert sent.headers["location"].startswith(f"http://localhost:{keeper.port}/session/")
        assert stranger.get(sent.headers["location"], headers=PAGE).status_code == 401
    assert keeper.get("lab")["state"] == "stopped"
    assert "(slept)" in keeper.cli("ls").stdout
    assert "culler (sleep_after: without kernels" in keeper.cli("show", "lab").stdout
    assert "<title>" in visit(browser, TARGET).text
    assert browser.cookies["labkeeper-session"] == cookie
    server = keeper.get("lab")
    assert (server["generation"], server["stopped_by"]) == (2, None)
    events = keeper.http.get("/api/servers/lab/events").json()["events"]
    (woken,) = [e for e in events if e["details"].get("event") == "START" and e["generation"] == 2]
    assert (woken["actor"], woken["reason"]) == ("token:owner", "its Lab is visited")


def test_tabs_that_wake_a_lab_at_once_launch_it_once(keeper, sign_in):
    browser = asleep(keeper, sign_in)
    with ThreadPoolExecutor(8) as pool:
        visits = [pool.submit(visit, browser, TARGET) for _ in range(8)]
    assert {one.result().status_code for one in visits} == {200}
    assert keeper.get("lab")["generation"] == 2


@pytest.mark.promise
def test_a_lab_does_not_sleep_while_a_browser_has_it_open(keeper, sign_in):
    keeper.post(name="lab", sleep_after="1h")
    browser = sign_in(keeper)
    # A visitor who has left does not keep it awake.
    assert (idle(keeper)["rule"], idle(keeper)["held_by"]) == ("sleep_after", [])
    events = open_events(keeper, browser)
    told = idle(keeper)
    assert (told["state"], told["stops_at"]) == ("in-use", None)
    assert [holder["kind"] for holder in told["held_by"]] == ["visitor"]
    assert "visitor browser has the Lab open" in told["reason"]
    # A keeper that has not seen the browser come knows it, too.
    start_again(keeper, {})
    keeper.wait_for("running", "lab")
    assert idle(keeper)["state"] == "in-use"
    events.close()
    until(lambda: idle(keeper)["stops_at"], what="the culler to see that the visitor has left")
    # While the edge does not answer, visitors are unknown, which counts as use.
    (edge,) = edges_of(keeper)
    edge.suspend()
    told = json.loads(keeper.cli("idle", "lab", "--json").stdout)
    edge.resume()
    assert (told["state"], told["stops_at"]) == ("unknown", None)
    assert "cannot know who visits server 'lab'" in told["reason"]
    assert idle(keeper)["stops_at"]


def open_events(keeper, browser):
    """Open the websocket that JupyterLab keeps open."""
    return websocket.create_connection(
        f"{keeper.url}/servers/lab/api/events/subscribe".replace("http", "ws"),
        cookie="; ".join(f"{cookie.name}={cookie.value}" for cookie in browser.cookies.jar),
        origin=keeper.url,
        timeout=PATIENCE,
    )


def test_idle_kernels_keep_a_lab_awake(keeper):
    server = keeper.post(name="lab", sleep_after="1h").json()
    kernel = start_kernel(server)
    assert idle(keeper)["held_by"] == [{"kind": "kernel", "id": kernel, "reason": "exists"}]
    headers = {"Authorization": f"token {server['token']}"}
    httpx.delete(f"{server['url']}api/kernels/{kernel}", headers=headers, trust_env=False)
    assert idle(keeper)["rule"] == "sleep_after"


@pytest.mark.promise
def test_a_lab_stopped_by_a_command_has_a_page_that_starts_it(make_keeper, sign_in):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    keeper.post(name="lab")
    browser = sign_in(keeper)
    keeper.http.post("/api/servers/lab/stop")
    page = browser.get(TARGET, headers=PAGE)
    assert (page.status_code, "It was stopped by token:owner." in page.text) == (503, True)
    start = "/servers/lab/start?next=lab%2Ftree%2Fa%2520b%252Fc.ipynb%3Fx%3D1%26y%3D%2526"
    assert f'action="{start}"' in page.text.replace("&amp;", "&")
    assert keeper.get("lab")["state"] == "stopped"
    own = PAGE | {"Origin": keeper.url}
    for headers in (
        PAGE,
        PAGE | {"Origin": "http://evil.example"},
        PAGE | {"Origin": "null"},
        own | {"Sec-Fetch-Site": "same-site"},
    ):
        assert browser.post(start, headers=headers).status_code == 403, headers
    sent = httpx.post(f"{keeper.url}{start}", headers=own, trust_env=False)
    assert sent.headers["location"].startswith(f"http://localhost:{keeper.port}/session/")
    assert keeper.get("lab")["state"] == "stopped"
    # In two tabs: the Lab runs, or starts, when the second one is pressed.
    for _ in range(2):
        answer = browser.post(start, headers=own | {"Sec-Fetch-Site": "same-origin"})
        assert (answer.status_code, answer.headers["location"]) == (303, TARGET)
    visit(browser, TARGET)
    assert keeper.get("lab")["generation"] == 2


def test_with_a_domain_the_page_is_at_the_labs_own_host(make_keeper):
    keeper = make_keeper(lab_domain="labs.example.org").start()
    keeper.post(name="lab")
    link = keeper.http.post("/api/servers/lab/link", json={}).json()["url"]
    site = f"lab.labs.example.org:{keeper.port}"
    assert link.startswith(f"http://{site}/open/")
    with httpx.Client(base_url=keeper.url, trust_env=False, timeout=PATIENCE) as browser:
        browser.headers.update(PAGE | {"Host": site})
        cookies = browser.get(link.removeprefix(f"http://{site}")).headers["set-cookie"]
        browser.headers["Cookie"] = cookies.partition(";")[0]
        keeper.http.post("/api/servers/lab/stop")
        page = browser.get("/lab/tree/x?y=1")
        assert 'action="/start?next=lab%2Ftree%2Fx%3Fy%3D1"' in page.text
        start = "/start?next=lab%2Ftree%2Fx%3Fy%3D1"
        assert browser.post(start, headers={"Origin": keeper.url}).status_code == 403
        answer = browser.post(start, headers={"Origin": f"http://{site}"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/lab/tree/x?y=1")
    assert keeper.wait_for("running", "lab")["generation"] == 2


@pytest.mark.parametrize("target", ["//evil.example/x", "/\\evil.example/x", "http:x"])
def test_the_page_leads_to_the_lab_only(make_keeper, sign_in, target):
    keeper = make_keeper().start()
    keeper.post(name="lab")
    browser = sign_in(keeper)
    answer = browser.post(
        "/servers/lab/start", params={"next": target}, headers=PAGE | {"Origin": keeper.url}
    )
    assert answer.headers["location"].startswith("/servers/lab/")


def test_sleep_needs_the_edge(make_keeper):
    failed = make_keeper(sleep_after="1h", edge="off").cli("serve")
    assert (failed.returncode, "LABKEEPER_EDGE=off" in failed.stderr) == (2, True)
    keeper = make_keeper(edge="off").start()
    refused = keeper.post(name="lab", sleep_after="1h")
    assert (refused.status_code, "needs Labs behind the edge" in refused.text) == (422, True)
