"""Pages at the addresses of Labs: they wake what sleeps, and say why a Lab does not run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fake_keeper import FakeKeeper, fake_keeper
from harness import until
from labkeeper.api import labs
from labkeeper.api.app import create_app
from labkeeper.core.errors import BackendRefused
from labkeeper.core.lifecycle import Event, State
from labkeeper.core.messages import Create, Order, Origin
from labkeeper.core.policy import Policy
from labkeeper.core.server import Exit
from labkeeper.lab_addresses import LabAddresses
from labkeeper.testing.fakes import a_spec

PAGE = "/servers/lab/lab/tree/x?y=1"
ADA = "token:ada"
SLEEP = Origin("culler", reason="sleep_after: without kernels, terminals and visitors for 1 h")
OWN = {"Origin": "http://localhost"}

COOKIE = "labkeeper-session"


class Visited:
    """A Lab, and a browser with a session for it."""

    def __init__(self, running: FakeKeeper):
        self.keeper, self.world = running.keeper, running.world
        self.keeper.ask(Create(a_spec("lab")))
        self.wait_for(State.RUNNING)
        self.browser = create_app(running.services).test_client()
        _, cookie = running.services.sessions.make("lab", ADA)
        self.browser.set_cookie(COOKIE, cookie, path="/servers/lab/")

    def wait_for(self, state):
        until(lambda: self.now.state is state, what=f"the server to be {state}")

    @property
    def now(self):
        return self.keeper.get("lab")

    def stop(self, origin):
        self.keeper.ask(Order("lab", Event.STOP, origin=origin))
        self.wait_for(State.STOPPED)
        return self

    def text(self, path=PAGE):
        answer = self.browser.get(path)
        assert answer.status_code == 503
        return answer.text


@pytest.fixture
def visited(tmp_path, monkeypatch):
    """With as much time for a start to be quick as a slow test needs."""
    monkeypatch.setattr(labs, "_AT_ONCE", 60.0)
    with fake_keeper(tmp_path, policy=Policy(max_servers=1), labs=LabAddresses("path")) as running:
        yield Visited(running)


def test_a_visit_wakes_and_leads_to_the_same_address(visited):
    visited.stop(SLEEP)
    answer = visited.browser.get(PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (303, PAGE)
    assert (visited.now.state, visited.now.generation) == (State.RUNNING, 2)
    # The edge may not have the route yet: no loop of redirects.
    assert "This Lab starts" in visited.text()
    assert visited.now.generation == 2


def test_a_start_that_takes_longer_has_a_page_that_reloads_itself(visited, monkeypatch):
    monkeypatch.setattr(labs, "_AT_ONCE", 0.0)
    visited.stop(SLEEP).world.temper("lab").boots = False
    answer = visited.browser.get(PAGE)
    assert (answer.status_code, answer.headers["Refresh"]) == (503, "1")
    assert "This Lab starts" in answer.text
    assert visited.now.generation == 2
    assert "This Lab starts" in visited.text()
    assert visited.now.generation == 2


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("HEAD", {}),
        ("GET", {"Sec-Purpose": "prefetch;prerender"}),
        ("GET", {"Purpose": "prefetch"}),
        ("GET", {"X-Moz": "prefetch"}),
        ("GET", {"Sec-Fetch-Dest": "iframe"}),
    ],
)
def test_what_is_no_visit_does_not_wake(visited, method, headers):
    visited.stop(SLEEP)
    assert visited.browser.open(PAGE, method=method, headers=headers).status_code == 503
    assert visited.now.state is State.STOPPED


def test_a_visit_that_a_stop_command_overtakes_does_not_wake(visited, monkeypatch):
    visited.stop(SLEEP)
    before = visited.now
    visited.keeper.ask(Order("lab", Event.STOP, origin=Origin("token:bob")))
    with monkeypatch.context() as late:
        late.setattr(labs, "_AT_ONCE", 0.0)
        late.setattr(visited.keeper, "get", lambda _name: before)
        assert "It was stopped by token:bob." in visited.text()
    assert visited.now.state is State.STOPPED


@pytest.mark.parametrize(
    ("origin", "why"),
    [
        (Origin(ADA), "It was stopped by token:ada."),
        (Origin("keeper", reason="the keeper ends"), "It was stopped with the keeper."),
        (Origin("culler", reason="max_age: it has run for 1 h"), "max_age: it has run for 1 h."),
    ],
)
def test_what_was_stopped_otherwise_has_a_button(visited, origin, why):
    page = visited.stop(origin).text()
    assert why in page
    assert '<form method="post" action="/servers/lab/start?next=lab%2Ftree%2Fx%3Fy%3D1">' in page
    assert visited.now.state is State.STOPPED
    answer = visited.browser.post("/servers/lab/start?next=lab%2Ftree%2Fx%3Fy%3D1", headers=OWN)
    assert (answer.status_code, answer.headers["Location"]) == (303, PAGE)
    assert visited.now.state is State.RUNNING


def test_a_lab_that_was_shut_down_from_inside_has_a_button(visited):
    visited.world.crash("lab", Exit(code=0))
    visited.wait_for(State.STOPPED)
    assert "It was shut down from inside." in visited.text()


def test_a_lab_that_failed_says_why_and_is_not_woken(visited, monkeypatch):
    refusal = BackendRefused("no module named x", failure_class="import-error")
    visited.stop(SLEEP).world.temper("lab").refusal = refusal
    assert "It failed: no module named x." in visited.text()
    assert visited.now.state is State.FAILED
    generation = visited.now.generation
    failed = replace(visited.now.failure, log_tail=("a <line>", "another"))
    monkeypatch.setattr(
        visited.keeper, "get", lambda _name, now=visited.now: replace(now, failure=failed)
    )
    assert "<pre>a &lt;line&gt;\nanother</pre>" in visited.text()
    monkeypatch.undo()
    assert visited.now.generation == generation


def test_a_lab_that_cannot_start_now_says_why_and_can_be_tried_again(visited):
    visited.stop(SLEEP).keeper.ask(Create(a_spec("other")))
    for answer in (
        visited.browser.get(PAGE),
        visited.browser.post("/servers/lab/start", headers=OWN),
    ):
        assert answer.status_code == 503
        assert "This Lab cannot start now" in answer.text
        assert "Cannot start server &#x27;lab&#x27;: 1 of at most 1 are active" in answer.text
        assert "Try again" in answer.text
    assert visited.now.state is State.STOPPED


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},
        OWN | {"Sec-Fetch-Site": "cross-site"},
        OWN | {"Sec-Fetch-Site": "same-site"},
        OWN | {"Sec-Fetch-Site": "none"},
    ],
)
def test_the_button_works_on_its_own_page_only(visited, headers):
    visited.stop(Origin(ADA))
    assert visited.browser.post("/servers/lab/start", headers=headers).status_code == 403
    assert visited.now.state is State.STOPPED


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("//evil.example/x", "/servers/lab/evil.example/x"),
        ("/%5Cevil.example/x", "/servers/lab/evil.example/x"),
        ("x%0d%0aSet-Cookie:%20a=b", "/servers/lab/x%0D%0ASet-Cookie:%20a=b"),
        ("", "/servers/lab/"),
    ],
)
def test_the_button_leads_to_its_lab_only(visited, target, location):
    visited.stop(Origin(ADA))
    answer = visited.browser.post(f"/servers/lab/start?next={target}", headers=OWN)
    assert (answer.status_code, answer.headers["Location"]) == (303, location)


def test_without_a_session_nothing_starts(visited):
    visited.stop(SLEEP)
    visited.browser.delete_cookie(COOKIE, path="/servers/lab/")
    for answer in (
        visited.browser.get(PAGE),
        visited.browser.post("/servers/lab/start", headers=OWN),
    ):
        assert (answer.status_code, "You are not signed in" in answer.text) == (401, True)
    assert visited.now.state is State.STOPPED


def test_a_deleted_lab_has_a_page_of_its_own(visited, monkeypatch):
    monkeypatch.setattr(visited.keeper, "get", lambda _name: None)
    answer = visited.browser.get(PAGE)
    assert (answer.status_code, "does not exist any more" in answer.text) == (404, True)


def test_without_an_edge_there_are_no_pages(tmp_path):
    with fake_keeper(tmp_path) as running:
        browser = create_app(running.services).test_client()
        assert browser.get(PAGE).status_code == 404
        assert browser.post("/servers/lab/start", headers=OWN).status_code == 404


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/servers/lab/a%20b%2Fc?d=%26&e", "/a%20b%2Fc?d=%26&e"),
        ("/servers/lab/a//b", "/a//b"),
        ("/servers/lab/%5Cevil.example", "/%5Cevil.example"),
        ("/servers/lab/", "/"),
    ],
)
def test_with_a_domain_the_address_is_that_of_the_labs_host(tmp_path, target, location):
    labs = LabAddresses("host", "labs.example.org")
    with fake_keeper(tmp_path, labs=labs) as running:
        visited = Visited(running)
        visited.stop(SLEEP)
        answer = visited.browser.get(target)
        assert (answer.status_code, answer.headers["Location"]) == (303, location)
