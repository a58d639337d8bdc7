"""Protection from other sites' pages and from host names that point here (DNS rebinding).

A page cannot send a token that it does not have, so these checks matter most if access control is
off; otherwise they cost nothing. Sources: fetch.spec.whatwg.org (CORS, Origin), OWASP on DNS
rebinding.
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
        self._hosts = frozenset(host.lower() for host in (*hosts, socket.gethostname()))
        self._origins = frozenset(origins)

    def check(self) -> Response | None:
        """Answer a CORS preflight, or accept the request. Raises HostNotKnown, NotAllowed."""
        if PEER in request.environ:
            # Browsers cannot use a Unix socket.
            return None
        host = host_of(request.host)
        if host is None or not self._is_ours(host.strip("[]").rstrip(".").lower()):
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

    def _is_ours(self, host: str) -> bool:
        """Whether a host name is ours. An attacker's has a dot in it and is no address."""
        if not {".", ":"} & set(host) or host.endswith(".localhost") or _is_address(host):
            return True
        parents = {f"*{host[at:]}" for at in range(len(host)) if host[at] == "."}
        return not self._hosts.isdisjoint({host, "*", *parents})


def host_of(header: str) -> str | None:
    """Return the name or address in a Host header, without the port; None if invalid."""
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
