"""The files by which a kernel would load other libraries, or other settings, than its zygote has.

An executed kernel imports a module from its working directory first; if its user has modules of
their own, then from there. A forked one finds the module loaded already, so it must be executed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_SUFFIXES = (".py", ".pyc", ".so")
"""Ends of the names of files that can be imported."""


@dataclass(frozen=True)
class Footprint:
    """Where a kernel could differ; of a zygote without libraries, nowhere."""

    top: Collection[str] = ()
    """Names of the modules that came with libraries, without those in packages."""
    personal: Iterable[str] = ()
    """Files in the home directory that libraries read."""
    local: Iterable[str] = ()
    """Files in the working directory that libraries read."""
    user_site: str | None = None
    """Directory of a user's own modules, in the home directory; None if they are not used."""

    def met_in(self, directory: str) -> str | None:
        """Return such a file in a working directory, or None."""
        return _first(directory, self.local) or _module(directory, self.top)

    def met_at_home(self, home: str) -> str | None:
        """Return such a file of a user who is not the loading one, or None."""
        found = _first(home, self.personal)
        if found is None and self.user_site is not None:
            found = _module(os.path.join(home, self.user_site), self.top)
        return found


def _first(directory: str, names: Iterable[str]) -> str | None:
    paths = (os.path.join(directory, name) for name in names)
    return next(filter(os.path.exists, paths), None)


def _module(directory: str, top: Collection[str]) -> str | None:
    """Return a file or package in a directory that is imported by one of these names."""
    if not top:
        return None
    for entry in _entries(directory):
        name, dot, _ = entry.partition(".")
        path = os.path.join(directory, entry)
        if name in top and (entry.endswith(_SUFFIXES) if dot else _is_package(path)):
            return path
    return None


def _is_package(path: str) -> bool:
    return any(
        entry.startswith("__init__.") and entry.endswith(_SUFFIXES) for entry in _entries(path)
    )


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        # It is none, or it cannot be searched for modules, either.
        return []
