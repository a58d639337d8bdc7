"""Which answers of Labs are compressed, and what their heads say then (RFC 9110, 8.4 and 12.5.3).

Only answers of known length are: whoever streams without one may have a reader who waits for the
next piece. No HTML: a page may show both a secret and what its request asked for, and the length
of the two compressed together tells something of the secret (the BREACH attack).
"""

from __future__ import annotations

import dataclasses
import re
from http import HTTPStatus
from typing import Final

from labkeeper.edge.heads import Answer, Headers, Request, header

LEAST: Final = 1024
"""Bytes of a body that is not worth it."""
MOST: Final = 4 * 1024 * 1024
"""Bytes of the longest body; JupyterLab's largest bundle has 2.6 million."""

BROTLI: Final = b"br"
GZIP: Final = b"gzip"
_OURS: Final = (BROTLI, GZIP)
"""The codings, the better one first."""

_TYPES: Final = re.compile(
    rb"(?:application/(?:[a-z0-9.-]+\+json|json|javascript|x-javascript|xml|wasm"
    rb"|vnd\.ms-fontobject)"
    rb"|font/(?:otf|ttf)|image/(?:bmp|svg\+xml|vnd\.microsoft\.icon|x-icon)"
    rb"|text/(?:css|csv|javascript|markdown|plain|x-python|xml))[ \t]*(?:;.*)?",
    re.IGNORECASE,
)
_OF_THE_BYTES: Final = frozenset(
    {
        b"content-digest",
        b"content-encoding",
        b"content-md5",
        b"content-range",
        b"digest",
        b"repr-digest",
    }
)
"""Fields that would be wrong of a compressed body, or say that it is one."""
_QUALITY: Final = re.compile(rb"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)


def coding_for(request: Request) -> bytes | None:
    """Return the coding that the client of a request likes best; None: it wants none of ours."""
    likes: dict[bytes, float] = {}
    for name, value in request.headers:
        if name == b"accept-encoding":
            likes |= dict(map(_liked, value.lower().split(b",")))
    others = likes.get(b"*", 0.0)
    found = max(_OURS, key=lambda coding: likes.get(coding, others))
    best = likes.get(found, others)
    return found if best > 0 and best >= likes.get(b"identity", 0.0) else None


def _liked(item: bytes) -> tuple[bytes, float]:
    """Read a coding and its weight; one whose weight cannot be read is not accepted."""
    coding, _, parameter = item.partition(b";")
    quality = _QUALITY.fullmatch(parameter.strip(b" \t")) if parameter else None
    weight = float(quality[1]) if quality else float(not parameter)
    return coding.strip(b" \t"), weight


def is_compressible(request: Request, answer: Answer) -> bool:
    """Whether an answer is compressed if the client accepts that."""
    length = answer.length
    return (
        length is not None
        and LEAST < length <= MOST
        and answer.status == HTTPStatus.OK
        and request.method != b"OPTIONS"
        and request.repeatable
        and _TYPES.fullmatch(header(answer.headers, b"content-type") or b"") is not None
        and not any(name in _OF_THE_BYTES for name, _ in answer.headers)
        and b"no-transform" not in (header(answer.headers, b"cache-control") or b"").lower()
    )


def is_immutable(answer: Answer) -> bool:
    """Whether an answer may be kept for as long as one likes (RFC 8246), as Labs' bundles are."""
    return b"immutable" in (header(answer.headers, b"cache-control") or b"").lower()


def varying(answer: Answer) -> Answer:
    """Return an answer that says that it depends on the codings its client accepts."""
    said = b",".join(value for name, value in answer.headers if name == b"vary").lower()
    if {b"*", b"accept-encoding"} & {item.strip(b" \t") for item in said.split(b",")}:
        return answer
    return dataclasses.replace(answer, headers=[*answer.headers, (b"vary", b"accept-encoding")])


def weakened(answer: Answer) -> Answer:
    """Return an answer whose ETag is a weak one: the bytes differ, and what they mean does not.

    Clients send it back as it is, and every server has to compare it without regard to the `W/`
    (RFC 9110, 13.1.2). Of a 304, a strong one would not fit the stored answer.
    """
    headers: Headers = [
        (name, b"W/" + value if name == b"etag" and value.startswith(b'"') else value)
        for name, value in answer.headers
    ]
    return dataclasses.replace(answer, headers=headers)


def coded(answer: Answer, coding: bytes, length: int | None) -> Answer:
    """Return the head of a compressed answer; no length: it answers HEAD, so that is not known."""
    weak = weakened(varying(answer))
    # Parts are requested of the body that its client knows, and the Lab knows another one.
    headers = [pair for pair in weak.headers if pair[0] != b"accept-ranges"]
    headers.append((b"content-encoding", coding))
    return dataclasses.replace(weak, headers=headers, length=length)
