"""Signing in to Labs at host names of their own, from a session at the bare host."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from fake_keeper import TOKEN, fake_keeper
from harness import until
from labkeeper.api.app import create_app
from labkeeper.api.links import Links
from labkeeper.core.access import Caller, Scope, TokenLimits
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.identity.tokens import digest_of
from labkeeper.lab_addresses import LabAddresses
from labkeeper.testing.fakes import a_spec
from labkeeper.web.dashboard import dashboard

DOMAIN = "labs.example.org"
HOME = f"http://{DOMAIN}:8000"
LAB = f"http://lab.{DOMAIN}:8000"
ADA = Caller("token:ada", Scope.MANAGE, TokenLimits(("lab*",)))
FRAME = {"Sec-Fetch-Dest": "iframe"}


class Browser:
    """A browser, as far as cookies go; what it asks a Lab for arrives as the edge rewrites it."""

    def __init__(self, app, scheme="http"):
        self._client = app.test_client()
        self._scheme = scheme

    def visit(self, url, method="GET", **headers):
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        host = parts.netloc.partition(":")[0]
        if host != DOMAIN and not target.startswith("/open/"):
            target = f"/servers/{host.removesuffix('.' + DOMAIN)}{target}"
        return self._client.open(
            target,
            method=method,
            base_url=f"{self._scheme}://{parts.netloc}",
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            environ_overrides={"REQUEST_URI": target},
        )

    def follow(self, url):
        """Visit a page, and follow redirects as far as the edge has an answer: a Lab."""
        answer = self.visit(url)
        while answer.status_code == 303:
            url = answer.headers["Location"]
            url = url if "://" in url else f"{LAB}{url}"
            answer = self.visit(url)
        return url, answer

    def cookies(self, host):
        return {c.key: c.value for c in self._client._cookies.values() if c.domain == host}

    def set_cookie(self, name, value, host, **options):
        self._client.set_cookie(name, value, domain=host, **options)

    def delete_cookie(self, name, host):
        self._client.delete_cookie(name, domain=host)


@pytest.fixture
def running(tmp_path):
    labs = LabAddresses("host", DOMAIN)
    with fake_keeper(tmp_path, labs=labs, hosts=[DOMAIN, f"*.{DOMAIN}"]) as made:
        for name in ("lab", "other"):
            made.keeper.ask(Create(a_spec(name)))
            until(lambda name=name: made.keeper.get(name).state is State.RUNNING)
        yield made


@pytest.fixture
def app(running):
    return create_app(running.services, dashboard(running.services))


@pytest.fixture
def browser(app):
    return Browser(app)


@pytest.fixture
def sessions(running):
    return running.services.sessions


def sign_in(browser, sessions, caller=ADA):
    """Sign a browser in at the bare host; return its session."""
    session, text = sessions.sign_in(caller)
    browser.set_cookie("labkeeper-sign-in", text, DOMAIN)
    return session


def ticket_of(browser):
    """Return the address with a ticket to which the bare host sends a browser."""
    home = browser.visit(f"{LAB}/lab/tree/x?y=1").headers["Location"]
    return browser.visit(home).headers["Location"]


def test_a_browser_that_is_signed_in_lands_where_it_wanted_to_go(browser, sessions):
    parent = sign_in(browser, sessions)
    sent = browser.visit(f"{LAB}/lab/tree/x%20y?a=b&c")
    assert sent.status_code == 303
    query = parse_qs(urlsplit(sent.headers["Location"]).query)
    nonce = browser.cookies(f"lab.{DOMAIN}")["labkeeper-nonce"]
    # The bare host never learns the nonce, nor anyone who reads its address.
    assert query == {
        "lab": ["lab"],
        "page": ["lab/tree/x%20y?a=b&c"],
        "nonce": [digest_of(nonce)],
    }
    home = browser.visit(sent.headers["Location"])
    assert home.headers["Location"].startswith(f"{LAB}/open/")
    there = browser.visit(home.headers["Location"])
    assert (there.status_code, there.headers["Location"]) == (303, "/lab/tree/x%20y?a=b&c")
    text = browser.cookies(f"lab.{DOMAIN}")["labkeeper-session"]
    session = sessions.find(text)
    assert (session.server, session.actor, session.parent) == ("lab", "token:ada", parent.id)
    assert "labkeeper-session" not in browser.cookies(DOMAIN)
    for answer in (sent, home, there):
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_without_a_session_at_the_bare_host_a_page_says_how_to_get_in(browser):
    url, page = browser.follow(f"{LAB}/lab")
    assert url.startswith(f"{HOME}/session/lab?")
    assert page.status_code == 401
    assert "You are not signed in to this Lab" in page.text
    url, missing = browser.follow(f"http://none.{DOMAIN}:8000/lab")
    assert missing.text.replace("open none`", "open lab`") == page.text


@pytest.mark.parametrize(
    ("caller", "status"),
    [
        (Caller("token:x", Scope.READ), 401),
        (Caller("token:x", Scope.MANAGE, TokenLimits(("ci-*",))), 404),
        (Caller("token:x", Scope.MANAGE, TokenLimits(labels={"team": "a"})), 404),
        (Caller("token:x", Scope.ADMIN, owner="bob"), 404),
    ],
)
def test_a_session_opens_only_labs_that_its_token_may_manage(browser, sessions, caller, status):
    session = sign_in(browser, sessions, caller)
    url, page = browser.follow(f"{LAB}/lab")
    assert (urlsplit(url).netloc, page.status_code) == (f"{DOMAIN}:8000", status)
    assert sessions.all(caller.owner) == [session]


def test_a_ticket_is_worthless_in_another_browser(app, browser, sessions):
    """As one that an attacker has for their own session: the victim would use it (login CSRF)."""
    sign_in(browser, sessions)
    for nonce in (None, "A" * 43):
        victim = Browser(app)
        if nonce is not None:
            victim.set_cookie("labkeeper-nonce", nonce, f"lab.{DOMAIN}")
        answer = victim.visit(ticket_of(browser))
        # It asks for its own, or has no cookies at all.
        assert answer.status_code == (401 if nonce is None else 303)
        assert answer.headers.get("Location", "/lab/tree/x?y=1") == "/lab/tree/x?y=1"
        assert "labkeeper-session" not in victim.cookies(f"lab.{DOMAIN}")
    assert [session.server for session in sessions.all()] == [None]


def test_a_ticket_works_once_for_half_a_minute_and_at_its_labs_host(tmp_path):
    now = [0.0]
    labs = LabAddresses("host", DOMAIN)
    links = Links(clock=lambda: now[0])
    with fake_keeper(tmp_path, labs=labs, hosts=[f"*.{DOMAIN}", DOMAIN], links=links) as running:
        for name in ("lab", "lab-2"):
            running.keeper.ask(Create(a_spec(name)))
        sessions = running.services.sessions
        browser = Browser(create_app(running.services))
        sign_in(browser, sessions)
        url = ticket_of(browser)
        elsewhere = url.replace("//lab.", "//lab-2.")
        for other in (elsewhere, url.replace("//lab.", "//"), url.replace(DOMAIN, "example.org")):
            assert browser.visit(other).status_code in {403, 410, 421}
        assert browser.visit(url, method="HEAD").status_code == 410
        assert browser.visit(url, method="POST", Origin=LAB).status_code == 410
        now[0] = 29.9
        assert browser.visit(url).status_code == 303
        browser.delete_cookie("labkeeper-session", f"lab.{DOMAIN}")
        assert browser.visit(url).status_code == 410
        url = ticket_of(browser)
        now[0] = 60.0
        assert browser.visit(url).status_code == 410


def test_a_ticket_of_a_session_that_was_revoked_is_worthless(browser, sessions):
    session = sign_in(browser, sessions)
    url = ticket_of(browser)
    sessions.revoke(session.id)
    assert browser.visit(url).status_code == 401
    assert sessions.all() == []


def test_tabs_that_sign_in_at_once_share_a_nonce(browser, sessions):
    sign_in(browser, sessions)
    first = browser.visit(f"{LAB}/lab/tree/a").headers["Location"]
    second = browser.visit(f"{LAB}/lab/tree/b").headers["Location"]
    first, second = (browser.visit(url).headers["Location"] for url in (first, second))
    assert browser.visit(second).headers["Location"] == "/lab/tree/b"
    assert browser.visit(first).headers["Location"] == "/lab/tree/a"
    # The second one found the session of the first.
    assert [session.server for session in sessions.all()] == [None, "lab"]


@pytest.mark.parametrize("tossed", ["labkeeper-session", "labkeeper-nonce"])
def test_with_a_second_cookie_there_is_a_page_and_no_endless_redirect(browser, sessions, tossed):
    sign_in(browser, sessions)
    for value, path in (("x", "/"), ("y", "/servers/lab/")):
        browser.set_cookie(tossed, value, f"lab.{DOMAIN}", path=path)
    assert browser.visit(f"{LAB}/lab").status_code == 401


def test_of_two_sign_in_cookies_none_is_accepted(browser, sessions):
    """Another Lab's page may have set one for the whole domain, where that is possible."""
    sign_in(browser, sessions)
    for path in ("/dashboard", "/session"):
        browser.set_cookie("labkeeper-sign-in", "x", DOMAIN, path=path)
    assert browser.visit(f"{HOME}/dashboard/").status_code == 401
    assert browser.follow(f"{LAB}/lab")[1].status_code == 401


