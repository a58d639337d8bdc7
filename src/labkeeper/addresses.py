"""Listening addresses, and the URLs that lead to them."""

from __future__ import annotations

import ipaddress
from typing import Final

_LOOPBACKS: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
"""Wildcard addresses, and the loopback address that reaches each."""


def is_wildcard(address: str) -> bool:
    """Whether an address is a wildcard."""
    return address in _LOOPBACKS


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def from_here(address: str) -> str:
    """Return the address by which this machine reaches a listener on `address`."""
    return _LOOPBACKS.get(address, address)


def url(scheme: str, host: str, port: int | None = None, path: str = "") -> str:
    """Return a URL; an IPv6 address gets its brackets (RFC 3986, 3.2.2) if it has none."""
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{scheme}://{host}{'' if port is None else f':{port}'}{path}"
