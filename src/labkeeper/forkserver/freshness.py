"""Detects whether loaded modules and configuration still match the disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

_CONFIG_FILES = tuple(
    f"jupyter_{what}config.{kind}" for what in ("", "server_", "lab_") for kind in ("py", "json")
)


class Freshness:
    """Whether this process has loaded what a new process would load."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        """Record the present state of the disk, and of more files; `settle` when all is loaded."""
        self._since = time.time_ns()
        self._known = {path: _stamp(path) for path in (*self._places(), *files)}

    def settle(self) -> str | None:
        """Record the files of all modules; return one that changed during loading, or None."""
        changed = self.changed()
        files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        stamps = {path: _stamp(path) for path in files if path}
        self._known = {**stamps, **self._known}
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
        return next((path for path, stamp in self._known.items() if _stamp(path) != stamp), None)

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


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