def test_an_old_session_cookie_is_replaced(browser, sessions):
    sign_in(browser, sessions)
    browser.set_cookie("labkeeper-session", "lk_0_old", f"lab.{DOMAIN}")
    assert browser.visit(ticket_of(browser)).status_code == 303
    assert sessions.find(browser.cookies(f"lab.{DOMAIN}")["labkeeper-session"]) is not None


@pytest.mark.parametrize("headers", [FRAME, {"Sec-Purpose": "prefetch"}, {"X-Moz": "prefetch"}])
def test_only_a_person_is_sent_to_the_bare_host_and_back(browser, sessions, headers):
    sign_in(browser, sessions)
    home = browser.visit(f"{LAB}/lab").headers["Location"]
    assert browser.visit(f"{LAB}/lab", **headers).status_code == 401
    assert browser.visit(home, **headers).status_code == 401
    assert browser.visit(f"{LAB}/lab", method="HEAD").status_code in {303, 401}


@pytest.mark.parametrize(
    ("page", "location"),
    [
        ("//evil.example/x", "/evil.example/x"),
        ("/%5Cevil.example/x", "/evil.example/x"),
        ("%5C/evil.example", "/evil.example"),
        ("x%0d%0aSet-Cookie:%20a=b", "/x%0D%0ASet-Cookie:%20a=b"),
        ("", "/"),
    ],
)
def test_a_ticket_leads_to_its_lab_only(browser, sessions, page, location):
    sign_in(browser, sessions)
    home = browser.visit(f"{LAB}/start?next={page}", method="POST").headers["Location"]
    ticket = browser.visit(home).headers["Location"]
    assert browser.visit(ticket).headers["Location"] == location


