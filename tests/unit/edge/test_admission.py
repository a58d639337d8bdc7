"""Who may go where, by cookies, tokens, and what the request is for."""

from __future__ import annotations

import functools
import hashlib
import time
from http import HTTPStatus

import pytest

from edge_peers import WEBSOCKET
from labkeeper.edge import admission
from labkeeper.edge.admission import Elsewhere, Refused, ToKeeper, ToLab
from labkeeper.edge.heads import read_request
from labkeeper.edge.routes import Place, Route, RouteTable, place_of
from labkeeper.edge.sessions import Session, SessionTable

admit = functools.partial(admission.admit, secure=False)

COOKIE = b"Cookie: labkeeper-session=secret"
HTML = b"Accept: text/html"
NAVIGATION = b"Sec-Fetch-Mode: navigate"
BELOW, HOST = Place("lab", is_host=False), Place("lab", is_host=True)


def session_for(server="lab", cookie=b"secret", lasts=60.0):
    return Session(hashlib.sha256(cookie).hexdigest(), server, "ada", time.time() + lasts)


@pytest.fixture
def sessions():
    table = SessionTable()
    table.add([session_for()])
    return table


@pytest.fixture
def routes():
    table = RouteTable()
    table.set(Route("lab", 1, "127.0.0.1", 1, "/servers/lab/", "key"))
    return table


def request(*headers, target=b"/servers/lab/x", method=b"GET", host=b"x"):
    head = [b"%b %b HTTP/1.1" % (method, target), b"Host: " + host, *headers, b"", b""]
    return read_request(b"\r\n".join(head))


@pytest.mark.parametrize("more", [[], [NAVIGATION], [HTML], list(WEBSOCKET)])
def test_a_browser_with_a_session_is_let_in_as_its_user(sessions, routes, more):
    admitted = admit(request(COOKIE, *more), BELOW, routes, sessions)
    assert admitted == ToLab("lab", session_for(lasts=0) and admitted.session)
    assert (admitted.session.server, admitted.session.user) == ("lab", "ada")


def test_the_lab_gets_the_other_cookies_and_no_credentials(sessions, routes):
    asked = request(
        b"Cookie: _xsrf=a; labkeeper-session=secret; b=c=d;e",
        b"Cookie: labkeeper-sign-in=x; __Host-labkeeper-sign-in=x; __Secure-labkeeper-nonce=x",
        b"Authorization: token forged",
        b"Accept: x",
    )
    admit(asked, BELOW, routes, sessions)
    assert asked.headers == [(b"host", b"x"), (b"accept", b"x"), (b"cookie", b"_xsrf=a; b=c=d")]


@pytest.mark.parametrize(
    "cookie",
    [
        b"Cookie: labkeeper-session=other",
        b"Cookie: labkeeper-session=",
        b"Cookie: labkeeper-session",
        b"Cookie: Labkeeper-Session=secret",
        b"Cookie: labkeeper-session=secret; labkeeper-session=secret",
        b"Cookie: labkeeper-session=secret; labkeeper-session=",
        b"Cookie: labkeeper-session=secretx",
        b"Accept: x",
    ],
)
def test_without_one_valid_cookie_nobody_is_let_in(sessions, routes, cookie):
    assert admit(request(cookie), BELOW, routes, sessions).status == 401
    assert admit(request(cookie, NAVIGATION), BELOW, routes, sessions) == ToKeeper()


def test_cookies_in_two_headers_count_together(sessions, routes):
    assert admit(request(COOKIE, COOKIE), BELOW, routes, sessions).status == 401
    asked = request(b"Cookie: a=b", COOKIE, b"Cookie: c=d")
    assert isinstance(admit(asked, BELOW, routes, sessions), ToLab)
    assert asked.headers == [(b"host", b"x"), (b"cookie", b"a=b; c=d")]


def test_a_session_is_for_one_server_and_for_its_time(routes):
    table = SessionTable()
    table.add([session_for("other"), session_for(cookie=b"late", lasts=-1.0)])
    assert admit(request(COOKIE), BELOW, routes, table).status == 401
    late = request(b"Cookie: labkeeper-session=late")
    assert admit(late, BELOW, routes, table).status == 401


@pytest.mark.parametrize(
    "asked",
    [
        {"headers": [b"Authorization: token x"]},
        {"headers": [b"Authorization: Bearer x"], "method": b"POST"},
        {"target": b"/servers/lab/api?token=x"},
        {"target": b"/servers/lab/api?a=b&token=x", "headers": list(WEBSOCKET)},
    ],
)
def test_a_program_with_a_token_is_let_in_without_cookies(sessions, routes, asked):
    headers = [b"Cookie: username-x=y", *asked.pop("headers", ())]
    program = request(*headers, **asked)
    assert admit(program, BELOW, routes, sessions) == ToLab("lab", None)
    assert b"cookie" not in dict(program.headers)


