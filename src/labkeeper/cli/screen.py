"""The whole terminal, for a live display: frames, keys without Enter, and signals.

However the display ends, the terminal is as it was before. Imported late, since it needs rich.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sys
import termios
import tty
from types import FrameType
from typing import Any, Final, Self

from rich.console import Console, RenderableType

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HANDLED: Final = (*_ENDING, signal.SIGTSTP, signal.SIGWINCH)
_KEY: Final = re.compile(r"\x1b\[[0-9;]*[~A-Za-z]|\x1bO[A-Z]|.", re.DOTALL)
_NAMED: Final = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
}
"""Keys that terminals send as sequences (xterm's)."""
_LEAST: Final = (80, 24)
"""Columns and lines of a terminal that does not know its size."""


class Screen:
    """The alternate screen of the terminal at stdout, with the keys of the one at stdin, if any."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list[Any] | None = None
        """The attributes of stdin's terminal."""
        self._handlers: dict[int, Any] = {}
        self._wakeup_before = -1
        self._reading, self._writing = socket.socketpair()

    @property
    def has_keys(self) -> bool:
        """Whether keys can arrive."""
        return self._keys is not None

    @property
    def size(self) -> tuple[int, int]:
        """The columns and lines of the terminal now; rich would believe COLUMNS and LINES."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            return _LEAST
        return columns or _LEAST[0], lines or _LEAST[1]

    def __enter__(self) -> Self:
        for end in (self._reading, self._writing):
            end.setblocking(False)
        # A handler of our own makes Python write each signal's number there, where `wait` reads.
        self._wakeup_before = signal.set_wakeup_fd(self._writing.fileno())
        for number in _HANDLED:
            # Whoever lets us ignore a signal (nohup) means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, _only_noted)
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        try:
            self._give_back()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._reading.close()
            self._writing.close()

    def _take(self) -> None:
        if self._keys is not None:
            self._before = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        try:
            # The terminal may have gone.
            with contextlib.suppress(OSError):
                self._console.show_cursor(True)
                self._console.set_alt_screen(False)
        finally:
            if self._keys is not None and self._before is not None:
                with contextlib.suppress(termios.error):
                    # Keys that were typed too late are not for the shell.
                    termios.tcsetattr(self._keys, termios.TCSAFLUSH, self._before)

    def draw(self, frame: RenderableType) -> None:
        """Show a frame on the whole screen."""
        self._console.size = self.size
        self._console.update_screen(frame)

    def wake(self) -> None:
        """Let `wait` return. Any thread may call it, also after the end."""
        with contextlib.suppress(OSError):
            self._writing.send(b"\0")

    def wait(self, seconds: float) -> list[str]:
        """Return the keys that are typed next; none if it is time to draw again.

        Raises KeyboardInterrupt at Ctrl-C, and SystemExit at another signal to end or if the
        terminal is gone.
        """
        inputs = [self._reading.fileno(), *([] if self._keys is None else [self._keys])]
        ready, _, _ = select.select(inputs, [], [], seconds)
        if self._reading.fileno() in ready:
            for number in self._reading.recv(4096):
                self._obey(number)
        return self._typed() if self._keys in ready else []

    def _obey(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number in _ENDING:
            raise SystemExit(128 + number)
        if number == signal.SIGTSTP:
            self._give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            # Here we are again, in the foreground.
            self._take()

    def _typed(self) -> list[str]:
        assert self._keys is not None  # noqa: S101 - for mypy
        try:
            typed = os.read(self._keys, 4096)
        except OSError:
            typed = b""
        if not typed:
            raise SystemExit(128 + signal.SIGHUP)
        return [_NAMED.get(key, key) for key in _KEY.findall(typed.decode(errors="replace"))]


def _only_noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number was written already."""
