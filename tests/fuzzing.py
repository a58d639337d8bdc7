"""Shared by the fuzz tests: limits, strategies, and a server that answers with given bytes."""

from __future__ import annotations

import contextlib
import socket
import threading

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""The input depends on the seed alone, which changes with every commit (tests/conftest.py)."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
DEPTHS = st.integers(1, 200_000)
"""Nesting depths of brackets; no parser follows beyond some thousands."""


def nested(depth):
    """Return unclosed JSON that is nested this deep."""
    return b'{"a":' * depth


def fields_of(**fields):
    """An object with roughly the right fields and roughly the right values."""
    return st.fixed_dictionaries(
        {}, optional={name: right | JSON for name, right in fields.items()}
    )


HEADER_LINES = st.lists(
    st.sampled_from(
        [
            b"Content-Type: application/json",
            b"Content-Length: 2",
            b"Content-Length: -1",
            b"Content-Length: " + b"9" * 30,
            b"Transfer-Encoding: chunked",
            b"Content-Encoding: gzip",
            b"Content-Type: text/plain; charset=hex",
            b"Location: //\xff",
            b"Connection: keep-alive",
            b": ",
            b"\x00",
        ]
    )
    | st.binary(max_size=40).filter(lambda line: b"\n" not in line),
    max_size=5,
)
BODIES = (
    st.binary(max_size=200)
    | DEPTHS.map(nested)
    | st.sampled_from([b"{}", b"[]", b"null", b"-5\r\nab\r\n", b"zz\r\n", b"fffffffff\r\nab"])
)


@st.composite
def answers(draw, bodies=BODIES):
    """Anything a connection may return: a valid response, a nearly valid one, or noise."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    status = draw(
        st.sampled_from(
            [b"200", b"100", b"204", b"302", b"401", b"404", b"503", b"999", b"-1", b"abc"]
        )
    )
    lines = [b"HTTP/1.1 " + status + b" OK", *draw(HEADER_LINES), b"", draw(bodies)]
    return b"\r\n".join(lines)


class Speaker:
    """Answers each request with `answer`, byte by byte if `pause` is set, and closes."""

    def __init__(self):
        self.answer = b""
        self.pause = None
        """Seconds between two bytes."""
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                asked = b""
                # A TLS client, whose first byte is 0x16, sends no request before a response.
                while (
                    b"\r\n\r\n" not in asked
                    and not asked.startswith(b"\x16")
                    and (piece := connection.recv(65536))
                ):
                    asked += piece
                self._speak(connection)

    def _speak(self, connection):
        if self.pause is None:
            connection.sendall(self.answer)
            return
        for byte in self.answer:
            connection.sendall(bytes([byte]))
            if self._ended.wait(self.pause):
                return
