"""The zygotes of one server: the one that it was given, and those that it has loaded itself.

Kernels of another interpreter, of another environment, or of packages that have changed since need
a zygote of their own. The first such kernel is executed; a zygote for the next ones is loaded a
moment later. It is a child of the server, and ends when it has not been needed for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .commands import FROZEN_MODULES_OFF, LAUNCHER, loading
from .kernel_handle import KernelHandle
from .wire import KernelLaunch, Launch
from .zygote_client import CannotFork, NoZygoteError, StillLoadingError, Zygote

_PAUSE = 2.0
"""Seconds between an executed kernel and loading a zygote: the first cell has CPU priority."""
_MOST = 2
"""Maximum number of zygotes that a server loads itself; each takes some 40 MiB, and what libraries
take."""
_IDLE_SECONDS = 600.0
"""Seconds after which a zygote without kernels ends, and after which a failed one is retried."""
_LOOK_EVERY = 60.0


class Interpreter(NamedTuple):
    """What a kernel is executed with."""

    path: str
    options: tuple[str, ...] = ()


@dataclass(eq=False)
class _Loaded:
    """A zygote that this server has loaded; its own child."""

    zygote: Zygote
    interpreter: Interpreter
    process: subprocess.Popen[bytes]
    used: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        return time.monotonic() - self.used > _IDLE_SECONDS and not self.zygote.busy

    def serves(self, interpreter: Interpreter, env: Mapping[str, str]) -> bool:
        """Whether such a kernel can be forked, as far as is known."""
        return self.interpreter == interpreter and not self.zygote.lost and self.zygote.fits(env)

    def kill(self) -> None:
        """End it, even while it loads, with the kernel that it rehearses."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Failure(NamedTuple):
    """Why a zygote could not be loaded, and when."""

    reason: str
    at: float


class ZygotePool:
    """Forks kernels by the zygote that fits."""

    def __init__(self, first: Zygote, launch: Launch, off: str = "") -> None:
        """`off` is the reason if kernels shall not be forked at all."""
        self._first = first
        self._launch = launch
        self._off = off
        self._loaded: list[_Loaded] = []
        self._failed: dict[Interpreter, _Failure] = {}
        if off:
            first.give_up(off)

    def prepare(self) -> None:
        """Have the first zygote ready for the first kernel."""
        self._first.introduce()

    async def fork(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str, *, again: bool
    ) -> KernelHandle:
        """Fork what a command line would execute. Raises CannotFork."""
        if self._off:
            raise CannotFork(self._off)
        interpreter = interpreter_of(command)
        launch = KernelLaunch(_expanded(command), dict(env), _checked_directory(cwd), again)
        reason = (
            f"ipykernel of {' '.join((interpreter.path, *interpreter.options))} is not loaded yet"
        )
        if interpreter == Interpreter(sys.executable):
            try:
                return await self._first.fork(launch)
            except NoZygoteError as because:
                reason = str(because)
        elif interpreter in self._failed:
            reason = self._failed[interpreter].reason
        for one in [one for one in self._loaded if one.interpreter == interpreter]:
            try:
                kernel = await one.zygote.fork(launch)
            except NoZygoteError as because:
                # Why the first one does not fit tells more.
                if self._first.lost and not isinstance(because, StillLoadingError):
                    reason = str(because)
            else:
                one.used = time.monotonic()
                return kernel
        self._load_soon(interpreter, env)
        raise CannotFork(reason)

    async def end(self) -> None:
        """Let all zygotes end, and wait for that; after the last kernel has ended."""
        self._off = "the server ends"
        await self._first.end()
        for one in list(self._loaded):
            await one.zygote.end()
            one.kill()

    def _load_soon(self, interpreter: Interpreter, env: Mapping[str, str]) -> None:
        asyncio.get_running_loop().call_later(_PAUSE, self._load, interpreter, dict(env))

    def _load(self, interpreter: Interpreter, env: dict[str, str]) -> None:
        """Load a zygote, unless that is not needed by now, or has failed recently."""
        failed = self._failed.get(interpreter)
        first = Interpreter(sys.executable)
        if (
            self._off
            or (interpreter == first and not self._first.lost and self._first.fits(env))
            or any(one.serves(interpreter, env) for one in self._loaded)
            or sum(not one.zygote.lost for one in self._loaded) >= _MOST
            or (failed is not None and time.monotonic() - failed.at < _IDLE_SECONDS)
        ):
            return
        ours, its = socket.socketpair()
        with its:
            try:
                process = subprocess.Popen(  # noqa: S603 - a kernelspec's interpreter, as Jupyter does
                    loading(
                        interpreter.path,
                        interpreter.options,
                        "zygote",
                        its.fileno(),
                        self._launch.preload,
                    ),
                    env={name: value for name, value in env.items() if name != "JPY_PARENT_PID"},
                    # It writes into its working directory, which must not be a user's.
                    cwd=os.environ["JUPYTER_RUNTIME_DIR"],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    start_new_session=True,
                )
            except OSError:
                # Then a kernel cannot be executed, either, and Jupyter has said so.
                ours.close()
                return
        # It has this server's user, limits and groups already.
        launch = replace(self._launch, user=None, cgroups=[], zygote_cgroups=[])
        one = _Loaded(Zygote(ours, launch), interpreter, process)
        one.zygote.introduce()
        self._loaded.append(one)
        handle = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(handle, self._ended, one, handle)
        loop.call_later(_LOOK_EVERY, self._look, one)

    def _look(self, one: _Loaded) -> None:
        """Let a zygote end that is not needed."""
        if one.idle:
            one.zygote.give_up("it was idle")
        if one in self._loaded:
            asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look, one)

    def _ended(self, one: _Loaded, handle: int) -> None:
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
        one.process.wait()
        self._loaded.remove(one)
        if not one.zygote.loaded:
            try:
                one.zygote.hear()
            except NoZygoteError as because:
                self._failed[one.interpreter] = _Failure(str(because), time.monotonic())
        one.zygote.give_up("the zygote has ended")


def interpreter_of(command: Sequence[str]) -> Interpreter:
    """Return what a command line executes an IPython kernel with. Raises CannotFork."""
    module = command.index("-m") if "-m" in command else len(command)
    if list(command[module + 1 : module + 2]) != [LAUNCHER]:
        raise CannotFork("it is no IPython kernel")
    options = (option for option in command[1:module] if option != FROZEN_MODULES_OFF)
    path = os.path.expanduser(command[0])
    if _place(path) == _place(sys.executable):
        path = sys.executable
    return Interpreter(path, tuple(options))


def _place(path: str) -> tuple[str, str]:
    """Return what an interpreter finds its packages by; in an environment it may be a link."""
    return os.path.dirname(path), os.path.realpath(path)


def _expanded(command: Sequence[str]) -> list[str]:
    """Return a command line as Jupyter executes it."""
    return [os.path.expanduser(part) for part in command]


def _checked_directory(path: str) -> str:
    """Return a working directory that can be entered. Raises CannotFork."""
    if not (os.path.isdir(path) and os.access(path, os.X_OK)):
        raise CannotFork(f"the directory {path} cannot be entered")
    return path
