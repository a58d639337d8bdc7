"""The page of access: tokens and browser sessions, made and revoked."""

from __future__ import annotations

import re
import time

import pytest

from harness import until
from labkeeper.core.access import Caller, Scope, TokenLimits
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.testing.fakes import a_spec
from labkeeper.web import access
from web_pages import a_dashboard

PATH = "/dashboard/access"
EVIL = '"><script>alert(1)</script>'


@pytest.fixture
def site(tmp_path):
    with a_dashboard(tmp_path) as made:
        yield made


@pytest.fixture
def tokens(site):
    return site.running.services.tokens


@pytest.fixture
def sessions(site):
    return site.running.services.sessions


@pytest.fixture
def browser(site):
    made = site.browser()
    made.get(PATH)
    return made


def make(browser, **fields):
    return browser.post(f"{PATH}/tokens", **{"name": "ci", "scope": "manage"} | fields)


def test_tokens_are_listed_with_what_they_allow(tokens, browser):
    limits = TokenLimits(("ci-*",), {"team": "blue", "spot": ""}, ("ada",))
    _, text = tokens.make("ci", Scope.MANAGE, limits, lifetime=60)
    tokens.make("old", Scope.READ, TokenLimits(), lifetime=-1)
    page = browser.get(PATH)
    for shown in ("servers ci-*", "label team=blue", "label spot<", "user ada", "by <bdi>keeper<"):
        assert shown in page.text
    assert "expired" in page.text
    assert "never" in page.text.partition('id="token-ci"')[2]
    assert text not in page.text
    tokens.caller(text)
    used = browser.get(PATH).text.partition('id="token-ci"')[2].partition("</tr>")[0]
    assert "never" not in used


def test_without_tokens_the_page_teaches_what_they_are_for_with_the_form_open(browser):
    page = browser.get(PATH)
    assert "No tokens yet" in page.text
    assert '<details class="make" open>' in page.text


def test_a_token_is_made_as_the_form_says_and_shown_once(tokens, browser):
    page = make(
        browser,
        servers="ci-*, team-?",
        labels="team=blue, env = test 1,spot",
        users="ada bob",
        expires_in="30d",
    )
    assert page.status_code == 200
    (text,) = re.findall(r"lk_[0-9a-f]{12}_[\w-]{43}", page.text)
    assert page.headers["Cache-Control"] == "no-store"
    (token,) = tokens.all()
    assert tokens.caller(text)[0].actor == "token:ci"
    assert (token.scope, token.created_by) == (Scope.MANAGE, "token:ada")
    assert token.limits == TokenLimits(
        ("ci-*", "team-?"), {"team": "blue", "env": "test 1", "spot": ""}, ("ada", "bob")
    )
    assert token.expires_at == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert text not in browser.get(PATH).text


def test_mistakes_are_shown_at_their_fields_and_nothing_typed_is_lost(tokens, browser):
    typed = {
        "name": f"A {EVIL}",
        "servers": "UP",
        "labels": "a=1",
        "users": "-x",
        "expires_in": "soon",
    }
    page = make(browser, **typed)
    assert page.status_code == 422
    assert tokens.all() == []
    for name in ("name", "servers", "users", "expires_in"):
        assert f'id="wrong-{name}"' in page.text
        assert f'aria-describedby="hint-{name} wrong-{name}" aria-invalid="true"' in page.text
    assert "as wildcards" in page.text
    assert 'id="wrong-labels"' not in page.text
    assert 'value="a=1"' in page.text
    assert EVIL not in page.text
    assert 'value="A &#34;&gt;&lt;script&gt;' in page.text
    assert '<details class="make" open>' in page.text


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"scope": "admin", "servers": "a"}, 'id="wrong-scope">An admin&#39;s token cannot be'),
        ({"scope": "all"}, 'id="wrong-scope">Must be'),
        ({"labels": "a=1,a=2"}, 'id="wrong-labels">Must have each key once'),
        ({"name": ""}, 'id="wrong-name">'),
        ({"name": "owner"}, 'role="alert">Cannot create token &#39;owner&#39;: the name is taken'),
    ],
)
def test_each_mistake_is_explained(tokens, browser, fields, shown):
    page = make(browser, **fields)
    assert page.status_code in {409, 422}
    assert shown in page.text
    assert tokens.all() == []


def test_revoking_a_token_is_confirmed_with_what_is_lost(tokens, sessions, browser):
    token, text = tokens.make("ci", Scope.READ, TokenLimits(), lifetime=None)
    page = browser.get(f"{PATH}/tokens/ci/revoke")
    assert "browser session" not in page.text
    sessions.sign_in(token.caller)
    page = browser.get(f"{PATH}/tokens/ci/revoke")
    for loss in ("stop working at once", "One browser session that it has opened ends"):
        assert loss in page.text
    assert "signed out" not in page.text
    assert [known.name for known in tokens.all()] == ["ci"]
    answer = browser.post(f"{PATH}/tokens/ci/revoke")
    assert (answer.status_code, answer.headers["Location"]) == (303, PATH)
    assert tokens.all() == []
    assert [session.actor for session in sessions.all()] == ["token:ada"]
    assert text not in browser.get(PATH).text
    for answer in (
        browser.get(f"{PATH}/tokens/ci/revoke"),
        browser.post(f"{PATH}/tokens/x/revoke"),
    ):
        assert answer.status_code == 404
        assert "annot find token" in answer.text