@pytest.mark.parametrize(
    "query",
    [
        "",
        "lab=lab&page=x",
        "lab=lab&page=x&nonce=y",
        f"lab=LAB&page=x&nonce={'0' * 64}",
        f"lab=lab/x&page=x&nonce={'0' * 64}",
        f"lab=lab%60;rm&page=x&nonce={'0' * 64}",
    ],
)
def test_the_bare_host_issues_nothing_for_what_no_lab_has_sent(browser, sessions, query):
    sign_in(browser, sessions)
    assert browser.visit(f"{HOME}/session/lab?{query}").status_code == 404


def test_a_start_button_without_a_session_signs_in_first(browser, sessions):
    sign_in(browser, sessions)
    sent = browser.visit(f"{LAB}/start?next=lab%2Ftree%2Fx", method="POST", Origin=LAB)
    assert sent.status_code == 303
    home = browser.visit(sent.headers["Location"])
    assert browser.visit(home.headers["Location"]).headers["Location"] == "/lab/tree/x"


def link(app, token=TOKEN, **body):
    headers = {"Authorization": f"Bearer {token}"}
    answer = app.test_client().post("/api/me/link", json=body, headers=headers, base_url=HOME)
    assert answer.status_code == 201, answer.text
    return answer.json["url"]


def test_a_link_signs_a_browser_in_and_out_again(app, browser, sessions):
    url = link(app)
    assert url.startswith(f"{HOME}/open/")
    for _ in range(2):
        shown = browser.visit(url)
        assert "permissions of token:owner" in shown.text
        assert "<button" in shown.text
    assert browser.visit(url, method="POST", Origin=HOME).headers["Location"] == "/dashboard/"
    (cookie,) = browser._client._cookies.values()
    assert (cookie.key, cookie.path, cookie.http_only) == ("labkeeper-sign-in", "/", True)
    assert (cookie.same_site, cookie.domain, cookie.origin_only) == ("Lax", DOMAIN, True)
    (session,) = sessions.all()
    assert (session.scope, session.server) == (Scope.ADMIN, None)
    page = browser.visit(f"{HOME}/dashboard/")
    assert (page.status_code, "token:owner" in page.text) == (200, True)
    assert '<form method="post" action="/session/end">' in page.text
    assert browser.visit(url, method="POST", Origin=HOME).status_code == 410
    browser.follow(f"{LAB}/lab")
    assert len(sessions.all()) == 2
    assert "You are signed out" in browser.visit(f"{HOME}/session/end", "POST", Origin=HOME).text
    assert sessions.all() == []
    assert browser.cookies(DOMAIN) == {}
    assert browser.visit(f"{HOME}/dashboard/").status_code == 401


