"""The log of a server, complete or streamed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from flask import Response

from labkeeper.api.handlers.common import acquire_stream, caller, find_server, live_answer
from labkeeper.api.services import Services
from labkeeper.api.streaming import end_of, gone, lines_in_pieces, wants_stream
from labkeeper.core.access import Caller
from labkeeper.core.lifecycle import AT_REST
from labkeeper.core.spec import QualifiedName
from labkeeper.schema.queries import (
    LogQuery,
    ServerPath,
)

_FEW_LINES: Final = 1000
"""Lines of a log that are read immediately, for any number of callers."""


def get_logs(services: Services, path: ServerPath, query: LogQuery) -> Response:
    """Return a server's log, oldest line first. It is kept after the server ended.

    At most the last 2 MiB; if more was requested, the first line says how much was left out.
    """
    name = find_server(services, path).qualified_name
    if wants_stream(asked=query.follow):
        return _follow(services, name, query.tail)
    with _turn_to_read(services, name, query.tail):
        lines = services.backend.log(name, query.tail)
    return Response(end_of(lines), content_type="text/plain; charset=utf-8")


@contextmanager
def _turn_to_read(services: Services, name: QualifiedName, tail: int) -> Iterator[None]:
    """Hold a slot until it is our turn to read a long log, which occupies a shared processor."""
    if tail <= _FEW_LINES:
        yield
        return
    acquire_stream(
        services,
        f"read so much of the log of server '{name}'",
        f"ask for {_FEW_LINES} lines at most",
    )
    try:
        with services.log_readers:
            yield
    finally:
        services.concurrency.release()


def _follow(services: Services, name: QualifiedName, tail: int) -> Response:
    acquire_stream(services, f"follow the log of server '{name}'", "read it without follow")
    lines = services.backend.follow(
        name, tail, functools.partial(_is_live, services, name, caller())
    )
    return live_answer(
        services,
        lines_in_pieces(_begun_in_turn(services, lines), gone()),
        "text/plain; charset=utf-8",
    )


def _begun_in_turn(services: Services, lines: Iterator[str]) -> Iterator[str]:
    """Yield the same lines; read the existing ones in turn before the first is yielded."""
    with services.log_readers:
        first = next(lines, "")
    yield first
    yield from lines


def _is_live(services: Services, name: QualifiedName, reader: Caller) -> bool:
    snapshot = services.keeper.get(name)
    return snapshot is not None and snapshot.state not in AT_REST and reader.sees(snapshot)