def test_who_revokes_their_own_access_is_told_and_signed_out(site, tokens):
    token, _ = tokens.make("ada", Scope.ADMIN, TokenLimits(), lifetime=None)
    browser = site.browser()
    sessions = site.running.services.sessions
    page = browser.get(f"{PATH}/tokens/{token.name}/revoke")
    assert "This browser is signed in with it" in page.text
    page = browser.get(f"{PATH}/sessions/{browser.session.id}/revoke")
    assert "you will be signed out" in page.text
    assert browser.post(f"{PATH}/sessions/{browser.session.id}/revoke").status_code == 303
    assert sessions.all() == []
    assert browser.get(PATH).status_code == 401


def test_sessions_are_listed_and_revoked_with_those_that_follow(site, sessions, browser):
    keeper = site.running.keeper
    keeper.ask(Create(a_spec("lab")))
    until(lambda: keeper.get("lab").state is State.RUNNING)
    parent, _ = sessions.sign_in(Caller("token:bob", Scope.MANAGE))
    for server in ("lab", "gone"):
        sessions.follow(parent, server)
    page = browser.get(PATH)
    assert page.text.count("this browser") == 1
    assert f'id="session-{browser.session.id}"' in page.text
    assert '<a href="/dashboard/servers/lab">lab</a>' in page.text
    assert "/dashboard/servers/gone" not in page.text
    assert page.text.count(f"follows from <code>{parent.id}") == 2
    page = browser.get(f"{PATH}/sessions/{parent.id}/revoke")
    assert "Each of the 2 sessions for Labs" in page.text
    assert "signed out" not in page.text
    assert browser.post(f"{PATH}/sessions/{parent.id}/revoke").status_code == 303
    assert sessions.all() == [browser.session]
    assert browser.get(f"{PATH}/sessions/{parent.id}/revoke").status_code == 404


def test_many_sessions_are_cut_to_the_newest(sessions, browser, monkeypatch):
    monkeypatch.setattr(access, "_MOST", 2)
    newest = [sessions.sign_in(Caller(f"token:b{n}", Scope.READ))[0].id for n in range(3)][:0:-1]
    page = browser.get(PATH)
    assert re.findall(r'<tr id="session-(\w+)"', page.text) == newest
    assert "2 older ones are not shown" in page.text


@pytest.mark.parametrize("scope", [Scope.READ, Scope.MANAGE])
def test_only_administrators_have_the_page(site, tokens, scope):
    tokens.make("ci", Scope.READ, TokenLimits(), lifetime=None)
    browser = site.browser(scope)
    assert f'href="{PATH}"' not in browser.get("/dashboard/").text
    for path in (PATH, f"{PATH}/tokens/ci/revoke", f"{PATH}/sessions/x/revoke"):
        answer = browser.get(path)
        assert answer.status_code == 403
        assert "&#39;admin&#39;" in answer.text
    assert browser.post(f"{PATH}/tokens", name="x", scope="admin").status_code == 403
    assert browser.post(f"{PATH}/tokens/ci/revoke").status_code == 403
    assert [token.name for token in tokens.all()] == ["ci"]


@pytest.mark.parametrize("forged", [{"csrf": ""}, {"csrf": "0" * 64}, {"origin": "http://evil"}])
def test_forms_of_other_pages_are_refused(tokens, browser, forged):
    tokens.make("old", Scope.READ, TokenLimits(), lifetime=None)
    assert make(browser, **forged).status_code == 403
    for path in ("tokens/old", f"sessions/{browser.session.id}"):
        assert browser.post(f"{PATH}/{path}/revoke", **forged).status_code == 403
    assert [token.name for token in tokens.all()] == ["old"]


def test_a_form_of_another_site_gets_a_plain_answer(browser):
    """It is refused before it is known whose request it is."""
    answer = make(browser, origin="http://evil")
    assert answer.content_type == "text/plain; charset=utf-8"
    assert "cannot answer a page of 'http://evil'" in answer.text
    assert browser.get("/dashboard/static/x/none.js").status_code == 404


def test_names_of_actors_are_escaped(sessions, browser):
    sessions.sign_in(Caller(f"token:{EVIL}", Scope.READ))
    page = browser.get(PATH)
    assert EVIL not in page.text
    assert "token:&#34;&gt;&lt;script&gt;" in page.text
