"""A server's handle of a kernel that its zygote has forked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from typing import Any

from . import wire
from .wire import WireError

_BOUND_SECONDS = 10.0
"""Seconds to wait for a kernel's ports; then clients connect as to an executed kernel."""
_STATUS_SECONDS = 0.5
"""Seconds in which a zygote must report how its kernel ended."""
_UNKNOWN_STATUS = 255
"""The return code of a kernel whose end nobody has seen, as in asyncio."""


class KernelHandle:
    """The process of a forked kernel, with what a provisioner uses of `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, handle: int, report: int) -> None:
        """Take ownership of a handle (pidfd) of the process, and of its report pipe."""
        self.pid = pid
        self.returncode: int | None = None
        self._handle = handle
        self._report = report
        self._said: dict[str, Any] = {}
        self._buffer = b""

    def __del__(self) -> None:
        """Close the open files."""
        os.close(self._handle)
        os.close(self._report)

    def poll(self) -> int | None:
        """Return the return code, or None while it runs."""
        if self.returncode is None and readable(self._handle, 0.0):
            while "status" not in self._said and readable(self._report, _STATUS_SECONDS):
                if not self._take_in():
                    break
            status = self._said.get("status")
            self.returncode = (
                os.waitstatus_to_exitcode(status) if isinstance(status, int) else _UNKNOWN_STATUS
            )
        return self.returncode

    def wait(self) -> int | None:
        """Return the return code of an ended kernel."""
        readable(self._handle, None)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    async def bound(self) -> None:
        """Wait until its ports are open, or it has ended."""
        while "bound" not in self._said and await until_readable(self._report, _BOUND_SECONDS):
            if not self._take_in():
                return

    def _take_in(self) -> bool:
        """Read a piece of the report; return whether there may be more."""
        piece = os.read(self._report, 1024)
        *lines, self._buffer = (self._buffer + piece).split(b"\n")
        for line in lines:
            with contextlib.suppress(WireError):
                self._said.update(wire.read_line(line))
        return bool(piece)


def readable(file: int, seconds: float | None) -> bool:
    """Wait until a file can be read without waiting; return whether it can."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


async def until_readable(file: int, seconds: float) -> bool:
    """Do the same without holding up the event loop."""
    if readable(file, 0.0):
        return True
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(file, ready.set)
    try:
        await asyncio.wait_for(ready.wait(), seconds)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(file)
    return True
