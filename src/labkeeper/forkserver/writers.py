"""Who can write the files of modules: code of others must not run in a process of this user."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class WritableByOthersError(ImportError):
    """A module is not imported, because others can write its file."""


class Guard(MetaPathFinder):
    """Finds modules as usual, but refuses those whose file others can write.

    Others are all users except root and this process's.
    """

    def __init__(self) -> None:
        self.refused: list[str] = []
        """What was refused; an importing module may ignore the error."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find. Raises WritableByOthersError."""
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.has_location:
            for file in filter(None, (spec.origin, spec.cached)):
                if (writer := foreign_writer(file)) is not None:
                    self.refused.append(f"{name}: {writer}")
                    raise WritableByOthersError(self.refused[-1], name=name, path=file)
        return spec


def foreign_writer(path: str) -> str | None:
    """Return who else can write or replace a file, in words; None if nobody can."""
    for place in _ways_to(path):
        if (writer := _writer(place)) is not None:
            return f"{writer} can write {place}"
    return None


def _ways_to(path: str) -> Iterator[str]:
    """Yield a path with its parents, also those that it has without links."""
    for way in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        yield way
        parts = way.split(os.sep)
        yield from (os.sep.join(parts[:count]) or os.sep for count in range(1, len(parts)))


@functools.cache
def _writer(path: str) -> str | None:
    try:
        found = os.stat(path)
    except OSError:
        # It may come into being, such as a compiled file; then its directory decides.
        return None
    if found.st_uid not in {0, os.geteuid()}:
        return f"user {_user(found.st_uid)}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        # All can write to it, but not replace what is there.
        return None
    if found.st_mode & stat.S_IWOTH:
        return "everyone"
    if found.st_mode & stat.S_IWGRP and (_has_rights_of_its_own(path) or _members(found.st_gid)):
        return f"group {_group(found.st_gid)}"
    return None


def _has_rights_of_its_own(path: str) -> bool:
    """Return whether the rights of a group stand for an access list, acl(5)."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


@functools.cache
def _members(gid: int) -> bool:
    """Return whether a group has members other than root and this process's user."""
    if gid == 0:
        return False
    us = {0, os.geteuid()}
    try:
        named = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(gid).gr_mem}
    except KeyError:
        # An unknown group, or an unknown member.
        return True
    return bool((named | {each.pw_uid for each in pwd.getpwall() if each.pw_gid == gid}) - us)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
