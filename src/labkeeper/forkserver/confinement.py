"""What confines a process to one server: session, control groups, limits, user; and its log."""

from __future__ import annotations

import contextlib
import os
import resource

from .marks import mark, show
from .privileges import drop_bounding_set
from .wire import Launch

_OOM_SCORE = 300
"""Added to the process's OOM badness, on a scale where 1000 is all memory."""


def confine(launch: Launch) -> None:
    """Put a launch's limits and user into force; steps that need the keeper's rights come first.

    Raises OSError.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()
    join(launch.cgroups)
    for name, limit in launch.rlimits.items():
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (most, most))
    _go_first_without_memory()
    show(launch.title)
    mark(launch.server_dir)
    os.umask(launch.umask)
    if launch.user is not None:
        drop_bounding_set()
        os.setgroups(launch.user.groups)
        os.setresgid(launch.user.gid, launch.user.gid, launch.user.gid)
        os.setresuid(launch.user.uid, launch.user.uid, launch.user.uid)


def join(cgroups: list[str]) -> None:
    """Move this process into control groups, given by their member files. Raises OSError."""
    for path in cgroups:
        with open(path, "w") as members:
            members.write(str(os.getpid()))


def open_streams(log: int) -> None:
    """Make the log standard output and error, and standard input empty."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for descriptor in {nothing, log} - {0, 1, 2}:
        os.close(descriptor)


def _go_first_without_memory() -> None:
    """Make the OOM killer prefer this process and its children to the keeper and fork servers."""
    # /proc may be missing or read-only.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as score:
        ours = int(score.read())
        score.seek(0)
        score.write(str(max(ours, _OOM_SCORE)))
