"""Repeats servers' logs in the keeper's own; of a container, only that one is usually read."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from labkeeper.backends.local.logs import LogFile

_RECORD: Final = re.compile(r"^\[([DIWEC]) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \w+\] ?")
"""Start of a Jupyter (traitlets) log record; lines without it, as in tracebacks, continue one."""
_LEVELS: Final = {
    "D": logging.DEBUG,
    "I": logging.INFO,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "C": logging.CRITICAL,
}
_MOST: Final = 256 * 1024
"""Maximum bytes repeated at a time; of a longer log, the newest."""

_log = structlog.get_logger("jupyter")


class Echo:
    """Repeats one server's log from an offset on, record by record."""

    def __init__(self, server: str, log: LogFile, since: int) -> None:
        self._server = server
        self._logfile = log
        self._since = since

    def repeat(self) -> None:
        """Log what is new."""
        with contextlib.suppress(OSError):  # It can be read later, or its disk is gone.
            lines, left_out, self._since = self._logfile.news(self._since, _MOST)
            if left_out:
                _log.warning(
                    "it logs too much to be repeated here; read its log",
                    server=self._server,
                    bytes=left_out,
                )
            for level, first, rest in _records(lines):
                more = {"exception": "\n".join(rest)} if rest else {}
                _log.log(level, first, server=self._server, **more)


def _records(lines: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the level, first line and remaining lines of each record.

    A line before the first record is a record of its own.
    """
    record: tuple[int, str, list[str]] | None = None
    for line in lines:
        head = _RECORD.match(line)
        if head is not None:
            if record is not None:
                yield record
            record = _LEVELS[head[1]], line[head.end() :], []
        elif record is not None:
            record[2].append(line)
        else:
            yield logging.INFO, line, []
    if record is not None:
        yield record
