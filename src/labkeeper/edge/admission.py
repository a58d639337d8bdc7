"""Who may go where: a request for a Lab goes there, or to the keeper's page, or is refused.

* A browser with a session for the Lab is admitted as the session's user. Its own credentials for
  Jupyter, if it sends any, are taken away.
* A program that sends a Jupyter token is admitted without cookies; Jupyter checks the token.
* For all others, the keeper has a page.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, NamedTuple

from labkeeper.edge.heads import Request, header
from labkeeper.edge.routes import LABS, Place, RouteTable
from labkeeper.edge.sessions import Session, SessionTable, cookie_name, without_cookie

_TOKEN: Final = re.compile(rb"[?&]token=")
_LINKS: Final = b"/open/"
"""Where the keeper's links are, also at the host names of Labs: they set cookies for these."""
_BUTTONS: Final = frozenset({b"start", b"logout"})
"""Where the buttons of the keeper's pages about a Lab post to, below its address."""
_SAFE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1)."""
_LOCALHOST: Final = re.compile(rb"localhost(:[0-9]+)?", re.IGNORECASE)


class ToLab(NamedTuple):
    """The request goes to a Lab."""

    server: str
    session: Session | None
    """None: Jupyter checks who it is."""


@dataclass(frozen=True, slots=True)
class ToKeeper:
    """The request goes to the keeper."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The browser is sent to another address."""

    location: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is refused."""

    status: HTTPStatus
    detail: str


Admission = ToLab | ToKeeper | Elsewhere | Refused


def admit(
    request: Request,
    place: Place,
    routes: RouteTable,
    sessions: SessionTable,
    *,
    secure: bool,
) -> Admission:
    """Decide on a request for a Lab's address; may change its target and remove some headers.

    `secure` says whether the client uses TLS.
    """
    server = place.server
    if place.is_host and request.path.startswith(_LINKS):
        return ToKeeper()
    # At `localhost` is the dashboard, so no page of a Lab may be there.
    at_home = not place.is_host and _LOCALHOST.fullmatch(request.host)
    cookie = cookie_name(secure=secure, is_host=place.is_host)
    session = sessions.find(request.headers, cookie, server, time.time())
    if session is not None and not at_home:
        return _admit_user(request, place, session, routes)
    pressed = _is_button(request, place) and _is_for_a_page(request)
    if not _is_navigation(request) and not pressed:
        if _has_token(request):
            _take_away(request, b"cookie")
            return ToLab(server, None)
        return Refused(
            HTTPStatus.UNAUTHORIZED,
            f"cannot open server '{server}': you are not signed in; use `labkeeper open`, a link, "
            "or send the server's token",
        )
    if at_home:
        _, colon, port = request.host.partition(b":")
        scheme = b"https" if secure else b"http"
        return Elsewhere(b"%b://127.0.0.1%b%b%b" % (scheme, colon, port, request.target))
    return _to_page(request, place)


def _admit_user(request: Request, place: Place, session: Session, routes: RouteTable) -> Admission:
    """Decide on a request of a browser with a session for the Lab."""
    server = session.server
    if _is_button(request, place):
        # Another tab may have started the Lab meanwhile.
        return _to_page(request, place)
    route = routes.find(server)
    if route is None and _is_navigation(request):
        return _to_page(request, place)
    if route is None:
        return Refused(HTTPStatus.NOT_FOUND, f"cannot find a running server '{server}' here")
    if request.path == route.base_url.encode() + b"logout":
        # Jupyter's own knows nothing of the session; the keeper's has one address.
        request.target = b"%b%b/logout" % (LABS.encode(), server.encode())
        return ToKeeper()
    if _is_foreign(request):
        return Refused(
            HTTPStatus.FORBIDDEN, f"cannot open server '{server}' for a page of another site"
        )
    _take_away(request, b"authorization")
    request.headers = without_cookie(request.headers)
    return ToLab(server, session)


def _to_page(request: Request, place: Place) -> ToKeeper:
    """Send a person to the keeper's page about a Lab, which has one address."""
    if place.is_host:
        request.target = b"%b%b%b" % (LABS.encode(), place.server.encode(), request.target)
    return ToKeeper()


def _base(place: Place) -> bytes:
    """Return the path of a Lab's address."""
    return b"/" if place.is_host else b"%b%b/" % (LABS.encode(), place.server.encode())


def _take_away(request: Request, name: bytes) -> None:
    request.headers = [pair for pair in request.headers if pair[0] != name]


def _has_token(request: Request) -> bool:
    return header(request.headers, b"authorization") is not None or bool(
        _TOKEN.search(request.target)
    )


def _is_foreign(request: Request) -> bool:
    """Whether a page of another site would change something, or open a websocket.

    Jupyter checks that, but not all extensions do, nor does every app below a Lab. Browsers send
    cookies that are `SameSite=Lax` from one Lab to another one if they share a domain.
    """
    if request.method in _SAFE and not request.websocket:
        return False
    site = header(request.headers, b"sec-fetch-site")
    if site is not None:
        return site not in {b"same-origin", b"none"}
    # Some browsers, and all without TLS, do not say it.
    origin = header(request.headers, b"origin")
    return origin is not None and origin.partition(b"://")[2].lower() != request.host.lower()


def _is_navigation(request: Request) -> bool:
    """Whether a person goes to a page."""
    return request.method in {b"GET", b"HEAD"} and _is_for_a_page(request)


def _is_button(request: Request, place: Place) -> bool:
    """Whether it is what a button of the keeper's pages sends."""
    if request.method != b"POST":
        return False
    base, path = _base(place), request.path
    return path.startswith(base) and path.removeprefix(base) in _BUTTONS


def _is_for_a_page(request: Request) -> bool:
    """Whether a page is to be shown (Fetch Metadata); old browsers only accept HTML."""
    if request.websocket:
        return False
    mode = header(request.headers, b"sec-fetch-mode")
    if mode is not None:
        return mode == b"navigate"
    return b"text/html" in (header(request.headers, b"accept") or b"")
