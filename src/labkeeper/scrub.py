"""Takes secrets out of text that others may read: by what they look like, and by what they are.

What looks like a secret is hidden everywhere. What is known as one is hidden only in text about its owner, so each owner has its
own `Secrets`: hidden in the text of others, it could be guessed by them, and it could blank what is none.
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

_PATH: Final = r"/(?:[a-z][a-z_.-]*\d*|Users|Volumes|Library|Applications|System)(?:/[\w.@~ -]*)*"
_PATHS: Final = re.compile(rf"{_PATH}(?::{_PATH})*:?")
"""What looks like a path, or some: a password rarely begins with the name of a directory at the root."""
_SECRET_VARIABLE: Final = re.compile(
    r"(?!.*_(?:FILE|PATH|DIR|HOME|SOCK)$).*(?:TOKEN|PASSW|PASSPHRASE|_PWD|SECRET|KEY|CREDENTIAL|AUTH)", re.IGNORECASE
)
"""What a variable is called of which not even a path is shown."""
_PIECES: Final = (64, 32, 16)
"""Characters of a piece of a long secret. Each is a secret by itself, and there are few sizes: so to look for many secrets, and
for long ones, takes no longer than for others."""
_HINT: Final = 4
"""Characters of a hint: a part of the beginning of a piece."""
_STRIDE: Final = _SHORTEST - _HINT + 1
"""Wherever a piece begins, one of its hints is at a multiple of the stride."""


class _Finder:
    """Finds secrets in text. What that costs depends on the text alone, however many secrets there are, and however long."""

    def __init__(self, values: Callable[[], Iterable[str]]) -> None:
        self._values = values

    @cached_property
    def _pieces(self) -> frozenset[str]:
        return frozenset(piece for value in self._values() for form in _forms(value) for piece in _cut(form))

    @cached_property
    def _sizes(self) -> Mapping[str, tuple[int, ...]]:
        """The sizes of pieces, by how they begin, the longest first: a shorter one may be within it."""
        sizes: dict[str, set[int]] = {}
        for piece in self._pieces:
            sizes.setdefault(piece[:_SHORTEST], set()).add(len(piece))
        return {beginning: tuple(sorted(some, reverse=True)) for beginning, some in sizes.items()}

    @cached_property
    def _hints(self) -> frozenset[str]:
        """One of these is in each text that has a piece. Most texts have none, and are not looked through any further."""
        return frozenset(beginning[at : at + _HINT] for beginning in self._sizes for at in range(_STRIDE))

    def hide(self, text: str) -> str:
        if self._hints.isdisjoint([text[at : at + _HINT] for at in range(0, len(text) - _HINT + 1, _STRIDE)]):
            return text
        shown: list[str] = []
        end = 0
        for at in range(len(text) - _SHORTEST + 1):
            sizes = self._sizes.get(text[at : at + _SHORTEST], ())
            size = next((size for size in sizes if text[at : at + size] in self._pieces), 0)
            if size:
                # What follows a hidden piece without a gap, or overlaps it, is hidden with it.
                if at > end or not shown:
                    shown += [text[end:at], HIDDEN]
                end = max(end, at + size)
        return "".join([*shown, text[end:]])


class Secrets:
    """What an owner must not be seen to have. Prepared when there is first a text to look through, and not before."""

    def __init__(self, *values: str) -> None:
        self._finder = _Finder(lambda: values)

    def learn(self, values: Callable[[], Iterable[str]]) -> None:
        """Know these, in place of those before; the call for them is made when they are needed, by any thread."""
        self._finder = _Finder(values)

    def prepare(self) -> None:
        """Prepare to look for them, where the time that it takes holds up nobody."""
        self._finder.hide("")

    def hide(self, text: str) -> str:
        """Return a text without these secrets."""
        return self._finder.hide(text)


KEEPER: Final = Secrets()
"""Those of the keeper of this process."""
_servers: Final[dict[str, Secrets]] = {}
"""Those of servers, by their names. Whoever holds some knows them for as long as they read, also when the server is gone."""


def scrub(text: str, *known: Secrets) -> str:
    """Return a text without these secrets, and without what looks like one."""
    for secrets in known:
        text = secrets.hide(text)
    return _LOOKS.sub(_hide, text) if _may_look(text.casefold()) else text


def of_server(name: str) -> Secrets:
    """Return the secrets of a server; none where there is no server of this name."""
    return _servers.get(name) or Secrets()


def of_gateway(gateway: Gateway) -> Iterator[str]:
    """Return what a gateway is shown that is for it alone."""
    yield from filter(None, [gateway.auth_token])
    for value in gateway.headers.values():
        # Of one with a scheme, what follows it is as secret by itself.
        yield from (value, value.rpartition(" ")[2])


def is_secret(name: str) -> bool:
    """Whether what stands under a name is a secret, whatever it looks like."""
    return _SECRET_NAME.fullmatch(name) is not None


class SecretsOfServers:
    """A listener: knows what servers were given to show to their gateways, and in variables, as long as they are there."""

    def __init__(self) -> None:
        self._specs: dict[str, tuple[ServerSpec, ...]] = {}

    def changed(self, change: Change) -> None:
        """Know the secrets of a server, or forget them with it."""
        after = change.after
        if after.forgotten:
            self._specs.pop(after.name, None)
            _servers.pop(after.name, None)
            return
        specs = (after.spec,) if after.revised is None else (after.spec, after.revised)
        if specs != self._specs.get(after.name):
            self._specs[after.name] = specs
            _servers.setdefault(after.name, Secrets()).learn(lambda: (secret for spec in specs for secret in _of_spec(spec)))


def _of_spec(spec: ServerSpec) -> Iterator[str]:
    for name, value in (*spec.env.items(), *spec.kernel_env.items()):
        # Nobody says which variable is secret. Paths are none, and a log without them would be hard to read.
        if _SECRET_VARIABLE.match(name) or not _PATHS.fullmatch(value):
            yield value
    if spec.gateway is not None:
        yield from of_gateway(spec.gateway)


def _forms(secret: str) -> Iterator[str]:
    """Return the ways in which a secret is written, as a whole and, where it has several lines, line by line."""
    for text in dict.fromkeys((secret, *map(str.strip, secret.splitlines()))):
        if len(text) >= _SHORTEST:
            yield from (text, json.dumps(text)[1:-1], quote(text, safe=""))
            yield base64.b64encode(text.encode()).decode().rstrip("=")


def _cut(form: str) -> Iterator[str]:
    """Cut what is long into pieces of one size, the last of which overlaps the one before."""
    size = next((size for size in _PIECES if size <= len(form)), len(form))
    for start in (*range(0, len(form) - size, size), len(form) - size):
        yield form[start : start + size]


def _may_look(folded: str) -> bool:
    """Whether anything in a text may look like a secret."""
    return ("@" in folded and "://" in folded) or any(map(folded.__contains__, _WORDS)) or bool(_DIGITS.search(folded))


def _hide(found: re.Match[str]) -> str:
    return f"{found[found.lastindex] if found.lastindex else ''}{HIDDEN}"
