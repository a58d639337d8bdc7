"""Takes secrets out of text that others may read: by what they look like, and by what they are.

There is one rule for the keeper's log and for those of servers, and one list of known secrets for a process, as there is one log.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote

from labkeeper.core.model import Change, ServerSpec

TOKEN_BYTES: Final = 24
"""Bytes of a server's token, which is written as twice as many hexadecimal digits: that is how it is known."""
HIDDEN: Final = "[secret]"

_SHORTEST: Final = 8
"""Characters of a known secret. A shorter one would be found in the words of every line."""
_NAMES: Final = r"(?:token|passw(?:or)?d|secret|api[_-]?key)"
_LOOKS: Final = re.compile(
    # No part begins with a repetition, and none is long that may fail: a line of a server may be hostile.
    rf"""
      \b[0-9a-f]{{{2 * TOKEN_BYTES}}}\b
    | \blk_[0-9a-f]{{12}}_[\w-]{{43}}
    | ({_NAMES}(?:=|%3D))[^\s"'&,;<>\#\\]+
    | ({_NAMES}\\?["']\s?:\s?\\?["'])[^"'\\]+
    | (authorization\\?["']?\s?[:=]\s?\\?["']?(?:[\w-]{{1,20}}\s)?)[^\s"',\\]{{{_SHORTEST},}}
    | (\bbearer\s)[\w.~+/=-]{{{_SHORTEST},}}
    | (://)[^\s/@:"']*:[^\s/@"']*(?=@)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WORDS: Final = ("token", "key", "passw", "secret", "authorization", "bearer", "lk_")
"""One of these is in whatever looks like a secret, but for the next two; to look for them takes a tenth of the time."""
_DIGITS: Final = re.compile(rf"[0-9a-f]{{{2 * TOKEN_BYTES}}}")
_SECRET_NAME: Final = re.compile(rf"(?:.*[_-])?(?:{_NAMES}|authorization)", re.IGNORECASE)

_known: Final[dict[str, tuple[str, ...]]] = {}
"""By whose they are."""
_learning: Final = threading.Lock()
_all: tuple[str, ...] = ()
"""All that are known, the longest first, since others may be within it. Replaced, never altered: whoever scrubs holds no lock."""
_beginnings: frozenset[str] = frozenset()
"""How they begin. To look for these costs the same however many there are."""
_pieces: frozenset[str] = frozenset()
"""What is in their beginnings: wherever one of those is, one of these is at a multiple of the stride. Most text has none."""
_PIECE: Final = 4
_STRIDE: Final = _SHORTEST - _PIECE + 1


def scrub(text: str) -> str:
    """Give a text without what is a secret or looks like one."""
    if _has(text, _pieces, _PIECE, _STRIDE) and _has(text, _beginnings, _SHORTEST, 1):
        for secret in _all:
            text = text.replace(secret, HIDDEN)
    return _LOOKS.sub(_hide, text) if _may_look(text.casefold()) else text


def _has(text: str, parts: frozenset[str], size: int, stride: int) -> bool:
    """Whether one of these parts is in a text, at a multiple of the stride."""
    return not parts.isdisjoint([text[at : at + size] for at in range(0, len(text) - size + 1, stride)])


def _may_look(folded: str) -> bool:
    """Whether anything in a text may look like a secret."""
    return ("@" in folded and "://" in folded) or any(map(folded.__contains__, _WORDS)) or bool(_DIGITS.search(folded))


def is_secret(name: str) -> bool:
    """Whether what stands under a name is a secret, whatever it looks like."""
    return _SECRET_NAME.fullmatch(name) is not None


def learn(owner: str, secrets: Iterable[str]) -> None:
    """Take in all secrets of an owner, in place of those that it had; without any it is forgotten."""
    global _all, _beginnings, _pieces  # noqa: PLW0603 - see there
    forms = tuple(dict.fromkeys(form for secret in secrets if len(secret) >= _SHORTEST for form in _forms(secret)))
    with _learning:
        had = _known.pop(owner, ())
        if forms:
            _known[owner] = forms
        if forms != had:
            _all = tuple(sorted({form for known in _known.values() for form in known}, key=len, reverse=True))
            _pieces = frozenset(secret[at : at + _PIECE] for secret in _all for at in range(_STRIDE))
            _beginnings = frozenset(secret[:_SHORTEST] for secret in _all)


class SecretsOfServers:
    """A listener: knows what servers were given to show to their gateways, and in variables, as long as they are there."""

    def changed(self, change: Change) -> None:
        """Take in the secrets of a server, or forget them with it."""
        after = change.after
        specs = () if after.forgotten else filter(None, (after.spec, after.revised))
        learn(f"server {after.name}", (secret for spec in specs for secret in _of_spec(spec)))


def _of_spec(spec: ServerSpec) -> Iterator[str]:
    # Nobody says which variable is secret. Paths are none, and a log without them would be hard to read.
    yield from (value for value in (*spec.env.values(), *spec.kernel_env.values()) if not value.startswith("/"))
    if spec.gateway is not None:
        yield from filter(None, [spec.gateway.auth_token])
        for value in spec.gateway.headers.values():
            # Of one with a scheme, what follows it is as secret by itself.
            yield from (value, value.rpartition(" ")[2])


def _forms(secret: str) -> tuple[str, ...]:
    """Give the ways in which a secret is written."""
    return secret, json.dumps(secret)[1:-1], quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")


def _hide(found: re.Match[str]) -> str:
    return f"{found[found.lastindex] if found.lastindex else ''}{HIDDEN}"