def test_a_token_in_the_address_of_a_page_lets_no_browser_in(sessions, routes):
    """It would be in its history, and without cookies the page would not work."""
    asked = request(NAVIGATION, target=b"/servers/lab/lab?token=x")
    assert admit(asked, BELOW, routes, sessions) == ToKeeper()


@pytest.mark.parametrize(
    ("headers", "method", "navigates"),
    [
        ([NAVIGATION], b"GET", True),
        ([HTML], b"GET", True),
        ([HTML], b"HEAD", True),
        ([b"Accept: application/xhtml+xml,text/html;q=0.9"], b"GET", True),
        ([HTML, b"Sec-Fetch-Mode: cors"], b"GET", False),
        ([HTML, b"Sec-Fetch-Mode: no-cors"], b"GET", False),
        ([NAVIGATION], b"POST", False),
        ([HTML, *WEBSOCKET], b"GET", False),
        ([b"Accept: */*"], b"GET", False),
        ([], b"GET", False),
    ],
)
def test_people_get_a_page_and_programs_an_error(sessions, routes, headers, method, navigates):
    admitted = admit(request(*headers, method=method), BELOW, routes, sessions)
    assert isinstance(admitted, ToKeeper if navigates else Refused)


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ([], False),
        ([b"Origin: http://x"], False),
        ([b"Origin: https://X"], False),
        ([b"Origin: http://x:8000"], True),
        ([b"Origin: http://other.x"], True),
        ([b"Origin: http://evil.example/x"], True),
        ([b"Origin: x"], True),
        ([b"Origin: null"], True),
        ([b"Sec-Fetch-Site: same-origin", b"Origin: null"], False),
        ([b"Sec-Fetch-Site: none"], False),
        ([b"Sec-Fetch-Site: same-site"], True),
        ([b"Sec-Fetch-Site: cross-site", b"Origin: http://x"], True),
    ],
)
def test_pages_of_other_sites_only_read(sessions, routes, headers, foreign):
    for method in (b"POST", b"PUT", b"PATCH", b"DELETE"):
        asked = request(COOKIE, *headers, method=method)
        admitted = admit(asked, BELOW, routes, sessions)
        assert getattr(admitted, "status", None) == (403 if foreign else None)
        # A program's token is not sent by a browser on its own.
        asked = request(b"Authorization: token x", *headers, method=method)
        assert admit(asked, BELOW, routes, sessions) == ToLab("lab", None)
    opened = admit(request(COOKIE, *headers, *WEBSOCKET), BELOW, routes, sessions)
    assert getattr(opened, "status", None) == (403 if foreign else None)
    for method in (b"GET", b"HEAD", b"OPTIONS"):
        read = admit(request(COOKIE, *headers, method=method), BELOW, routes, sessions)
        assert isinstance(read, ToLab)


def test_a_server_that_does_not_run_is_told_only_to_who_has_a_session(sessions):
    none = RouteTable()
    assert admit(request(COOKIE), BELOW, none, sessions).status == 404
    assert admit(request(), BELOW, none, sessions).status == 401
    assert admit(request(COOKIE, NAVIGATION), BELOW, none, sessions) == ToKeeper()


@pytest.mark.parametrize("place", [BELOW, HOST])
def test_the_button_that_starts_a_lab_is_the_keepers(sessions, routes, place):
    """Also if the Lab runs by now, or is at a deeper path: the button has one address."""
    base = b"/" if place.is_host else b"/servers/lab/"
    deep = RouteTable()
    deep.set(Route("lab", 2, "127.0.0.1", 1, "/servers/lab/deep/er/", "key"))
    for table in (RouteTable(), routes, deep):
        pressed = request(COOKIE, NAVIGATION, target=base + b"start?next=x", method=b"POST")
        assert admit(pressed, place, table, sessions) == ToKeeper()
        assert pressed.target == b"/servers/lab/start?next=x"
    for other in (base + b"start/x", base + b"x/start", base + b"started"):
        asked = request(COOKIE, target=other, method=b"POST")
        assert isinstance(admit(asked, place, routes, sessions), ToLab)
        asked = request(COOKIE, target=other, method=b"POST")
        assert admit(asked, place, RouteTable(), sessions).status == 404
    # It is nothing for programs.
    program = request(b"Authorization: token x", target=base + b"start", method=b"POST")
    assert admit(program, place, routes, sessions) == ToLab("lab", None)


