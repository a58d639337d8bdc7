"""Process 1 of a container, where nobody else is it: the keeper is its child, and it does what an init has to do.

Linux gives process 1 every process whose parent has ended, to be waited for. A keeper that waited for children it does not know
would take their exit codes from those who do, so another process does it, which holds nothing and does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

_HANDED_ON: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SIGNALS: Final = _HANDED_ON | {signal.SIGCHLD}


def stay_behind() -> None:
    """As process 1, go on in a child, and stay behind as its init; end with its exit code. Before any thread runs."""
    if os.getpid() != 1:
        return
    # To process 1 a signal comes only when it has asked for it; one that is blocked waits until it is looked for.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    keeper = os.fork()
    if keeper == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_tend(keeper))


def _tend(keeper: int) -> int:
    """Hand signals on, and wait for whatever ends, until the keeper does; return its exit code, as a shell would."""
    while True:
        number = signal.sigwait(_SIGNALS)
        if number in _HANDED_ON:
            # Nobody but us waits for it, so its pid is its own.
            os.kill(keeper, number)
        elif (code := _reap(keeper)) is not None:
            return code if code >= 0 else 128 - code


def _reap(keeper: int) -> int | None:
    """Wait for all that has ended; return the exit code of the keeper, negative for a signal, when it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if end[0] == keeper:
                code = os.waitstatus_to_exitcode(end[1])
    return code
