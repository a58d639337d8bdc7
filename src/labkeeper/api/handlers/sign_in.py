"""How browsers sign in to Labs at other host names, from a session at the bare host.

1. A Lab's host sets a random cookie, the nonce, and redirects to the bare host with its hash.
2. The bare host issues a ticket if the browser has a session there that may manage this Lab.
3. The Lab's host accepts the ticket once, within 30 s, from a browser with this nonce: that of
   someone else's session is worthless in it (login CSRF).

The cookie of the session at the bare host is never sent to a Lab's host.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, urlencode

from flask import Response, g, request

from labkeeper.api.handlers.common import home_url, lab_origin
from labkeeper.api.links import LabTicket, Maker
from labkeeper.api.pages import page
from labkeeper.api.services import Services
from labkeeper.core.access import Scope, Session
from labkeeper.core.errors import NotAuthenticated, SessionNotFound, StoreError
from labkeeper.core.messages import Origin
from labkeeper.core.spec import QualifiedName
from labkeeper.edge.hosts import host_of
from labkeeper.edge.sessions import NONCE, SESSION, SIGN_IN
from labkeeper.identity.authenticators import Identity
from labkeeper.identity.tokens import digest_of

HOME: Final = "/dashboard/"
"""The page at the bare host to which a sign-in leads."""
ISSUE: Final = "/session/lab"
"""Where the bare host issues tickets."""
_LASTS: Final = 30.0
"""Seconds for which a ticket is valid."""
_NONCE_LASTS: Final = 600
_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_IN_A_PATH: Final = "/?&=%:+,;@!$'()*~"
"""What is not escaped in a path with a query that a browser has sent."""


def path_below(root: str, below: str) -> str:
    """Return a path below a Lab's; `below` is untrusted, and may have a query."""
    # With two slashes at its beginning, it would lead to another host.
    return root + quote(below.lstrip("/\\"), safe=_IN_A_PATH)


def is_person() -> bool:
    """Whether a person goes to the page that is asked for.

    Neither a browser that loads it ahead of time does, nor a frame.
    """
    ahead = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Moz"))
    return request.headers.get("Sec-Fetch-Dest", "document") == "document" and not any(
        "prefetch" in value.lower() for value in ahead
    )


def is_at(services: Services, server: QualifiedName | None) -> bool:
    """Whether the request is for a Lab's own host, or for the bare host (None)."""
    labs = services.labs
    host = (host_of(request.host) or "").lower().rstrip(".").strip("[]")
    return labs.is_home(host) if server is None else labs.is_of(server, host)


def session_of(services: Services, server: QualifiedName | None) -> Session | None:
    """Return the browser's session for a Lab, or at the bare host (None); None if it has none."""
    text = _only_cookie(services, SIGN_IN if server is None else SESSION)
    session = None if text is None else services.sessions.find(text)
    if session is None or session.server != server:
        return None
    services.sessions.use(session)
    return session


def identity(services: Services) -> Identity | None:
    """Return whose session the browser has at the bare host; None if it has none there."""
    session = session_of(services, None) if is_at(services, None) else None
    if session is None:
        return None
    g.session = session
    return Identity(session.caller, lambda: services.sessions.stands(session))


def not_signed_in(name: str) -> Response:
    """Return the page for a browser without a session for a Lab."""
    return page(
        HTTPStatus.UNAUTHORIZED,
        "You are not signed in to this Lab",
        "Open it with a link from whoever gave you its address. "
        f"Where the keeper runs, `labkeeper open {name}` opens it.",
    )


def ask_home(services: Services, name: str, below: str) -> Response:
    """Send a person without a session for a Lab to the bare host, or return the page for them."""
    home = home_url(services)
    at_once = home is not None and is_at(services, QualifiedName(name)) and is_person()
    # With a second cookie, which only another page can have set, no session would be accepted.
    if not at_once or len(_cookies(services, SESSION)) > 1 or len(_cookies(services, NONCE)) > 1:
        return not_signed_in(name)
    nonce = _only_cookie(services, NONCE) or ""
    if not _NONCE.fullmatch(nonce):
        nonce = secrets.token_urlsafe(32)
    query = urlencode({"lab": name, "page": below, "nonce": digest_of(nonce)})
    answer = _to(f"{home}{ISSUE}?{query}")
    # One that is there is kept: other tabs may be signing in with it.
    _set_cookie(services, answer, NONCE, nonce, lasts=_NONCE_LASTS)
    return answer