@pytest.mark.parametrize("place", [BELOW, HOST])
@pytest.mark.parametrize("name", [b"start", b"logout"])
@pytest.mark.parametrize("person", [NAVIGATION, HTML])
def test_a_button_that_is_pressed_after_the_session_has_ended_has_a_page(
    sessions, routes, place, name, person
):
    base = b"/" if place.is_host else b"/servers/lab/"
    pressed = request(person, target=base + name + b"?next=x", method=b"POST")
    assert admit(pressed, place, routes, sessions) == ToKeeper()
    assert pressed.target == b"/servers/lab/" + name + b"?next=x"
    for script in ([HTML, b"Sec-Fetch-Mode: cors"], [], [b"Accept: */*"]):
        asked = request(*script, target=base + name, method=b"POST")
        assert admit(asked, place, routes, sessions).status == 401


def test_logging_out_is_the_keepers(sessions, routes):
    routes.set(Route("lab", 2, "127.0.0.1", 1, "/servers/lab/deep/er/", "key"))
    leaves = request(COOKIE, NAVIGATION, target=b"/servers/lab/deep/er/logout")
    assert admit(leaves, BELOW, routes, sessions) == ToKeeper()
    assert leaves.target == b"/servers/lab/logout"
    # Else it would lose the cookie by which it knows the session.
    assert (b"cookie", b"labkeeper-session=secret") in leaves.headers


@pytest.mark.parametrize(
    ("host", "location"),
    [
        (b"localhost:8000", b"http://127.0.0.1:8000/servers/lab/x"),
        (b"LocalHost", b"http://127.0.0.1/servers/lab/x"),
        (b"localhost.example.org", None),
        (b"a.localhost", None),
        (b"127.0.0.1:8000", None),
    ],
)
def test_a_page_of_a_lab_is_at_another_host_than_the_keeper(sessions, routes, host, location):
    admitted = admit(request(HTML, host=host), BELOW, routes, sessions)
    assert admitted == (ToKeeper() if location is None else Elsewhere(location))


def test_no_page_of_a_lab_is_where_the_dashboard_is(sessions, routes):
    """Not even with a session, whose cookie the browser may have for that host as well."""
    sent = request(COOKIE, NAVIGATION, host=b"localhost:8000")
    assert admit(sent, BELOW, routes, sessions) == Elsewhere(b"http://127.0.0.1:8000/servers/lab/x")
    loaded = request(COOKIE, host=b"localhost:8000")
    assert admit(loaded, BELOW, routes, sessions).status == HTTPStatus.UNAUTHORIZED


def test_with_a_domain_each_lab_has_a_host(sessions, routes):
    routes.set(Route("lab", 2, "127.0.0.1", 1, "/", "key"))
    assert isinstance(admit(request(COOKIE, target=b"/lab"), HOST, routes, sessions), ToLab)
    page = request(NAVIGATION, target=b"/lab/tree?a=b", host=b"localhost")
    assert admit(page, HOST, routes, sessions) == ToKeeper()
    # The keeper has one address for its pages about Labs.
    assert page.target == b"/servers/lab/lab/tree?a=b"
    leaves = request(COOKIE, NAVIGATION, target=b"/logout")
    assert admit(leaves, HOST, routes, sessions) == ToKeeper()
    assert leaves.target == b"/servers/lab/logout"
    # Links set the cookie for the host that they are at.
    link = request(target=b"/open/ticket")
    assert admit(link, HOST, routes, sessions) == ToKeeper()
    assert link.target == b"/open/ticket"


DOMAIN = "labs.example.org"


@pytest.mark.parametrize(
    ("host", "server"),
    [
        (b"lab.labs.example.org", "lab"),
        (b"LAB.labs.Example.org:8000", "lab"),
        (b"lab.labs.example.org.", "lab"),
        (b"lab.ada.labs.example.org", "lab.ada"),
        (b"labs.example.org", None),
        (b"example.org", None),
        (b"lab.example.org", None),
        (b"lab.labs.example.org.evil.example", None),
        (b"lablabs.example.org", None),
        (b"-.labs.example.org", None),
        (b"127.0.0.1:8000", None),
        (b"[::1]:8000", None),
        (b"localhost", None),
    ],
)
def test_a_host_name_below_the_domain_is_that_of_a_server(host, server):
    expected = None if server is None else Place(server, is_host=True)
    assert place_of(host, b"/servers/other/lab", DOMAIN) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/servers/lab/", Place("lab", is_host=False)),
        (b"/servers/lab.ada/x", Place("lab.ada", is_host=False)),
        (b"/servers/lab", Place("lab", is_host=False, is_bare=True)),
        (b"/servers/", None),
        (b"/servers/-/", None),
        (b"/api/servers/lab/", None),
    ],
)
def test_without_a_domain_a_path_is_that_of_a_server(path, expected):
    assert place_of(b"lab.labs.example.org", path, "") == expected
