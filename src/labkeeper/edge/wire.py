"""The control protocol between keeper and edge: JSON objects in frames, mutually authenticated.

A frame is the object's length in four bytes (big-endian), then the object. Both sides know a key.
The edge, which listens, begins:

1. edge: `{"version": 1, "nonce": E}`
2. keeper: `{"nonce": K, "proof": HMAC(key, "keeper" E K)}`
3. edge: `{"proof": HMAC(key, "edge" E K), "pid": …, "build": …, "address": [host, port],
   "secure": …}`

Then the keeper sends:

* `{"do": "all", "domain": …, "hosts": […], "access_log": …, "routes": […],
  "kept": {SERVER: GENERATION, …}, "keeper": ID, "sessions": […]}` replaces all that the edge knows,
  except routes to servers in `kept`; this and `keeper` may be absent
* `{"do": "route", "route": …}` sets a route, `{"do": "unroute", "server": …}` removes one
* `{"do": "certificate", "chain": …, "key": …, "hsts": …}`, both PEM, is what TLS begins with from
  now on; an edge that speaks TLS needs one before `all`
* `{"do": "trust", "proxies": [NETWORK, …]}` replaces the proxies that are believed about clients
* `{"do": "sessions", "begun": […], "ended": […]}` adds and removes sessions
* `{"do": "visits", "server": …}` asks who has a Lab open in a browser. This is the only one with an
  answer, `{"visits": {"open": …, "ago": …}}`; keepers ask it over a connection of its own.
* `{"do": "drain"}` lets the edge finish what it does and end, `{"do": "stop"}` ends it at once

The edge sends `{"report": …}` every few seconds: counts for metrics, which sessions were used, and
a sign of life. After `all`, it reports the uses of all sessions again, with the ID of the keeper.

Nothing depends on the connection being a Unix socket, except that the edge then also sends its
listening socket with the third frame: so an address passes from one edge to the next without a gap.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Mapping
from typing import Any, Final

VERSION: Final = 1
LARGEST: Final = 16 * 1024 * 1024
"""Maximum bytes of a frame."""
REPORT_EVERY: Final = 5.0
"""Seconds between two reports of an edge."""
_LENGTH: Final = struct.Struct("!I")
_NONCE_BYTES: Final = 32


class WireError(Exception):
    """The input is not a frame, or not the expected one, or its sender does not know the key."""


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as a frame."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Decodes frames from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._received = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that are complete with a piece. Raises WireError."""
        self._received += data
        complete = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > LARGEST:
                raise WireError(f"a frame has more than {LARGEST} bytes")
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            complete.append(_decode(self._received[_LENGTH.size : end]))
            self._received = self._received[end:]
        return complete


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("a frame is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a frame is not an object")
    return message


def nonce() -> str:
    """Return a new nonce."""
    return secrets.token_hex(_NONCE_BYTES)


def proof(key: str, role: str, edge_nonce: str, keeper_nonce: str) -> str:
    """Return the proof that a role (`edge` or `keeper`) knows the key."""
    text = f"{role} {edge_nonce} {keeper_nonce}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


def check_proof(
    message: Mapping[str, Any], key: str, role: str, edge_nonce: str, keeper_nonce: str
) -> None:
    """Check the proof in a message. Raises WireError."""
    given = message.get("proof")
    expected = proof(key, role, edge_nonce, keeper_nonce)
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), expected.encode()):
        raise WireError(f"the {role} does not know the key")


def nonce_of(message: Mapping[str, Any]) -> str:
    """Return the nonce in a message. Raises WireError."""
    given = message.get("nonce")
    if not isinstance(given, str) or len(given) != 2 * _NONCE_BYTES:
        raise WireError("there is no nonce")
    return given
