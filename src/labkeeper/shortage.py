"""What the keeper itself runs out of: threads, descriptors, memory. None of that is the fault of whom it looks at meanwhile."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from labkeeper.core.errors import BackendUnavailable

_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL})
"""Errors of system calls by which we, or our machine, have run out of something: descriptors, memory, processes, ports."""
_NO_THREAD: Final = "can't start new thread"
"""What Python says where a thread is one too many; the error has no type of its own."""


def is_ours(error: BaseException) -> bool:
    """Whether an error tells of our own shortage, and not of the other side."""
    return isinstance(error, OSError) and error.errno in _OURS


def is_full(error: BaseException) -> bool:
    """Whether an error tells that a disk has no room, or no more for this user."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def suppress_others(*kinds: type[Exception]) -> Iterator[None]:
    """Suppress errors of these kinds, but for those of our own shortage: what was not found then may be there all the same."""
    try:
        yield
    except kinds as error:
        if is_ours(error):
            raise


@contextmanager
def told_of_threads() -> Iterator[None]:
    """Raise BackendUnavailable where a thread cannot be started inside."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise BackendUnavailable(
            "the keeper cannot start a thread, as no more processes are allowed; end some, or raise the limit (ulimit -u, "
            "or the container's --pids-limit)"
        ) from error


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises BackendUnavailable where that cannot be."""
    with told_of_threads():
        thread.start()
