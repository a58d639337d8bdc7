"""A terminal that a command runs at, and what its screen shows."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios

import psutil

from harness import until

_LAUNCH = (
    "import fcntl, os, signal, sys, termios\n"
    "os.setsid()\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)
"""Makes stdin the controlling terminal, from which signals come. If the tests are run by nohup(1),
the command would ignore the end of its own terminal, too."""
_SEQUENCE = re.compile(r"\x1b\[(?P<arguments>[?0-9;]*)(?P<kind>[A-Za-z])")
ALTERNATE_ON, ALTERNATE_OFF = "\x1b[?1049h", "\x1b[?1049l"
CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A command at a pseudo-terminal. The test must read, or the command blocks."""

    def __init__(self, command, *, columns=100, lines=24, env, stdin=None):
        self._primary, self._secondary = os.openpty()
        os.set_blocking(self._primary, False)
        termios.tcsetwinsize(self._secondary, (lines, columns))
        self.before = termios.tcgetattr(self._secondary)
        self.output = ""
        launch = [] if stdin is not None else [sys.executable, "-c", _LAUNCH]
        self.process = subprocess.Popen(
            [*launch, *command],
            stdin=self._secondary if stdin is None else stdin,
            stdout=self._secondary,
            stderr=self._secondary,
            env={"TERM": "xterm-256color"} | env,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.hang_up()
        os.close(self._secondary)

    def hang_up(self):
        """Close the terminal's window, so to speak. Idempotent."""
        if self._primary is not None:
            os.close(self._primary)
        self._primary = None

    def attributes(self):
        return termios.tcgetattr(self._secondary)

    def press(self, keys):
        os.write(self._primary, keys.encode())

    def resize(self, columns, lines):
        """Resize it; the kernel sends SIGWINCH to the command."""
        termios.tcsetwinsize(self._primary, (lines, columns))

    def read(self):
        """Return everything printed so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._primary, 65536):
                self.output += piece.decode(errors="replace")
        return self.output

    def screen(self):
        """Return the lines of the screen; a command must write each of them whole."""
        shown, line = {}, 0
        text, end = self.read().rpartition(ALTERNATE_ON)[2], 0
        for found in _SEQUENCE.finditer(text):
            shown[line] = shown.get(line, "") + text[end : found.start()]
            end = found.end()
            if found["kind"] == "H":
                line = int(found["arguments"].partition(";")[0] or 1) - 1
                shown[line] = ""
        shown[line] = shown.get(line, "") + text[end:]
        return [shown.get(number, "") for number in range(max(shown, default=0) + 1)]

    def shows(self, pattern):
        """Wait until a line of the screen matches, and return the match."""

        def found():
            matches = (re.search(pattern, line) for line in self.screen())
            return next(filter(None, matches), None)

        return until(found, what=lambda: f"{pattern!r} at the terminal: {self.screen()}")

    def ended(self):
        """Wait until the command has ended, and return its exit code."""

        def code():
            self.read()
            return self.process.poll() is not None

        until(code, what="the command to end")
        self.read()
        return self.process.returncode

    def is_restored(self):
        """Whether keys are echoed, and screen and cursor as they were."""
        text = self.read()
        return (
            self.attributes() == self.before
            and text.rindex(ALTERNATE_OFF) > text.rindex(ALTERNATE_ON)
            and text.rindex(CURSOR_ON) > text.rindex(CURSOR_OFF)
        )

    def stop_and_continue(self):
        """Press Ctrl-Z, check that the terminal is usable, and continue the command."""
        self.press("\x1a")
        until(lambda: self._state() == psutil.STATUS_STOPPED, what="the command to be suspended")
        assert self.is_restored()
        os.kill(self.process.pid, signal.SIGCONT)

    def _state(self):
        self.read()
        return psutil.Process(self.process.pid).status()