def test_signing_out_in_a_lab_signs_out_at_the_bare_host_too(browser, sessions):
    """Else the next visit would sign in again, whoever sits there now."""
    sign_in(browser, sessions)
    browser.follow(f"{LAB}/lab")
    assert len(sessions.all()) == 2
    assert "You are signed out" in browser.visit(f"{LAB}/logout").text
    assert sessions.all() == []


@pytest.mark.parametrize("site", ["same-site", "cross-site"])
def test_another_labs_page_cannot_sign_a_browser_out(browser, sessions, site):
    sign_in(browser, sessions)
    browser.follow(f"{LAB}/lab")
    shown = browser.visit(f"{LAB}/logout", Sec_Fetch_Site=site)
    assert '<form method="post"><button' in shown.text
    for other in ({"Origin": f"http://other.{DOMAIN}:8000"}, {"Origin": "null"}, {}):
        assert browser.visit(f"{LAB}/logout", method="POST", **other).status_code == 403
        assert browser.visit(f"{HOME}/session/end", method="POST", **other).status_code == 403
    assert len(sessions.all()) == 2
    assert browser.visit(f"{LAB}/logout", method="POST", Origin=LAB).status_code == 200
    assert sessions.all() == []


@pytest.mark.parametrize("origin", [None, "null", f"http://evil.{DOMAIN}:8000", LAB])
def test_no_other_page_can_sign_a_browser_in(app, browser, sessions, origin):
    """It could be as the page's author, whose Labs the person would then use as their own."""
    url = link(app)
    headers = {} if origin is None else {"Origin": origin}
    assert browser.visit(url, method="POST", **headers).status_code == 403
    assert sessions.all() == []
    assert browser.visit(url, method="POST", Origin=HOME).status_code == 303


def test_a_link_that_signs_in_works_at_the_bare_host_only(app, browser, sessions):
    """Else the cookie would be sent to a Lab's host."""
    url = link(app)
    for host in (f"lab.{DOMAIN}:8000", "127.0.0.1:8000", "localhost:8000"):
        other = url.replace(f"{DOMAIN}:8000", host)
        client = app.test_client()
        for method in ("GET", "POST"):
            answer = client.open(other, method=method, headers={"Origin": f"http://{host}"})
            assert answer.status_code == 410
    assert sessions.all() == []
    assert browser.visit(url, method="POST", Origin=HOME).status_code == 303


def test_the_pages_of_the_bare_host_are_nowhere_else(app, running):
    for path in ("/session/lab", "/session/end"):
        for host in ("127.0.0.1:8000", "localhost:8000", f"lab.{DOMAIN}:8000"):
            assert app.test_client().get(path, base_url=f"http://{host}").status_code in {404, 405}
    for labs in (LabAddresses("path"), LabAddresses("port", DOMAIN)):
        other = create_app(replace(running.services, labs=labs)).test_client()
        assert other.get("/session", base_url=HOME).status_code == 404
        headers = {"Authorization": f"Bearer {TOKEN}"}
        refused = other.post("/api/me/link", headers=headers, base_url=HOME)
        assert (refused.status_code, "LABKEEPER_LAB_DOMAIN" in refused.text) == (409, True)


