"""Shortage of the keeper's own resources (threads, descriptors, memory), not others' faults."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from labkeeper.core.errors import BackendUnavailable

_OURS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL}
)
"""Errors of system calls that mean a shortage of descriptors, memory, processes or ports."""
_NO_THREAD: Final = "can't start new thread"
"""Python's message if a thread cannot be started; the error has no type of its own."""


_NO_PROCESSES: Final = (
    "no more processes are allowed; "
    "end some, or raise the limit (ulimit -u, or the container's --pids-limit)"
)


def reason_of(error: BaseException) -> str:
    """Return why a process could not be started."""
    no_more = isinstance(error, OSError) and error.errno == errno.EAGAIN
    return _NO_PROCESSES if no_more else str(error)


def is_ours(error: BaseException) -> bool:
    """Whether an error means a shortage of the keeper's own, not a fault of the other side."""
    return isinstance(error, OSError) and error.errno in _OURS


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the user's quota is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def suppress_others(*kinds: type[Exception]) -> Iterator[None]:
    """Suppress errors of these kinds, except the keeper's own shortages.

    In a shortage, what was not found may exist nevertheless.
    """
    try:
        yield
    except kinds as error:
        if is_ours(error):
            raise


@contextmanager
def told_of_threads() -> Iterator[None]:
    """Raise BackendUnavailable if a thread cannot be started in the block."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise BackendUnavailable(f"the keeper cannot start a thread, as {_NO_PROCESSES}") from error


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises BackendUnavailable if that fails."""
    with told_of_threads():
        thread.start()
