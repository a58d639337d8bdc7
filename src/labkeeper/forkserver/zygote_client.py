"""A server's connection to a zygote (see `zygote`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from . import wire
from .footprint import Footprint
from .kernel_handle import KernelHandle, until_readable
from .wire import KernelLaunch, Launch, WireError

_LOADED_SECONDS = 0.3
"""Seconds to wait for a zygote that still loads: about what an executed kernel takes."""
_ANSWER_SECONDS = 5.0
"""Seconds in which a zygote must answer, also on a busy machine."""
_END_SECONDS = 1.0
"""Seconds in which a zygote without kernels must end."""
_LOG = 1
"""Standard output, which is the server's log."""
_ENDED = "the zygote has ended"
_AT_START = re.compile(
    r"^(PYTHON|LD_|LC_|LANG|MALLOC_|GLIBC_|OMP_|KMP_|GOMP_|OPENBLAS_|GOTO_|MKL_|BLIS_|NUMEXPR_)"
)
"""Variables that libraries read in other ways than by `os.environ`."""


class FirstZygote(NamedTuple):
    """What a server is given in order to fork its kernels."""

    connection: socket.socket | None = None
    why_not: str = "the server itself was executed"
    """Why there is none."""
    after: float = 0.0
    """Seconds from the server's start until it is made ready, unless a kernel is requested."""


class CannotFork(Exception):  # noqa: N818 - no error: the kernel is executed instead
    """The kernel must be executed; the message is the reason."""


class NoZygoteError(CannotFork):
    """There is no zygote for such a kernel, but one may be loaded."""


class StillLoadingError(NoZygoteError):
    """There is a zygote, but it is not ready yet."""