def test_the_api_accepts_no_session(app, browser, sessions):
    sign_in(browser, sessions, Caller("token:owner", Scope.ADMIN))
    assert browser.visit(f"{HOME}/dashboard/").status_code == 200
    for path in ("/api/servers", "/api/me", "/api/sessions", "/metrics"):
        assert browser.visit(f"{HOME}{path}").status_code == 401
    for path in ("/api/tokens", "/api/servers", "/api/me/link"):
        assert browser.visit(f"{HOME}{path}", method="POST", Origin=HOME).status_code == 401


def test_a_reader_may_sign_in_but_opens_no_lab(app, browser, running):
    _, token = running.services.tokens.make("r", Scope.READ, TokenLimits(), lifetime=None)
    assert browser.visit(link(app, token), method="POST", Origin=HOME).status_code == 303
    assert browser.visit(f"{HOME}/dashboard/").status_code == 200
    _, answer = browser.follow(f"{LAB}/lab")
    assert (answer.status_code, "not signed in to this Lab" in answer.text) == (401, True)


def test_nobody_ends_the_sessions_of_others_by_signing_in(sessions):
    sessions.sign_in(Caller("token:other", Scope.READ))
    began = [sessions.sign_in(ADA)[0].id for _ in range(110)]
    left = sessions.all()
    assert [session.actor for session in left[:1]] == ["token:other"]
    assert [session.id for session in left[1:]] == began[10:]


def test_links_and_sessions_end_with_the_token_that_made_them(app, browser, running, sessions):
    tokens = running.services.tokens
    _, text = tokens.make("ada", Scope.MANAGE, TokenLimits(("lab",)), lifetime=3600.0)
    used, unused = link(app, text), link(app, text)
    browser.visit(used, method="POST", Origin=HOME)
    browser.follow(f"{LAB}/lab")
    (parent, child) = sessions.all()
    assert parent.limits == TokenLimits(("lab",))
    (token,) = tokens.all()
    assert parent.expires_at == child.expires_at == token.expires_at
    headers = {"Authorization": f"Bearer {TOKEN}"}
    revoked = app.test_client().delete("/api/tokens/ada", headers=headers)
    assert revoked.status_code == 200
    assert sessions.all() == []
    assert browser.visit(unused).status_code == 410
    assert browser.visit(unused, method="POST", Origin=HOME).status_code == 410


def test_sessions_are_listed_and_revoked(app, browser, sessions):
    sign_in(browser, sessions)
    browser.follow(f"{LAB}/lab")
    client, headers = app.test_client(), {"Authorization": f"Bearer {TOKEN}"}
    listed = client.get("/api/sessions", headers=headers).json["sessions"]
    (parent, child) = listed
    assert [(one["server"], one["scope"], one["parent"]) for one in listed] == [
        (None, "manage", None),
        ("lab", "manage", parent["id"]),
    ]
    assert all(one["last_used_at"] >= one["created_at"] for one in listed)
    assert client.delete(f"/api/sessions/{parent['id']}", headers=headers).status_code == 200
    assert sessions.all() == []
    assert client.delete(f"/api/sessions/{child['id']}", headers=headers).status_code == 404


def test_over_tls_no_other_host_can_set_the_cookies(app, sessions):
    browser = Browser(app, "https")
    session, text = sessions.sign_in(ADA)
    browser.set_cookie("labkeeper-sign-in", text, DOMAIN)
    assert browser.visit(HOME + "/dashboard/").status_code == 401
    browser.set_cookie("__Host-labkeeper-sign-in", text, DOMAIN, secure=True)
    sent = browser.visit(f"{LAB}/lab").headers["Location"]
    assert sent.startswith(f"https://{DOMAIN}:8000/session/lab?")
    assert browser.visit(browser.visit(sent).headers["Location"]).status_code == 303
    made = browser.cookies(f"lab.{DOMAIN}")
    assert made.keys() == {"__Host-labkeeper-nonce", "__Host-labkeeper-session"}
    assert all(
        c.secure and c.path == "/" for c in browser._client._cookies.values() if "__" in c.key
    )
    assert sessions.find(made["__Host-labkeeper-session"]).parent == session.id
