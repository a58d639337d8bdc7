"""Detects whether loaded modules and configuration still match the disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Optional

_CONFIG_FILES = tuple(
    f"jupyter_{what}config.{kind}" for what in ("", "server_", "lab_") for kind in ("py", "json")
)

_Stamp = Optional[tuple[int, int, int]]
"""Time of the last change in nanoseconds, size in bytes, and number of a file, if there is one."""


class Freshness:
    """Whether this process has loaded what a new process would load."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        """Record the present state of the disk, and of more files; `settle` when all is loaded."""
        self._since = time.time_ns()
        self._known = ""
        """Each path, and the stamp that it had, with a null character after each.

        One string, because a check of many objects writes to the reference count of each, and these
        lie among the objects of all modules, in memory pages that forks share.
        """
        self._record({path: _stamp(path) for path in (*self._places(), *files)})

    def settle(self) -> str | None:
        """Record the files of all modules; return one that changed during loading, or None."""
        changed = self.changed()
        files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        stamps = {path: _stamp(path) for path in files if path}
        self._record(stamps)
        # It may have been written before or after it was loaded. A time in the future proves
        # nothing.
        young = (
            path
            for path, stamp in stamps.items()
            if stamp and self._since < stamp[0] <= time.time_ns()
        )
        return changed or next(young, None)

    def changed(self) -> str | None:
        """Return a path that has changed since, or None. Takes about 4 ms."""
        return next((path for path, stamp in self._pairs() if str(_stamp(path)) != stamp), None)

    def _record(self, stamps: Mapping[str, _Stamp]) -> None:
        self._known += "".join(f"{path}\0{stamp}\0" for path, stamp in stamps.items())

    def _pairs(self) -> Iterator[tuple[str, str]]:
        begin = 0
        while begin < len(self._known):
            middle = self._known.index("\0", begin)
            end = self._known.index("\0", middle + 1)
            yield self._known[begin:middle], self._known[middle + 1 : end]
            begin = end + 1

    @staticmethod
    def _places() -> list[str]:
        """Return the directories of packages and configuration, and the interpreter."""
        from jupyter_core.paths import jupyter_config_path

        config = [
            found
            for directory in jupyter_config_path()
            for found in (
                *(os.path.join(directory, name) for name in _CONFIG_FILES),
                *_files_in(os.path.join(directory, "jupyter_server_config.d")),
            )
        ]
        lists = [file for place in sys.path for file in _files_in(place) if file.endswith(".pth")]
        return [sys.executable, *filter(None, sys.path), *lists, *config]


def _files_in(directory: str) -> list[str]:
    try:
        return [directory, *(entry.path for entry in os.scandir(directory))]
    except OSError:
        return [directory]


def _stamp(path: str) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
