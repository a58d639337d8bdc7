"""Whom the dashboard knows, what it lets them do, and what it refuses."""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import pytest

from fake_keeper import TOKEN, fake_keeper
from harness import until
from labkeeper.api.app import create_app
from labkeeper.core.access import Caller, Scope, TokenLimits
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.identity.authenticators import OpenAuthenticator
from labkeeper.lab_addresses import LabAddresses
from labkeeper.testing.fakes import a_spec
from labkeeper.web import assets
from labkeeper.web.dashboard import ROUTES, dashboard
from labkeeper.web.pages import POLICY
from web_pages import HOME, Browser, a_dashboard

SERVERS = "/dashboard/"


@pytest.fixture
def site(tmp_path):
    with a_dashboard(tmp_path) as made:
        yield made


def start(site, name):
    site.running.keeper.ask(Create(a_spec(name)))
    until(lambda: site.running.keeper.get(name).state is State.RUNNING)


def state(site, name):
    return site.running.keeper.get(name).state


def test_the_front_leads_to_the_servers(site):
    for path in ("/", "/dashboard"):
        answer = Browser(site.app).get(path)
        assert (answer.status_code, answer.headers["Location"]) == (303, SERVERS)


def test_without_a_session_there_is_a_page_that_says_how_to_sign_in(site):
    answer = Browser(site.app).get(SERVERS)
    assert (answer.status_code, "labkeeper dashboard" in answer.text) == (401, True)
    assert answer.headers["Content-Security-Policy"] == POLICY


def test_elsewhere_a_browser_is_sent_to_the_bare_host(site):
    client = site.app.test_client()
    answer = client.get("/dashboard/?q=a%26b", base_url="http://127.0.0.1:8000")
    assert answer.headers["Location"] == "http://localhost:8000/dashboard/?q=a%26b"
    # There is none beyond this machine: Labs have the same host name.
    answer = client.get(SERVERS, base_url="http://192.0.2.1:8000")
    assert (answer.status_code, "LABKEEPER_LAB_DOMAIN" in answer.text) == (401, True)


def test_tokens_are_not_accepted_and_sessions_only_at_the_bare_host(site):
    client = site.app.test_client()
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get(SERVERS, base_url=HOME, headers=bearer).status_code == 401
    _, text = site.running.services.sessions.sign_in(Caller("token:ada", Scope.ADMIN))
    for host in ("localhost", "127.0.0.1"):
        client.set_cookie("labkeeper-sign-in", text, domain=host)
    assert client.get(SERVERS, base_url=HOME).status_code == 200
    assert client.get(SERVERS, base_url="http://127.0.0.1").status_code == 303


def test_a_session_that_has_ended_is_not_accepted(site):
    browser = site.browser()
    assert browser.get(SERVERS).status_code == 200
    site.running.services.sessions.revoke(browser.session.id)
    assert browser.get(SERVERS).status_code == 401


def test_without_access_control_nobody_signs_in(tmp_path):
    labs = LabAddresses("port")
    with fake_keeper(tmp_path, authenticators=[OpenAuthenticator()], labs=labs) as running:
        browser = Browser(create_app(running.services, dashboard(running.services)))
        page = browser.get(SERVERS)
        assert (page.status_code, "Sign out" in page.text, "anybody" in page.text) == (
            200,
            False,
            True,
        )
        running.keeper.ask(Create(a_spec("lab")))
        until(lambda: running.keeper.get("lab").state is State.RUNNING)
        assert "/open/" in browser.get("/dashboard/servers/lab/open").headers["Location"]
        assert browser.post("/dashboard/servers/lab/stop").status_code == 303
        until(lambda: running.keeper.get("lab").state is State.STOPPED)
        assert browser.get("/dashboard/servers/lab/open").status_code == 409
        # Not for a page of another site.
        refused = browser.post("/dashboard/servers/lab/start", origin="http://evil.example")
        assert (refused.status_code, running.keeper.get("lab").state) == (403, State.STOPPED)


ORIGINS = ["http://evil.example", "http://127.0.0.1", "null", ""]


@pytest.mark.parametrize("origin", ORIGINS)
def test_forms_of_other_sites_and_labs_are_refused(site, origin):
    start(site, "lab")
    browser = site.browser()
    browser.get(SERVERS)
    assert browser.post("/dashboard/servers/lab/stop", origin=origin).status_code == 403
    assert state(site, "lab") is State.RUNNING


