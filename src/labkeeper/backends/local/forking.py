"""The current fork server: one is kept ready, and replaced when it is stale or dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from labkeeper import shortage
from labkeeper.backends.local.cleanup import end_leftovers
from labkeeper.backends.local.forkserver import ForkServers, Instance, NoForkServerError
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import Process
from labkeeper.backends.local.server_dir import ServerDir
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import QualifiedName
from labkeeper.forkserver import wire
from labkeeper.threads import ThreadGroup

_WARM_UP: Final = 3.0
"""Estimated seconds that a fork server takes to load, until one has been measured."""
_EXEC_SHARE: Final = 0.8
"""Duration of executing a server as a share of loading: same imports, initialised once."""
_PAUSES: Final = (0.2, 600.0)
"""Seconds between a failure and the next start: initial and maximum."""
_AT_START: Final = re.compile(
    r"^(PYTHON|JUPYTER(?!_(RUNTIME|CONFIG|DATA)_DIR$)|LD_|LC_|LANG|MALLOC_|GLIBC_)"
)
"""Variables read at program start or at import: too late for a forked server."""

_log = structlog.get_logger("labkeeper.backends.local.forking")


class CannotFork(Exception):  # noqa: N818 - no error: the server is executed instead
    """The server must be executed; the message is the reason."""


class ForkServer:
    """Keeps one fork server ready. Thread-safe."""

    def __init__(
        self,
        threads: ThreadGroup,
        *,
        python: Path,
        runtime_dir: Path,
        log_dir: Path,
        groups: ControlGroups,
        environment: Mapping[str, str],
        config: Mapping[str, Mapping[str, Any]],
        kernels_by: str,
        preload: Sequence[str],
    ) -> None:
        """`environment` and `config` (Jupyter's) are those of a server without special requests."""
        self._threads = threads
        self._environment = dict(environment)
        self._processes = ForkServers(
            threads,
            python=python,
            runtime_dir=runtime_dir,
            log_dir=log_dir,
            groups=groups,
            environment=self._environment,
            config=config,
            kernels_by=kernels_by,
            preload=preload,
        )
        self._changed = threading.Condition()
        self._current: Instance | None = None
        self._why_not = ""
        """Why there is none and none is loading."""
        self._libraries: Mapping[str, str | None] = {}
        """Why libraries are left out, None for loaded ones; empty until it is known."""
        self._begun = time.monotonic()
        self._warm_up = _WARM_UP

    def start(self) -> None:
        """Adopt an earlier keeper's fork server, or load a new one."""
        self._threads.start("forkserver", self._supervise)

    @property
    def libraries(self) -> Mapping[str, str | None]:
        """Why libraries are left out, None for loaded ones; empty until it is known."""
        with self._changed:
            return self._libraries

    # Requests for servers

    def launch(self, launch: wire.Launch, log: int, report: int) -> tuple[Process, str]:
        """Fork a server; return its process and the name of its parent.

        Waits for a loading fork server if that is faster than exec. Raises CannotFork.
        """
        self._check(launch.env)
        server_dir = ServerDir(Path(launch.server_dir))
        while True:
            instance = self._await_ready()
            try:
                with _only_for_the_child(launch) as file:
                    answer = self._processes.ask(
                        instance.name, {"do": "launch"}, [file, log, report]
                    )
            except (OSError, EOFError, wire.WireError) as error:
                if shortage.is_ours(error):
                    # It did not receive the request.
                    raise CannotFork(
                        f"the keeper cannot ask the fork server now: {error}"
                    ) from error
                # Killed, since it may be stopped rather than dead; its servers live on without it.
                instance.process.send(signal.SIGKILL)
                self._give_up(instance)
                # It may have forked anyway, and the child may already have written its files.
                with contextlib.suppress(BackendUnavailable):
                    end_leftovers(
                        QualifiedName(server_dir.path.name), server_dir.path, set(), grace=0.0
                    )
                server_dir.reset()
                raise CannotFork(
                    f"the fork server did not answer ({type(error).__name__})"
                ) from error
            if "pid" in answer:
                return Process(answer["pid"], answer["started"]), instance.name
            if "retired" not in answer:
                raise CannotFork(f"the fork server failed: {answer.get('error')}")
            self._give_up(instance)
            # It may have killed a child that had already written its files.
            server_dir.reset()

    def attach(self, name: str, pid: int, report: int) -> bool:
        """Have the fork server of this name report a server's end; return whether it is the parent.

        Raises OSError if the keeper lacks resources to ask.
        """
        with shortage.suppress_others(OSError, EOFError, wire.WireError):
            return (
                self._processes.ask(name, {"do": "attach", "pid": pid}, [report]).get("known")
                is True
            )
        return False

    def _check(self, environment: Mapping[str, str]) -> None:
        for name in sorted(environment.keys() | self._environment.keys()):
            differs = environment.get(name) != self._environment.get(name)
            if differs and _AT_START.match(name):
                raise CannotFork(
                    f"the environment variable {name} takes effect only when a program starts"
                )

    def _await_ready(self) -> Instance:
        """Return the current fork server, waiting for a loading one if that is faster than exec.

        Raises CannotFork.
        """
        with self._changed:
            executed_by = time.monotonic() + _EXEC_SHARE * self._warm_up
            while self._current is None:
                if self._why_not:
                    raise CannotFork(self._why_not)
                if self._begun + self._warm_up > executed_by:
                    raise CannotFork("the fork server has only begun to load")
                if not self._changed.wait(executed_by - time.monotonic()):
                    raise CannotFork("the fork server takes long to load")
            return self._current

    # Supervision

    def _supervise(self) -> None:
        pause, longest = _PAUSES
        find = self._processes.take_over
        while not self._threads.closed:
            try:
                instance, find = find(), lambda: None
                self._serve_by(instance or self._spawn())
                # It was replaced as planned, and the next one is needed at once.
                pause = _PAUSES[0]
            except (NoForkServerError, BackendUnavailable, OSError) as error:
                # Also if the keeper lacks resources: in any case servers are executed meanwhile,
                # and it is retried.
                if self._threads.closed:
                    return
                _log.warning(
                    "there is no fork server; servers are executed",
                    reason=str(error),
                    next_in=pause,
                )
                self._set(None, str(error))
                if self._threads.sleep(pause):
                    return
                pause = min(pause * 4, longest)
                self._set(None, "")

    def _serve_by(self, instance: Instance) -> None:
        """Use an instance until it retires or the keeper closes.

        Raises NoForkServerError if it dies.
        """
        self._set(instance, "")
        begun = time.monotonic()
        try:
            while "retired" not in (message := self._processes.receive(instance.connection)):
                self._hear(message)
            _log.info("the fork server is replaced", reason=message["retired"])
        except NoForkServerError:
            if self._threads.closed:
                return
            # A long-lived one died of something new.
            if time.monotonic() - begun < _PAUSES[1]:
                raise
        finally:
            if not self._threads.closed:
                self._give_up(instance)

    def _hear(self, message: Mapping[str, Any]) -> None:
        """Take in what the fork server tells of libraries."""
        loaded, left_out = message.get("preloaded"), message.get("left_out")
        if not (
            isinstance(loaded, list)
            and isinstance(left_out, dict)
            and all(isinstance(text, str) for text in (*loaded, *left_out.values()))
        ):
            _log.warning("cannot understand the fork server", keys=sorted(message))
            return
        for name, reason in left_out.items():
            _log.warning("a library is not preloaded", library=name, reason=reason)
        if loaded:
            _log.info("libraries are preloaded", libraries=loaded)
        with self._changed:
            self._libraries = {**dict.fromkeys(loaded), **left_out}

    def _spawn(self) -> Instance:
        instance = self._processes.spawn()
        with self._changed:
            self._warm_up = time.monotonic() - self._begun
        _log.info(
            "the fork server is ready", pid=instance.process.pid, seconds=round(self._warm_up, 2)
        )
        return instance

    def _set(self, instance: Instance | None, why_not: str) -> None:
        with self._changed:
            if instance is None:
                self._begun = time.monotonic()
            self._current, self._why_not, self._libraries = instance, why_not, {}
            self._changed.notify_all()

    def _give_up(self, instance: Instance) -> None:
        """Stop using this instance; its closed connection tells the supervisor."""
        with self._changed:
            if self._current is instance:
                self._set(None, "")
        with contextlib.suppress(OSError):
            instance.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _only_for_the_child(launch: wire.Launch) -> Iterator[int]:
    """Yield an open memory file that holds a launch; the fork server passes it on unread.

    Raises OSError.
    """
    with os.fdopen(os.memfd_create("launch"), "w") as stream:
        json.dump(launch.message(), stream)
        stream.seek(0)
        yield stream.fileno()
