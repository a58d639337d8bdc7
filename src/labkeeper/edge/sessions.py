"""Browser sessions, as the keeper has made them: which cookie opens which Lab, and for whom."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, KeysView
from dataclasses import dataclass
from typing import Final

from labkeeper.edge.heads import Headers, header

SESSION: Final = b"labkeeper-session"
"""The cookie of a session for a Lab."""
SIGN_IN: Final = b"labkeeper-sign-in"
"""That of a session at the bare host."""
NONCE: Final = b"labkeeper-nonce"
"""That by which a Lab's host knows the browser that it has sent to the bare host."""
_HOST: Final = b"__Host-"
"""No page of another host name can set such a cookie (RFC 6265bis, 4.1.3.2)."""
_SECURE: Final = b"__Secure-"
"""It cannot be set without TLS. Unlike the other one, it may have a path."""
_OURS: Final = frozenset(
    prefix + name for prefix in (b"", _HOST, _SECURE) for name in (SESSION, SIGN_IN, NONCE)
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LONGEST_USER: Final = 128


def cookie_name(name: bytes = SESSION, *, secure: bool, is_host: bool) -> bytes:
    """Return the name of a cookie as browsers get it; `is_host`: it is for the whole host."""
    if not secure:
        return name
    return (_HOST if is_host else _SECURE) + name


class SessionError(ValueError):
    """A message is not a session."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that may use one Lab."""

    digest: str
    """SHA-256 of its cookie in hexadecimal."""
    server: str
    """The server's qualified name."""
    user: str
    """The user's name in the Lab."""
    expires_at: float
    """In seconds since the epoch."""

    @classmethod
    def parse(cls, message: object) -> Session:
        """Read a session from a message's object. Raises SessionError."""
        match message:
            case {
                "digest": str(digest),
                "server": str(server),
                "user": str(user),
                "expires_at": int(expires_at) | float(expires_at),
            } if _DIGEST.fullmatch(digest) and 0 < len(user) <= _LONGEST_USER:
                return cls(digest, server, user, expires_at)
        raise SessionError("a session does not fit")


class SessionTable:
    """The sessions that have not ended."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    @property
    def digests(self) -> KeysView[str]:
        """The digests of all sessions."""
        return self._sessions.keys()

    def replace(self, sessions: Iterable[Session]) -> set[Session]:
        """Replace all sessions; return those that have ended thereby."""
        before = set(self._sessions.values())
        self._sessions = {session.digest: session for session in sessions}
        return before - set(self._sessions.values())

    def add(self, sessions: Iterable[Session]) -> None:
        """Add sessions."""
        self._sessions |= {session.digest: session for session in sessions}

    def end(self, digests: Iterable[str]) -> set[Session]:
        """Remove sessions; return those that were there."""
        ended = (self._sessions.pop(digest, None) for digest in digests)
        return {session for session in ended if session is not None}

    def expire(self, now: float) -> set[Session]:
        """Remove those that have expired at a time in seconds since the epoch; return them."""
        return self.end([s.digest for s in self._sessions.values() if s.expires_at <= now])

    def find(self, headers: Headers, cookie: bytes, server: str, now: float) -> Session | None:
        """Return the session for a server whose cookie is in a request's headers, or None.

        `cookie` is the name of the only cookie that is accepted.

        If there are several cookies, at most one was set by the keeper, so none is accepted: other
        pages of the host could choose which session a browser uses.
        """
        if header(headers, b"cookie") is None:
            return None
        cookies = [value for name, value in _pairs(headers) if name == cookie]
        if len(cookies) != 1:
            return None
        session = self._sessions.get(hashlib.sha256(cookies[0]).hexdigest())
        valid = session is not None and session.server == server and session.expires_at > now
        return session if valid else None


def without_cookie(headers: Headers) -> Headers:
    """Return a request's headers without our cookies, whether accepted or not."""
    others = [b"%b=%b" % pair for pair in _pairs(headers) if pair[0] not in _OURS]
    rest = [(name, value) for name, value in headers if name != b"cookie"]
    return [*rest, (b"cookie", b"; ".join(others))] if others else rest


def _pairs(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the cookies of a request (RFC 6265, 5.4)."""
    cookies = (
        cookie.partition(b"=")
        for name, value in headers
        if name == b"cookie"
        for cookie in value.split(b";")
    )
    return [(name.strip(), value.strip()) for name, equals, value in cookies if equals]
