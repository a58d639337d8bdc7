"""What a browser could be made to do against its user: pages of other sites that ask us, and names that lead to us.

A page cannot show a token that it does not have, so these checks matter most where access control is off; they cost nothing where
it is on. Sources: fetch.spec.whatwg.org (CORS, Origin), OWASP on DNS rebinding.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection, Iterable
from typing import Final
from urllib.parse import urlsplit

from flask import Response, request

from labkeeper.core.errors import HostNotKnown, NotAllowed
from labkeeper.identity.peers import PEER

HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of each answer, unless its handler sets another. No Strict-Transport-Security: it would hold for the Labs beside us, too."""
_CORS: Final = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, X-Request-Id",
    "Access-Control-Max-Age": "600",
}
_EXPOSED: Final = "Location, Retry-After, X-Request-Id"


class Guard:
    """Refuses requests that a browser was tricked into, and tells browsers what they may do with answers."""

    def __init__(self, *, hosts: Iterable[str] = (), origins: Collection[str] = ()) -> None:
        """`hosts` are names that lead to us beside those that cannot be anybody else's; `origins` are sites that may ask us."""
        self._hosts = frozenset(host.lower() for host in (*hosts, socket.gethostname()))
        self._origins = frozenset(origins)

    def check(self) -> Response | None:
        """Answer a browser's question whether it may ask, or let the present request pass. Raises HostNotKnown, NotAllowed."""
        if PEER in request.environ:
            # No browser speaks to a Unix socket.
            return None
        host = host_of(request.host)
        if host is None or not self._is_ours(host.strip("[]").rstrip(".").lower()):
            raise HostNotKnown(
                f"cannot answer to the host name '{request.host[:255]}'; where it is the keeper's, LABKEEPER_ALLOWED_HOSTS "
                "must have it"
            )
        origin = request.headers.get("Origin")
        if origin is None or _netloc(origin) == request.host:
            return None
        if origin not in self._origins:
            raise NotAllowed(
                f"cannot answer to a page of '{origin[:255]}'; where that is to be, LABKEEPER_ALLOWED_ORIGINS must have it"
            )
        return Response(status=204) if "Access-Control-Request-Method" in request.headers else None

    def finish(self, answer: Response) -> Response:
        """Put the headers on an answer."""
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

    def _is_ours(self, host: str) -> bool:
        """Whether a host name leads to us. One that an attacker owns has a dot in it, and is no address."""
        if not {".", ":"} & set(host) or host.endswith(".localhost") or _is_address(host):
            return True
        parents = {f"*{host[at:]}" for at in range(len(host)) if host[at] == "."}
        return not self._hosts.isdisjoint({host, "*", *parents})


def host_of(header: str) -> str | None:
    """Return the host name or address of a Host header, without the port; None where it is neither."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?", header)
    return found[1] if found else None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
