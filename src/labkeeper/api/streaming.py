"""Streaming answers: logs, and Server-Sent Events (html.spec.whatwg.org, "Server-sent events")."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from flask import Response, g, request

from labkeeper.api.views import event_model
from labkeeper.core.messages import HistoryEntry

EVENT_STREAM: Final = "text/event-stream"
_CHUNK: Final = 64 * 1024
"""Characters of a log that are sent together."""
_MOST: Final = 2 * 1024 * 1024
"""Bytes of a log in an answer that is not streamed."""
_KEEP_ALIVE: Final = 8.0
"""Seconds without an event after which a comment keeps proxies from closing the connection."""
_RECONNECT: Final = 2000
"""Milliseconds before a browser reconnects."""


class LiveResponse(Response):
    """Sends its headers at once; a WSGI server delays them until the first line."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Run the WSGI application."""

        def start(*given: Any) -> Any:
            write = start_response(*given)
            try:
                write(b"")
            except BaseException:
                # The caller has disconnected; the server will neither read nor close the body.
                self.close()
                raise
            return write

        return super().__call__(environ, start)


def wants_stream(*, asked: bool) -> bool:
    """Whether to stream the answer: to HEAD, waitress would send the end of a body in chunks."""
    return asked and request.method != "HEAD"


def gone() -> Callable[[], bool]:
    """Return a check whether the caller has disconnected, if known, or lost its access."""
    disconnected: Callable[[], bool] = request.environ.get(
        "waitress.client_disconnected", lambda: False
    )
    still_valid: Callable[[], bool] = g.still_valid
    return lambda: disconnected() or not still_valid()


def end_of(lines: Iterable[str]) -> bytes:
    """Return the last lines that fit into an answer, preceded by the size of the rest."""
    whole = "".join(f"{line}\n" for line in lines).encode()
    if len(whole) <= _MOST:
        return whole
    begin = whole.index(b"\n", len(whole) - _MOST) + 1
    return (
        b"[labkeeper] left out: the first %d bytes of what was asked for; an answer has %d\n"
        % (begin, _MOST)
        + whole[begin:]
    )


def lines_in_pieces(lines: Iterator[str], gone: Callable[[], bool]) -> Iterator[str]:
    """Yield lines in pieces; on "" (no new ones), check whether the caller is still there."""
    waiting: list[str] = []
    size = 0
    for line in lines:
        if line:
            waiting.append(line)
            size += len(line)
        if waiting and (not line or size > _CHUNK):
            yield "".join(waiting)
            waiting, size = [], 0
            if gone():
                return
        elif not line and gone():
            return
    yield "".join(waiting)


def server_sent(
    entries: Iterator[HistoryEntry | None], missed: int | None, gone: Callable[[], bool]
) -> Iterator[str]:
    """Yield events as they arrive; on None, check whether the caller is still there.

    `missed` is the number of requested events that are no longer stored; None if unknown.
    """
    yield f"retry: {_RECONNECT}\n\n"
    if missed != 0:
        yield f'event: gap\ndata: {{"missed": {json.dumps(missed)}}}\n\n'
    last = time.monotonic()
    for entry in entries:
        if gone():
            return
        if entry is not None:
            yield (
                f"id: {entry.id}\nevent: {entry.kind}\n"
                f"data: {event_model(entry).model_dump_json()}\n\n"
            )
        elif time.monotonic() - last >= _KEEP_ALIVE:
            yield ": keep-alive\n\n"
        else:
            continue
        last = time.monotonic()