def test_forms_of_other_sessions_are_refused(site):
    start(site, "lab")
    ada, bob = site.browser(), site.browser()
    ada.get(SERVERS)
    bob.get(SERVERS)
    assert ada.csrf != bob.csrf
    for csrf in ("", bob.csrf, ada.csrf[:-1], ada.csrf.upper() + "é"):
        assert ada.post("/dashboard/servers/lab/stop", csrf=csrf).status_code == 403
    assert state(site, "lab") is State.RUNNING
    assert ada.post("/dashboard/servers/lab/stop").status_code == 303


def test_every_form_of_the_dashboard_is_checked(site):
    start(site, "lab")
    browser = site.browser()
    for route in ROUTES:
        if route.method == "POST":
            path = route.path.replace("<name>", "lab").replace("<command>", "stop")
            path = path.replace("<kernel>", "k").replace("<id>", "x")
            assert browser.post(path, csrf="wrong").status_code == 403, path
    assert state(site, "lab") is State.RUNNING


@pytest.mark.parametrize("scope", [Scope.READ, Scope.MANAGE])
def test_a_page_has_no_control_that_would_be_refused(site, scope):
    start(site, "lab")
    may_manage = scope is Scope.MANAGE
    browser = site.browser(scope)
    for path in (SERVERS, "/dashboard/servers/lab"):
        text = browser.get(path).text
        buttons = set(re.findall(r"<button[^>]*>([^<]*)<", text))
        assert bool(buttons - {"Sign out", "Close", "Hour", "Day", "30 days"}) is may_manage
        assert ("Start a server" in text) is (may_manage and path == SERVERS)
        assert ("Make a link" in text) is (may_manage and path != SERVERS)
        assert ("/dashboard/servers/lab/stop" in text) is may_manage
        assert ("/dashboard/servers/lab/open" in text) is may_manage
        assert "/dashboard/access" not in text


def test_a_reader_is_refused_what_it_must_not_do(site):
    start(site, "lab")
    browser = site.browser(Scope.READ)
    browser.get("/dashboard/servers/lab")
    browser.csrf = hashlib.sha256(f"csrf {browser.session.digest}".encode()).hexdigest()
    for path in ("open", "stop"):
        assert browser.get(f"/dashboard/servers/lab/{path}").status_code == 403
    for path in ("stop", "link", "snooze", "kernels/k/end"):
        assert browser.post(f"/dashboard/servers/lab/{path}").status_code == 403
    assert browser.post("/dashboard/many/stop", name="lab").status_code == 403
    assert browser.get("/dashboard/start").status_code == 403
    assert state(site, "lab") is State.RUNNING


def test_limits_of_a_session_hold(site):
    for name in ("lab-1", "other"):
        start(site, name)
    browser = site.browser(Scope.MANAGE, limits=TokenLimits(("lab-*",)))
    text = browser.get(SERVERS).text
    assert ("lab-1" in text, "other" in text, "/dashboard/keeper" in text) == (True, False, False)
    assert browser.get("/dashboard/servers/other").status_code == 403
    assert browser.post("/dashboard/servers/other/stop").status_code == 403
    refused = browser.post("/dashboard/many/delete", name="other", confirmed="yes")
    assert (refused.status_code, state(site, "other")) == (404, State.RUNNING)


def test_what_is_not_there_gets_a_page(site):
    browser = site.browser()
    start(site, "lab")
    for path in ("/dashboard/servers/nothing", "/dashboard/servers/lab/explode"):
        answer = browser.get(path)
        assert (answer.status_code, "To the servers" in answer.text) == (404, True), path
    answer = browser.get("/dashboard/servers/nothing", HX_Request="true")
    assert (answer.status_code, "<html" in answer.text, "nothing" in answer.text) == (
        200,
        False,
        True,
    )


def test_files_are_served_for_good_under_the_hash_of_their_content(site):
    path = assets.address_of("dashboard.css")
    answer = Browser(site.app).get(path)
    assert (
        answer.data
        == resources.files("labkeeper.web").joinpath("static/dashboard.css").read_bytes()
    )
    assert "immutable" in answer.headers["Cache-Control"]
    assert answer.content_type == "text/css; charset=utf-8"
    other = Browser(site.app).get("/dashboard/static/0123456789ab/dashboard.css")
    assert (other.status_code, other.headers["Cache-Control"]) == (200, "no-store")
    for name in ("nothing.css", "vendored/LICENSE.htmx", "../dashboard.py"):
        assert Browser(site.app).get(f"/dashboard/static/x/{name}").status_code == 404


def test_vendored_files_are_those_that_were_published():
    directory = resources.files("labkeeper.web") / "static" / "vendored"
    sums = directory.joinpath("SHA256SUMS").read_text()
    listed = dict(reversed(line.split()) for line in sums.splitlines())
    there = {path.name: path.read_bytes() for path in directory.iterdir()}
    del there["SHA256SUMS"]
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in there.items()}