def issue(services: Services, name: QualifiedName, below: str, nonce: str) -> Response:
    """Issue a ticket for a Lab, and send the browser back with it."""
    session = session_of(services, None)
    if session is None or not is_person() or not session.scope.covers(Scope.MANAGE):
        return not_signed_in(name)
    snapshot = services.keeper.get(name)
    if snapshot is None or not session.caller.sees(snapshot):
        return page(
            HTTPStatus.NOT_FOUND,
            "There is no such Lab",
            f"Or the token that this browser is signed in with ({session.actor}) is not for it.",
        )
    ticket = services.links.make(LabTicket(session, name, below, nonce), lifetime=_LASTS)
    return _to(f"{lab_origin(services, name)}/open/{ticket}")


def redeem(services: Services, ticket: LabTicket) -> Response:
    """Begin a session for a Lab with a ticket that is used up now; lead to the page asked for."""
    there = _to(path_below(services.labs.cookie_path(ticket.server), ticket.page))
    if session_of(services, ticket.server) is not None:
        return there
    nonce = _only_cookie(services, NONCE)
    if nonce is None:
        return not_signed_in(ticket.server)
    if digest_of(nonce) != ticket.nonce:
        # Another tab has replaced the nonce, or this is another browser: it asks for its own.
        return there
    origin = Origin(ticket.session.actor, g.request_id)
    try:
        session, text = services.sessions.follow(ticket.session, ticket.server, origin=origin)
    except NotAuthenticated:
        return not_signed_in(ticket.server)
    set_session(services, there, session, text)
    return there


def begin(services: Services, maker: Maker) -> Response:
    """Begin a session at the bare host. Raises NotAuthenticated, StoreError."""
    origin = Origin(maker.caller.actor, g.request_id)
    session, text = services.sessions.sign_in(
        maker.caller, still_valid=maker.still_valid, origin=origin
    )
    answer = _to(HOME)
    set_session(services, answer, session, text)
    return answer


def sign_out(services: Services, session: Session | None) -> None:
    """End a browser's session, and the one at the bare host that it follows from.

    Else that would sign the next visit in again.
    """
    if session is None:
        return
    # If the disk is full, the session has ended nevertheless, and its cookie is deleted.
    with suppress(SessionNotFound, StoreError):
        services.sessions.revoke(
            session.parent or session.id,
            owner=session.owner,
            origin=Origin(session.actor, g.request_id),
        )


def set_session(services: Services, answer: Response, session: Session, text: str) -> None:
    """Set the cookie of a session."""
    _set_cookie(
        services,
        answer,
        SIGN_IN if session.server is None else SESSION,
        text,
        lasts=int(session.expires_at - session.created_at),
        path="/" if session.server is None else services.labs.cookie_path(session.server),
    )


def delete_session(services: Services, answer: Response, server: QualifiedName | None) -> None:
    """Delete the cookie of a session for a Lab, or at the bare host (None)."""
    answer.delete_cookie(
        services.labs.cookie(SIGN_IN if server is None else SESSION, secure=request.is_secure),
        path="/" if server is None else services.labs.cookie_path(server),
        secure=request.is_secure,
    )


def _set_cookie(
    services: Services, answer: Response, name: bytes, text: str, *, lasts: int, path: str = "/"
) -> None:
    answer.set_cookie(
        services.labs.cookie(name, secure=request.is_secure),
        text,
        max_age=lasts,
        path=path,
        secure=request.is_secure,
        httponly=True,
        samesite="Lax",
    )


def _cookies(services: Services, name: bytes) -> list[str]:
    return request.cookies.getlist(services.labs.cookie(name, secure=request.is_secure))


def _only_cookie(services: Services, name: bytes) -> str | None:
    """Return a cookie. If there are several, pages of other hosts may have set all but one."""
    found = _cookies(services, name)
    return found[0] if len(found) == 1 else None


def _to(url: str) -> Response:
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": url})
