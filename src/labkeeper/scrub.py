"""Removes secrets from text that others may read: those known, and those that look like one.

What looks like a secret is hidden everywhere. A known secret is hidden only in text about its
owner, so each owner has its own `Secrets`: hidden in the text of others, it could be guessed by
them, and it could blank harmless words.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Final
from urllib.parse import quote

from labkeeper.core.messages import Change
from labkeeper.core.spec import Gateway, ServerSpec

TOKEN_BYTES: Final = 24
"""Bytes of a server's token, which is written as twice as many hexadecimal digits."""
HIDDEN: Final = "[secret]"

_SHORTEST: Final = 8
"""Minimum length of a known secret. A shorter one would match words of every line."""
_NAMES: Final = r"(?:token|passw(?:or)?d|secret|api[_-]?key)"
_LOOKS: Final = re.compile(
    # No alternative begins with a repetition, and repetitions that may fail are short: lines of a
    # server may be hostile.
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
"""All that looks like a secret contains one of these, except for hexadecimal tokens and URLs.

Searching for them takes a tenth of the time.
"""
_DIGITS: Final = re.compile(rf"[0-9a-f]{{{2 * TOKEN_BYTES}}}")
_SECRET_NAME: Final = re.compile(rf"(?:.*[_-])?(?:{_NAMES}|authorization)", re.IGNORECASE)

_PATH: Final = r"/(?:[a-z][a-z_.-]*\d*|Users|Volumes|Library|Applications|System)(?:/[\w.@~ -]*)*"
_PATHS: Final = re.compile(rf"{_PATH}(?::{_PATH})*:?")
"""Paths: a password rarely begins with the name of a directory at the root."""
_SECRET_VARIABLE: Final = re.compile(
    r"(?!.*_(?:FILE|PATH|DIR|HOME|SOCK)$).*(?:TOKEN|PASSW|PASSPHRASE|_PWD|SECRET|KEY|CREDENTIAL|AUTH)",
    re.IGNORECASE,
)
"""Names of variables of which not even a path is shown."""
_PIECES: Final = (64, 32, 16)
"""Lengths of the pieces of a long secret.

Each piece is a secret by itself, and there are few lengths, so a search for many or long secrets
takes no more time.
"""
_HINT: Final = 4
"""Length of a hint: a part of the beginning of a piece."""
_STRIDE: Final = _SHORTEST - _HINT + 1
"""Wherever a piece begins, one of its hints is at a multiple of the stride."""


class _Finder:
    """Finds secrets in time that depends only on the text, not on their number or length."""

    def __init__(self, values: Callable[[], Iterable[str]]) -> None:
        self._values = values

    @cached_property
    def _pieces(self) -> frozenset[str]:
        return frozenset(
            piece for value in self._values() for form in _forms(value) for piece in _cut(form)
        )

    @cached_property
    def _sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Lengths of pieces by their beginning, longest first: a shorter one may be within it."""
        sizes: dict[str, set[int]] = {}
        for piece in self._pieces:
            sizes.setdefault(piece[:_SHORTEST], set()).add(len(piece))
        return {beginning: tuple(sorted(some, reverse=True)) for beginning, some in sizes.items()}

    @cached_property
    def _hints(self) -> frozenset[str]:
        """Substrings, one of which is in any text with a piece; other texts need no search."""
        return frozenset(
            beginning[at : at + _HINT] for beginning in self._sizes for at in range(_STRIDE)
        )

    def hide(self, text: str) -> str:
        if self._hints.isdisjoint(
            [text[at : at + _HINT] for at in range(0, len(text) - _HINT + 1, _STRIDE)]
        ):
            return text
        shown: list[str] = []
        end = 0
        for at in range(len(text) - _SHORTEST + 1):
            sizes = self._sizes.get(text[at : at + _SHORTEST], ())
            size = next((size for size in sizes if text[at : at + size] in self._pieces), 0)
            if size:
                # A piece that adjoins or overlaps a hidden one is hidden with it.
                if at > end or not shown:
                    shown += [text[end:at], HIDDEN]
                end = max(end, at + size)
        return "".join([*shown, text[end:]])


class Secrets:
    """The secrets of one owner; search tables are built at first use."""

    def __init__(self, *values: str) -> None:
        self._finder = _Finder(lambda: values)

    def learn(self, values: Callable[[], Iterable[str]]) -> None:
        """Replace the secrets; `values` is called when they are first needed, by any thread."""
        self._finder = _Finder(values)

    def prepare(self) -> None:
        """Build the search tables now, where the time that it takes delays no caller."""
        self._finder.hide("")

    def hide(self, text: str) -> str:
        """Return a text without these secrets."""
        return self._finder.hide(text)


KEEPER: Final = Secrets()
"""Secrets of this process's keeper."""
_servers: Final[dict[str, Secrets]] = {}
"""Secrets by qualified name. Readers keep theirs, even when the server is gone."""


def scrub(text: str, *known: Secrets) -> str:
    """Return a text without these secrets, and without anything that looks like one."""
    for secrets in known:
        text = secrets.hide(text)
    return _LOOKS.sub(_hide, text) if _may_look(text.casefold()) else text


def of_server(name: str) -> Secrets:
    """Return the secrets of a server; empty if there is none of this name."""
    return _servers.get(name) or Secrets()


def of_gateway(gateway: Gateway) -> Iterator[str]:
    """Yield the secrets sent to a gateway."""
    yield from filter(None, [gateway.auth_token])
    for value in gateway.headers.values():
        # In a value with a scheme, the rest is a secret by itself.
        yield from (value, value.rpartition(" ")[2])


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret, whatever its value."""
    return _SECRET_NAME.fullmatch(name) is not None


class SecretsOfServers:
    """Subscriber that keeps the secrets of servers' gateways and variables while they exist."""

    def __init__(self) -> None:
        self._specs: dict[str, tuple[ServerSpec, ...]] = {}

    def changed(self, change: Change) -> None:
        """Learn a server's secrets, or forget them with it."""
        after = change.after
        if after.forgotten:
            self._specs.pop(after.qualified_name, None)
            _servers.pop(after.qualified_name, None)
            return
        specs = (after.spec,) if after.revised is None else (after.spec, after.revised)
        if specs != self._specs.get(after.qualified_name):
            self._specs[after.qualified_name] = specs
            _servers.setdefault(after.qualified_name, Secrets()).learn(
                lambda: (secret for spec in specs for secret in _of_spec(spec))
            )


def _of_spec(spec: ServerSpec) -> Iterator[str]:
    for name, value in (*spec.env.items(), *spec.kernel_env.items()):
        # Variables are not declared secret. Paths are harmless, and logs without them hard to read.
        if _SECRET_VARIABLE.match(name) or not _PATHS.fullmatch(value):
            yield value
    if spec.gateway is not None:
        yield from of_gateway(spec.gateway)


def _forms(secret: str) -> Iterator[str]:
    """Yield the spellings of a secret, as a whole and, if it has several lines, line by line."""
    for text in dict.fromkeys((secret, *map(str.strip, secret.splitlines()))):
        if len(text) >= _SHORTEST:
            yield from (text, json.dumps(text)[1:-1], quote(text, safe=""))
            yield base64.b64encode(text.encode()).decode().rstrip("=")


def _cut(form: str) -> Iterator[str]:
    """Yield pieces of one length; the last overlaps the one before."""
    size = next((size for size in _PIECES if size <= len(form)), len(form))
    for start in (*range(0, len(form) - size, size), len(form) - size):
        yield form[start : start + size]


def _may_look(folded: str) -> bool:
    """Whether anything in a text may look like a secret."""
    return (
        ("@" in folded and "://" in folded)
        or any(map(folded.__contains__, _WORDS))
        or bool(_DIGITS.search(folded))
    )


def _hide(found: re.Match[str]) -> str:
    return f"{found[found.lastindex] if found.lastindex else ''}{HIDDEN}"