class Zygote:
    """One zygote, from the first message on until it is given up."""

    def __init__(self, connection: socket.socket | None, launch: Launch, why_not: str = "") -> None:
        """Take the connection to the zygote, or the reason why there is none.

        Of the launch it is told user, groups, limits and directory, but no environment and token.
        """
        self.why_not = why_not
        self.lost = connection is None
        """Whether it forks no more."""
        self._connection = connection
        title = launch.title.replace("jupyter-lab", "kernel-zygote", 1)
        self._launch = replace(launch, title=title, env={}, kernel_env={}, config={})
        self._introduced = False
        self._pid: int | None = None
        self._given: dict[str, str] = {}
        """The environment that it has loaded all in."""
        self._read: frozenset[str] = frozenset()
        """Variables that must not differ from it."""
        self._libraries = Footprint()
        self._turn = asyncio.Lock()
        """Held by the one that asks; it is answered in between."""
        self._kernels: weakref.WeakSet[KernelHandle] = weakref.WeakSet()

    @property
    def loaded(self) -> bool:
        """Whether it has ever been ready."""
        return self._pid is not None

    @property
    def busy(self) -> bool:
        """Whether a kernel of it runs."""
        return any(kernel.poll() is None for kernel in self._kernels)

    def give_up(self, reason: str) -> None:
        """Let the zygote end; its kernels stay."""
        if self._connection is not None and not self.lost:
            self.lost, self.why_not = True, reason
            # Whoever waits for an answer hears that there will be none, and closes.
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            if not self._turn.locked():
                self._close()

    async def end(self) -> None:
        """Let the zygote end, and wait for that; after the last kernel has ended."""
        if self._introduced and self._connection is not None:
            # Without a kernel nobody has heard yet which process it is.
            with contextlib.suppress(NoZygoteError):
                await self._meet()
        self.give_up("the server ends")
        if self._pid is not None:
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(self._pid)
                await until_readable(handle, _END_SECONDS)
                os.close(handle)

    def fits(self, env: Mapping[str, str]) -> bool:
        """Whether kernels with this environment can be forked, as far as is known."""
        return self._pid is None or self._unfit(env) is None

    def introduce(self) -> None:
        """Tell the zygote whose it is; before that, it need not even have been forked."""
        if self._connection is not None and not self._introduced:
            self._introduced = True
            # If it has ended, the first kernel finds that out.
            with contextlib.suppress(OSError):
                wire.send(self._connection, self._launch.message(), [_LOG])

    async def fork(self, launch: KernelLaunch) -> KernelHandle:
        """Fork a kernel; returns when its ports are open. Raises CannotFork."""
        self.introduce()
        async with self._taking_turn():
            await self._meet()
            if (reason := self._unfit(launch.env)) is not None:
                raise NoZygoteError(reason)
            if (file := self._libraries.met_in(launch.cwd)) is not None:
                raise CannotFork(f"{file} takes effect only when libraries are loaded")
            kernel = await self._ask(launch)
        self._kernels.add(kernel)
        await kernel.bound()
        return kernel

    @contextlib.asynccontextmanager
    async def _taking_turn(self) -> AsyncIterator[None]:
        async with self._turn:
            try:
                yield
            finally:
                if self.lost:
                    self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _meet(self) -> None:
        """Wait for the zygote's first message. Raises NoZygoteError."""
        if self._connection is None or self.lost:
            raise NoZygoteError(self.why_not)
        if self._pid is not None:
            return
        if not await until_readable(self._connection.fileno(), _LOADED_SECONDS):
            raise StillLoadingError("ipykernel is still being loaded")
        self.hear()

    def hear(self) -> None:
        """Take in the first message, which is there already. Raises NoZygoteError."""
        if self._connection is None or self.lost:
            raise NoZygoteError(self.why_not)
        message, _ = self._receive(self._connection)
        if "failed" in message:
            self._fail(str(message["failed"]))
        self._pid = message["pid"]
        self._read = frozenset(message["read"])
        self._given = message["given"]
        self._libraries = Footprint(**message["libraries"])

    def _unfit(self, env: Mapping[str, str]) -> str | None:
        """Return why kernels with this environment cannot be forked, or None."""
        for name in sorted(self._read | env.keys() | self._given.keys()):
            if env.get(name) != self._given.get(name) and (
                name in self._read or _AT_START.match(name)
            ):
                return f"the environment variable {name} takes effect only when a program starts"
        home = env.get("HOME")
        if home is not None and home != self._given.get("HOME"):
            file = self._libraries.met_at_home(home)
            if file is not None:
                return f"{file} takes effect only when libraries are loaded"
        return None

    async def _ask(self, launch: KernelLaunch) -> KernelHandle:
        if self._connection is None or self.lost:
            raise NoZygoteError(self.why_not)
        reader, writer = os.pipe()
        kernel = None
        try:
            with _only_for_the_kernel(launch) as file, _handle_of_this_process() as server:
                wire.send(self._connection, {"do": "kernel"}, [file, writer, server])
                if not await until_readable(self._connection.fileno(), _ANSWER_SECONDS):
                    # Should it go on, there is nothing to launch.
                    os.ftruncate(file, 0)
                    self._fail("the zygote did not answer")
            message, files = self._receive(self._connection)
            if "pid" in message and len(files) == 1:
                kernel = KernelHandle(message["pid"], files[0], reader)
        except asyncio.CancelledError:
            # The next one would be given this one's answer.
            self.give_up("a request was cancelled")
            raise
        except (BrokenPipeError, ConnectionResetError):
            self._fail(_ENDED)
        except (OSError, WireError) as error:
            self._fail(f"the zygote cannot be reached: {error}")
        finally:
            os.close(writer)
            if kernel is None:
                os.close(reader)
        if "stale" in message:
            self._fail(f"{message['stale']} has changed on disk since ipykernel was loaded")
        if kernel is None:
            raise CannotFork(f"the zygote failed: {message.get('error')}")
        return kernel

    def _receive(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
        """Return a message that is there already. Raises NoZygoteError."""
        try:
            return wire.receive(connection, within=_ANSWER_SECONDS)
        except (EOFError, ConnectionResetError):
            self._fail(_ENDED)
        except (OSError, WireError) as error:
            self._fail(f"the zygote cannot be heard: {error}")

    def _fail(self, reason: str) -> NoReturn:
        self.give_up(reason)
        raise NoZygoteError(reason)


@contextlib.contextmanager
def _only_for_the_kernel(launch: KernelLaunch) -> Iterator[int]:
    """Yield an open memory file that holds a launch; the zygote passes it on unread."""
    with os.fdopen(os.memfd_create("kernel"), "w") as stream:
        json.dump(launch.message(), stream)
        stream.seek(0)
        yield stream.fileno()


@contextlib.contextmanager
def _handle_of_this_process() -> Iterator[int]:
    """Yield a handle (pidfd) by which a kernel sees the end of its server."""
    handle = os.pidfd_open(os.getpid())
    try:
        yield handle
    finally:
        os.close(handle)
