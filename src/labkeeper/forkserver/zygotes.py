"""The fork server's end of the kernel loader, which is asked for a zygote for each server."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Container
from typing import Any

from . import wire
from .commands import loading
from .marks import MARK
from .wire import Launch, WireError

_PAUSE = 5.0
"""Seconds between two starts of a loader that ends by itself."""


class Zygotes:
    """The source of zygotes. Not available while its loader is pausing."""

    def __init__(self, rehearsed: Launch, selector: selectors.BaseSelector) -> None:
        """Take the launch of a server without special requests, as it was rehearsed.

        The selector waits for messages of the loader, which `heard` takes in.
        """
        self._rehearsed = rehearsed
        self._selector = selector
        self._child: subprocess.Popen[bytes] | None = None
        self._loader: socket.socket | None = None
        self._next = 0.0
        """When a loader may be started again."""
        self.libraries: dict[str, Any] = {}
        """What the last loader told of libraries; empty until then."""

    def new(self) -> socket.socket | None:
        """Ask for a zygote; return a server's connection to it, or None if there will be none."""
        if self._rehearsed.kernels_by != "fork" or not hasattr(os, "pidfd_open"):
            return None
        if self._loader is None and time.monotonic() >= self._next:
            self._start()
        if self._loader is None:
            return None
        ours, its = socket.socketpair()
        with its:
            try:
                wire.send(self._loader, {}, [its.fileno()])
            except (OSError, WireError) as error:
                # It is suspended, or has died.
                print(f"[labkeeper] kernel loader: {error}", file=sys.stderr, flush=True)
                ours.close()
                self.end()
                return None
        return ours

    def heard(self, ready: Container[Any]) -> bool:
        """Take in a message of the loader, if one is ready; return whether it was of libraries."""
        if self._loader is None or self._loader not in ready:
            return False
        try:
            self.libraries, _ = wire.receive(self._loader)
        except (EOFError, OSError, WireError):
            # It ends.
            self._part()
            return False
        return True

    def reaped(self, pids: list[int]) -> None:
        """Note that these children have ended."""
        if self._child is not None and self._child.pid in pids:
            # The fork server has reaped it.
            self._child.returncode = 0
            self._child = None
            self._part()

    def end(self) -> None:
        """End the loader; its zygotes stay."""
        if self._child is not None:
            self._child.kill()
        self._part()

    def close(self) -> None:
        """In a child: close the connection."""
        if self._loader is not None:
            self._loader.close()

    def _part(self) -> None:
        if self._loader is not None:
            self._selector.unregister(self._loader)
            self._loader.close()
            self._loader = None

    def _start(self) -> None:
        self._next = time.monotonic() + _PAUSE
        ours, its = socket.socketpair()
        with its:
            try:
                self._child = subprocess.Popen(  # noqa: S603 - the interpreter that runs already
                    loading(sys.executable, (), "kernels", its.fileno(), self._rehearsed.preload),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                print(f"[labkeeper] no kernel loader: {error}", file=sys.stderr, flush=True)
                ours.close()
                return
        ours.setblocking(False)
        self._loader = ours
        self._selector.register(ours, selectors.EVENT_READ)

    def _environment(self) -> dict[str, Any]:
        # It reserves the space of the mark, like the fork server.
        return {**self._rehearsed.env, MARK: os.environ[MARK]}
