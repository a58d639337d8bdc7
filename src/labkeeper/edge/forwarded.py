"""Who sends a request: the peer of its connection, or whom a trusted proxy names instead.

A proxy adds the address of its peer to the end of `X-Forwarded-For`, and what was there before may
be of anyone's making. So the list is read from its end, for as long as its entries are proxies that
are trusted themselves. `Forwarded` (RFC 7239) is read the same way, if there is no `X-Forwarded-*`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from labkeeper.edge.heads import BadHead, Headers

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FOR: Final = b"x-forwarded-for"
_PROTO: Final = b"x-forwarded-proto"
_ENTRY: Final = re.compile(
    rb"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)"
)
"""An address; some proxies add a port."""
_SECURE: Final = {b"https": True, b"wss": True, b"http": False, b"ws": False}
"""Traefik names websockets by schemes of their own."""
_PAIR: Final = re.compile(rb'([A-Za-z]++)=(?:"([^"\\]*+)"|([^";,=\s]++))')
_ELEMENT: Final = re.compile(rb"[ \t]*+(?:%b[ \t]*+(?:;[ \t]*+|$))*+" % _PAIR.pattern)
_UNKNOWN: Final = re.compile(rb"unknown|_[A-Za-z0-9._-]+")
"""What stands for an address that a proxy does not tell (RFC 7239, 6)."""


class NetworkError(ValueError):
    """A text is not an address or a network."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends a request."""

    address: str
    secure: bool
    """Whether it uses TLS."""


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Return addresses and networks, such as `10.0.0.0/8`. Raises NetworkError."""
    try:
        return tuple(map(ipaddress.ip_network, texts))
    except ValueError as error:
        raise NetworkError("an address of a proxy does not fit") from error


def sender_of(peer: Sender, headers: Headers, trusted: tuple[Network, ...]) -> Sender:
    """Return who sends a request that a peer has sent or passed on.

    Raises BadHead if a trusted proxy says something that is not understood.
    """
    if not trusted or not is_trusted(peer.address, trusted):
        return peer
    names = {name for name, _ in headers}
    if _FOR in names or _PROTO in names:
        return Sender(
            _walk(peer.address, _values(headers, _FOR), trusted),
            _scheme(_values(headers, _PROTO), secure=peer.secure),
        )
    return _forwarded(peer, _values(headers, b"forwarded"), trusted)


def _walk(address: str, entries: list[bytes], trusted: tuple[Network, ...]) -> str:
    """Return the last address that is not a trusted proxy's; else the first of all."""
    for entry in reversed(entries):
        if not is_trusted(address, trusted):
            break
        address = _address(entry, "X-Forwarded-For")
    return address


def _scheme(values: list[bytes], *, secure: bool) -> bool:
    if not values:
        return secure
    if len(values) > 1 or values[0].lower() not in _SECURE:
        raise BadHead("X-Forwarded-Proto of the proxy must be 'http' or 'https'")
    return _SECURE[values[0].lower()]


def _forwarded(peer: Sender, elements: list[bytes], trusted: tuple[Network, ...]) -> Sender:
    """Read `Forwarded`: each element has the peer of one proxy, and how it has reached that."""
    sender = peer
    for element in reversed(elements):
        if not is_trusted(sender.address, trusted):
            break
        if not _ELEMENT.fullmatch(element):
            raise BadHead("Forwarded of the proxy is malformed")
        pairs = {m[1].lower(): m[2] or m[3] or b"" for m in _PAIR.finditer(element)}
        secure = _scheme([pairs[b"proto"]] if b"proto" in pairs else [], secure=sender.secure)
        node = pairs.get(b"for", b"unknown")
        if _UNKNOWN.fullmatch(node):
            return Sender(sender.address, secure)
        sender = Sender(_address(node, "Forwarded"), secure)
    return sender


def _values(headers: Headers, name: bytes) -> list[bytes]:
    """Return the elements of a list that may be spread over several headers (RFC 9110, 5.3)."""
    lists = (value.split(b",") for known, value in headers if known == name)
    return [element.strip(b" \t") for elements in lists for element in elements]


def _address(entry: bytes, where: str) -> str:
    found = _ENTRY.fullmatch(entry)
    try:
        if found is not None:
            return str(_plain(ipaddress.ip_address((found[1] or found[2] or found[3]).decode())))
    except ValueError:
        pass
    raise BadHead(f"{where} of the proxy has an entry that is no address")


def is_trusted(address: str, trusted: tuple[Network, ...]) -> bool:
    """Whether an address is that of a trusted proxy."""
    try:
        known = _plain(ipaddress.ip_address(address))
    except ValueError:
        # Of a Unix socket, or an address with a zone.
        return False
    return any(known in network for network in trusted)


def _plain(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an IPv4 address that a dual-stack socket shows as an IPv6 one as it is."""
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
