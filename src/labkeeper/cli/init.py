"""An init for a container in which the keeper would be process 1: the keeper becomes its child.

Linux reparents orphaned processes to process 1, which must reap them. A keeper that reaped unknown
children would take their exit codes from the code that waits for them, so a separate process does
it, which holds nothing and does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

_HANDED_ON: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SIGNALS: Final = _HANDED_ON | {signal.SIGCHLD}


def stay_behind() -> None:
    """As process 1, continue in a child and act as its init. Call before any thread runs."""
    if os.getpid() != 1:
        return
    # Process 1 only gets signals that it handles; a blocked one stays pending until sigwait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    keeper = os.fork()
    if keeper == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_tend(keeper))


def _tend(keeper: int) -> int:
    """Forward signals and reap processes until the keeper ends; return a shell's exit code."""
    while True:
        number = signal.sigwait(_SIGNALS)
        if number in _HANDED_ON:
            # Only we reap it, so its pid cannot have been reused.
            os.kill(keeper, number)
        elif (code := _reap(keeper)) is not None:
            return code if code >= 0 else 128 - code


def _reap(keeper: int) -> int | None:
    """Reap all ended processes; return the keeper's exit code, if any; negative: a signal."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if end[0] == keeper:
                code = os.waitstatus_to_exitcode(end[1])
    return code
