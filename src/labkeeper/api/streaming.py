"""Answers that go on: a log as it is written, and Server-Sent Events (html.spec.whatwg.org, "Server-sent events")."""

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
"""Bytes of a log in one answer that does not go on."""
_KEEP_ALIVE: Final = 8.0
"""Seconds without an event after which a comment tells proxies that the connection is in use."""
_RECONNECT: Final = 2000
"""Milliseconds after which a browser asks again when the connection broke."""


class LiveResponse(Response):
    """Sends its headers at once: a WSGI server holds them back until the first line, which may be long in coming."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answer."""

        def start(*given: Any) -> Any:
            write = start_response(*given)
            try:
                write(b"")
            except BaseException:
                # The caller has gone already: nobody will ask for the body, nor close it.
                self.close()
                raise
            return write

        return super().__call__(environ, start)


def gone() -> Callable[[], bool]:
    """Return what says whether the caller of this request has gone, where that can be known, or is to be answered no more."""
    disconnected: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    still_valid: Callable[[], bool] = g.still_valid
    return lambda: disconnected() or not still_valid()


def end_of(lines: Iterable[str]) -> bytes:
    """Write lines, or as many of the last ones as fit into an answer, and before them how much was left out."""
    whole = "".join(f"{line}\n" for line in lines).encode()
    if len(whole) <= _MOST:
        return whole
    begin = whole.index(b"\n", len(whole) - _MOST) + 1
    return b"[labkeeper] left out: the first %d bytes of what was asked for; an answer has %d\n" % (begin, _MOST) + whole[begin:]


def lines_in_pieces(lines: Iterator[str], gone: Callable[[], bool]) -> Iterator[str]:
    """Send lines in pieces; an empty text means that nothing new is there, and is the time to see whether the caller still is."""
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


def server_sent(entries: Iterator[HistoryEntry | None], missed: int | None, gone: Callable[[], bool]) -> Iterator[str]:
    """Write events as they come; None means that none has come, and is the time to see whether the caller is still there.

    `missed` is how many of the events that were asked for are no longer known; None if that cannot be told.
    """
    yield f"retry: {_RECONNECT}\n\n"
    if missed != 0:
        yield f'event: gap\ndata: {{"missed": {json.dumps(missed)}}}\n\n'
    last = time.monotonic()
    for entry in entries:
        if gone():
            return
        if entry is not None:
            yield f"id: {entry.id}\nevent: {entry.kind}\ndata: {event_model(entry).model_dump_json()}\n\n"
        elif time.monotonic() - last >= _KEEP_ALIVE:
            yield ": keep-alive\n\n"
        else:
            continue
        last = time.monotonic()
