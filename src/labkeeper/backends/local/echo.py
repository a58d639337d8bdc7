"""What a server logs, repeated in the keeper's own log: of a container, that is the only one that is looked at."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from labkeeper.backends.local.logs import LogFile

_RECORD: Final = re.compile(r"^\[([DIWEC]) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \w+\] ?")
"""How Jupyter (traitlets) begins a record; what follows without it, such as a traceback, belongs to it."""
_LEVELS: Final = {"D": logging.DEBUG, "I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "C": logging.CRITICAL}
_MOST: Final = 256 * 1024
"""Bytes that are repeated at a time; where a server logs more, the newest are."""

_log = structlog.get_logger("jupyter")


class Echo:
    """Repeats one server's log from a place on, each record as one."""

    def __init__(self, server: str, log: LogFile, since: int) -> None:
        self._server = server
        self._logfile = log
        self._since = since

    def repeat(self) -> None:
        """Repeat what is new."""
        with contextlib.suppress(OSError):  # It can be read later, or it is gone with its disk.
            lines, left_out, self._since = self._logfile.news(self._since, _MOST)
            if left_out:
                _log.warning("it logs too much to be repeated; its log has it", server=self._server, bytes=left_out)
            for level, first, rest in _records(lines):
                more = {"exception": "\n".join(rest)} if rest else {}
                _log.log(level, first, server=self._server, **more)


def _records(lines: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Put lines together: level, first line and the others of each record. A line before the first one is a record of its own."""
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
