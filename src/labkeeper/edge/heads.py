"""Heads of HTTP/1 messages: a strict check of all their bytes, then llhttp reads them.

llhttp alone accepts forms of a request target that are meant for proxies, and parsers differ on
much that the grammar forbids. So a head that is not of the narrow form below is refused before it
is read (RFC 9112, 2.2, 3.2, 5 and 6). Heads are never passed on as they came: `request_head` and
`answer_head` write new ones.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import httptools

Headers = list[tuple[bytes, bytes]]
"""Names, in lower case, with their values."""

END: Final = b"\r\n\r\n"
REQUEST_LIMIT: Final = 32 * 1024
"""Maximum bytes of a request's head."""
ANSWER_LIMIT: Final = 64 * 1024
"""Maximum bytes of an answer's head."""
# Numbers, not members of HTTPStatus: Python 3.11 takes longer to look one up than to compare it.
CONTINUE: Final = 100
SWITCHING_PROTOCOLS: Final = 101
FINAL: Final = 200
"""The least status of an answer after which no other one follows."""
NO_CONTENT: Final = 204
WITHOUT_BODY: Final = frozenset({NO_CONTENT, 304})
"""Statuses of answers that have no body, whatever their heads say (RFC 9112, 6.3)."""
_MOST_HEADERS: Final = 128

_FIELDS: Final = rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+\r\n"
_REQUEST: Final = re.compile(
    rb"[A-Z]{1,16}+ /[!$-;=?-_a-~]*+ HTTP/1\.[01]\r\n" + _FIELDS,
)
"""A target is a path. Browsers leave much of it unencoded, but not `#`, `"`, `<`, `>` and "`"."""
_ANSWER: Final = re.compile(
    rb"HTTP/1\.[01] [1-5][0-9]{2}(?: [^\x00-\x08\x0a-\x1f\x7f]*+)?\r\n" + _FIELDS
)
TRAILERS: Final = re.compile(_FIELDS)
"""What follows the last chunk of a body."""
_BARE_LINE_END: Final = re.compile(rb"(?<!\r)\n")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(?::[0-9]{1,5})?")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_DOT_SEGMENT: Final = re.compile(rb"/(?:\.|%2[eE]){1,2}(?:[/?;]|$)")

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields about one connection (RFC 9110, 7.6.1)."""
_OF_THE_EDGE: Final = frozenset({b"content-length", b"strict-transport-security", b"x-request-id"})
"""Fields of an answer that are written anew: the second one would hold for all of a host."""
_OURS: Final = re.compile(
    rb"forwarded|x-forwarded-.*|x-labkeeper-.*|x-real-ip|x-request-id|x-scheme|.*_.*"
)
"""Fields that only a proxy sets, and those whose `_` would be a `-` for WSGI."""
_ONCE: Final = (
    b"authorization",
    b"content-length",
    b"content-type",
    b"expect",
    b"host",
    b"origin",
    b"sec-websocket-key",
    b"transfer-encoding",
    b"upgrade",
)
"""Fields of a request of which a program may read another one than we do if there are two."""
_FRAMING: Final = (b"content-length", b"transfer-encoding")
"""Fields that say where the body of an answer ends."""
_CONNECTION_OPTIONS: Final = frozenset(
    {b"close", b"http2-settings", b"keep-alive", b"te", b"trailer", b"upgrade"}
)
"""What Connection may name; other fields would be dropped at the sender's wish."""


