"""Protection from other sites' pages and from host names that point here (DNS rebinding).

A page cannot send a token that it does not have, so these checks matter most if access control is
off; otherwise they cost nothing. Sources: fetch.spec.whatwg.org (CORS, Origin), OWASP on DNS
rebinding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final
from urllib.parse import urlsplit

from flask import Response, request

from labkeeper.core.errors import HostNotKnown, NotAllowed
from labkeeper.edge.hosts import Hosts
from labkeeper.identity.peers import PEER

HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Headers of every answer unless its handler sets another. No Strict-Transport-Security: it would
also apply to the Labs on this host."""
_CORS: Final = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, X-Request-Id",
    "Access-Control-Max-Age": "600",
}
_EXPOSED: Final = "Location, Retry-After, X-Request-Id"


class Guard:
    """Rejects forged browser requests and sets the security and CORS headers of answers."""

    def __init__(self, *, hosts: Iterable[str] = (), origins: Collection[str] = ()) -> None:
        """`hosts`: our names beyond those always safe; `origins`: sites with CORS access."""
        self._hosts = Hosts(hosts)
        self._origins = frozenset(origins)

    def check(self) -> Response | None:
        """Answer a CORS preflight, or accept the request. Raises HostNotKnown, NotAllowed."""
        if PEER in request.environ:
            # Browsers cannot use a Unix socket.
            return None
        if not self._hosts.know(request.host):
            raise HostNotKnown(
                f"cannot answer to the host name '{request.host[:255]}'; "
                "if it is the keeper's, add it to LABKEEPER_ALLOWED_HOSTS"
            )
        origin = request.headers.get("Origin")
        if origin is None or _netloc(origin) == request.host:
            return None
        if origin not in self._origins:
            raise NotAllowed(
                f"cannot answer a page of '{origin[:255]}'; "
                "to allow that, add it to LABKEEPER_ALLOWED_ORIGINS"
            )
        return Response(status=204) if "Access-Control-Request-Method" in request.headers else None

    def finish(self, answer: Response) -> Response:
        """Set the headers of an answer."""
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        if self._origins:
            answer.vary.add("Origin")
        origin = request.headers.get("Origin")
        if origin in self._origins:
            answer.headers["Access-Control-Allow-Origin"] = origin
            answer.headers["Access-Control-Expose-Headers"] = _EXPOSED
            if request.method == "OPTIONS":
                answer.headers.update(_CORS)
        return answer


def needs_own_page(what: str) -> None:
    """Raise NotAllowed unless the request comes from a page of its own origin.

    `what` completes "cannot ...".
    """
    origin = request.headers.get("Origin", "")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    if _netloc(origin) != request.host or site != "same-origin":
        raise NotAllowed(f"cannot {what} from a page of another site")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
