"""The host names at which we answer: for all others, another site's name may point here."""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Iterable

_HEADER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


class Hosts:
    """Our host names (see OWASP on DNS rebinding)."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names` are ours beyond those always safe; `*.example.org` are all below a domain."""
        self._names = frozenset(name.lower() for name in (*names, socket.gethostname()))
        self.know = functools.lru_cache(maxsize=1024)(self._know)
        """Whether a Host header names us."""

    def _know(self, header: str) -> bool:
        """Whether a host name is ours. An attacker's has a dot in it and is no address."""
        found = host_of(header)
        if found is None:
            return False
        host = found.strip("[]").rstrip(".").lower()
        if not {".", ":"} & set(host) or host.endswith(".localhost") or _is_address(host):
            return True
        parents = {f"*{host[at:]}" for at in range(len(host)) if host[at] == "."}
        return not self._names.isdisjoint({host, "*", *parents})


def host_of(header: str) -> str | None:
    """Return the name or address in a Host header, without the port; None if invalid."""
    found = _HEADER.fullmatch(header)
    return found[1] if found else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