class BadHead(Exception):  # noqa: N818 - named like the answer that it becomes
    """A head is not accepted; the message is the reason."""

    def __init__(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


@dataclass(slots=True)
class Request:
    """The head of a request."""

    method: bytes
    target: bytes
    """Path and query."""
    headers: Headers
    host: bytes
    keep_alive: bool
    """Whether another request may follow on the connection."""
    length: int | None
    """Bytes of its body; None: it is chunked."""
    websocket: bool
    """Whether it asks for a websocket."""
    expects: bool
    """Whether its sender waits for `100 Continue`."""
    is_old: bool
    """Whether it is HTTP/1.0, which has no chunks."""

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again if its connection fails (RFC 9110, 9.2.2)."""
        return self.method in {b"GET", b"HEAD", b"OPTIONS"} and self.length == 0

    def has_length(self, length: int) -> None:
        """Set the length of its body, which has arrived: nothing is in chunks or expected then."""
        self.length = length
        outdated = {b"content-length", b"expect"}
        self.headers = [pair for pair in self.headers if pair[0] not in outdated]
        self.headers.append((b"content-length", b"%d" % length))


@dataclass(slots=True)
class Answer:
    """The head of an answer."""

    status: int
    reason: bytes
    headers: Headers
    keep_alive: bool
    length: int | None
    """Bytes of its body as its head says; None: see `chunked`."""
    chunked: bool
    """Whether the body comes in chunks; if it has no length either, it ends with the connection."""
    websocket: bool
    """Whether it accepts a websocket."""


class _Reader:
    """Receives what llhttp reads."""

    def __init__(self) -> None:
        self.target = b""
        self.reason = b""
        self.headers: Headers = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def check_start(start: bytes | bytearray, limit: int, since: int = 0) -> None:
    """Check the start of a head that is incomplete, from offset `since` on. Raises BadHead."""
    if _BARE_LINE_END.search(start, max(0, since - 1)):
        raise BadHead("a line ends without a carriage return")
    check_length(start, limit)


def check_length(head: bytes | bytearray, limit: int) -> None:
    """Check the length of a head, or of its start. Raises BadHead."""
    if len(head) > limit:
        raise BadHead(
            f"the head is longer than {limit} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        )


def read_request(head: bytes) -> Request:
    """Read the whole head of a request, with its last empty line. Raises BadHead."""
    if not _REQUEST.fullmatch(head):
        raise BadHead("the request line or a header is malformed")
    reader = _Reader()
    parser = httptools.HttpRequestParser(reader)
    _read(parser, reader, head)
    headers, values = reader.headers, dict(reader.headers)
    if len(values) < len(headers):
        _check_once(headers, _ONCE)
    method, version = parser.get_method(), parser.get_http_version()
    if method in {b"CONNECT", b"TRACE"}:
        raise BadHead(f"{method.decode()} is not supported", HTTPStatus.METHOD_NOT_ALLOWED)
    path = reader.target.partition(b"?")[0]
    if path.startswith(b"//") or b"\\" in path or _DOT_SEGMENT.search(path):
        raise BadHead("the path has an empty first segment, '.', '..' or a backslash")
    host = values.get(b"host", b"")
    if not _HOST.fullmatch(host):
        raise BadHead("there is no valid Host header")
    options = _options(headers) if b"connection" in values else set()
    if not options <= _CONNECTION_OPTIONS:
        raise BadHead("the Connection header names other headers")
    expects = _expectation(values)
    length = _length(values, is_old=version == "1.0")
    return Request(
        method=method,
        target=reader.target,
        headers=headers,
        host=host,
        keep_alive=b"close" not in options and version == "1.1",
        length=length,
        websocket=version == "1.1" and length == 0 and _asks_for_websocket(method, values, options),
        expects=expects and version == "1.1" and length != 0,
        is_old=version == "1.0",
    )


def read_answer(head: bytes, request: Request) -> Answer:
    """Read the whole head of the answer to a request. Raises BadHead."""
    if not _ANSWER.fullmatch(head):
        raise BadHead("the status line or a header is malformed")
    reader = _Reader()
    parser = httptools.HttpResponseParser(reader)
    _read(parser, reader, head)
    headers, values = reader.headers, dict(reader.headers)
    old = parser.get_http_version() == "1.0"
    coding, length = values.get(b"transfer-encoding"), values.get(b"content-length")
    if coding is not None and (coding.lower() != b"chunked" or length is not None or old):
        raise BadHead("the framing of the body is ambiguous")
    if length is not None and not _LENGTH.fullmatch(length):
        raise BadHead("Content-Length is not a number")
    if len(values) < len(headers):
        _check_once(headers, _FRAMING)
    options = _options(headers) if b"connection" in values else set()
    status, websocket = parser.get_status_code(), False
    if status == SWITCHING_PROTOCOLS:
        upgrades = b"upgrade" in options and values.get(b"upgrade", b"").lower() == b"websocket"
        if not (upgrades and request.websocket):
            raise BadHead("it switches to a protocol that was not requested")
        websocket = True
    return Answer(
        status=status,
        reason=reader.reason,
        headers=headers,
        keep_alive=b"close" not in options and (not old or b"keep-alive" in options),
        length=None if length is None else int(length),
        chunked=coding is not None,
        websocket=websocket,
    )


def request_head(request: Request, added: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the head that is sent to the keeper or to a Lab."""
    lines = [b"%b %b HTTP/1.1" % (request.method, request.target)]
    lines += [b"%b: %b" % (name, value) for name, value in request.headers if _is_passed_on(name)]
    lines += [b"%b: %b" % header for header in added]
    if request.length is None:
        lines.append(b"transfer-encoding: chunked")
    if request.websocket:
        lines += [b"connection: upgrade", b"upgrade: websocket"]
    return b"\r\n".join(lines) + END


@functools.lru_cache(maxsize=128)
def _is_passed_on(name: bytes) -> bool:
    """Whether a field of a request is passed on as it is."""
    return name not in _HOP_BY_HOP and not _OURS.fullmatch(name)


def answer_head(answer: Answer, added: Sequence[tuple[bytes, bytes]], *, close: bool) -> bytes:
    """Return the head that is sent to the client; `added` has its request id and its length."""
    lines = [b"HTTP/1.1 %d %b" % (answer.status, answer.reason)]
    lines += [
        b"%b: %b" % (name, value)
        for name, value in answer.headers
        if name not in _HOP_BY_HOP and name not in _OF_THE_EDGE
    ]
    lines += [b"%b: %b" % header for header in added]
    if answer.websocket:
        lines += [b"connection: upgrade", b"upgrade: websocket"]
    elif close:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + END


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the value of the first header with a name, or None."""
    for known, value in headers:
        if known == name:
            return value
    return None


def _read(
    parser: httptools.HttpRequestParser | httptools.HttpResponseParser,
    reader: _Reader,
    head: bytes,
) -> None:
    if head.count(b"\n") > _MOST_HEADERS + 2:
        raise BadHead(
            f"there are more than {_MOST_HEADERS} headers",
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        )
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise BadHead(f"the head cannot be read: {error}") from error
    if not reader.complete:
        raise BadHead("the head cannot be read")


def _check_once(headers: Headers, names: Iterable[bytes]) -> None:
    counts = Counter(name for name, _ in headers)
    for name in names:
        if counts[name] > 1:
            raise BadHead(f"there is more than one {name.decode()} header")


def _options(headers: Headers) -> set[bytes]:
    """Return the options of all Connection headers."""
    return {
        option.strip(b" \t").lower()
        for name, value in headers
        if name == b"connection"
        for option in value.split(b",")
    } - {b""}


def _expectation(values: dict[bytes, bytes]) -> bool:
    expected = values.get(b"expect")
    if expected is not None and expected.lower() != b"100-continue":
        raise BadHead("the expectation is unknown", HTTPStatus.EXPECTATION_FAILED)
    return expected is not None


def _length(values: dict[bytes, bytes], *, is_old: bool) -> int | None:
    """Return the length of a request's body; None if it is chunked (RFC 9112, 6.3)."""
    coding, length = values.get(b"transfer-encoding"), values.get(b"content-length")
    if coding is not None:
        if coding.lower() != b"chunked" or length is not None or is_old:
            raise BadHead(
                "Transfer-Encoding must be 'chunked', in HTTP/1.1, and without Content-Length"
            )
        return None
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise BadHead("Content-Length is not a number")
    return int(length)


def _asks_for_websocket(method: bytes, values: dict[bytes, bytes], options: set[bytes]) -> bool:
    """Whether a request opens a websocket (RFC 6455, 4.1); other upgrades are ignored."""
    return (
        method == b"GET"
        and b"upgrade" in options
        and values.get(b"upgrade", b"").lower() == b"websocket"
        and b"sec-websocket-key" in values
        and values.get(b"sec-websocket-version") == b"13"
    )
