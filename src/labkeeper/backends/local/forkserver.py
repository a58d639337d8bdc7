"""Fork server processes: start, adoption, requests and cleanup. `forking` decides which one serves.

Each has a directory, `<runtime_dir>/.forkservers/<key>-<n>/`; the key identifies all that it was
made from. The process itself is `forkserver/main.py`, which also documents the protocol.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

from labkeeper import unix_sockets
from labkeeper.backends.local.cleanup import end_leftovers, end_with_all_below
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.logs import LogFile
from labkeeper.backends.local.processes import (
    Process,
    new_child,
    wait_until_ended,
    wait_until_readable,
)
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import QualifiedName
from labkeeper.files import write_private
from labkeeper.forkserver import wire
from labkeeper.forkserver.marks import MARK
from labkeeper.forkserver.peers import credentials
from labkeeper.forkserver.preload import REHEARSAL
from labkeeper.threads import ThreadGroup

PROGRAM: Final = Path(wire.__file__).parent
"""The program that runs in the servers' own interpreter."""

PLACE: Final = ".forkservers"
"""Directory of all fork servers in a runtime directory; no server can have this name."""
_LOG_NAME: Final = "_forkserver.log"
"""Log file of all fork servers in the log directory; no server can have this name either."""
_LOG_BYTES: Final = 1024 * 1024
_LOAD_LIMIT: Final = 120.0
"""Seconds after which loading is abandoned."""
_ANSWER_WITHIN: Final = 5.0
"""Seconds in which a fork server must answer a request, even on a busy machine."""
_END_WITHIN: Final = 1.0
"""Seconds in which a fork server without servers must end when told to."""
_LONGEST_NAME: Final = 63
"""Maximum length of a server's name (RFC 1123)."""
_REHEARSAL_DIR: Final = "rehearsal"
_SOCKET: Final = "socket"

_log = structlog.get_logger("labkeeper.backends.local.forkserver")


class NoForkServerError(Exception):
    """There is no fork server; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One fork server process."""

    directory: Path
    process: Process
    connection: socket.socket
    """Held for the keeper's lifetime; carries the fork server's unsolicited messages."""
    child: subprocess.Popen[bytes] | None = None
    """Set if it is the keeper's child, which the keeper must reap."""

    @property
    def name(self) -> str:
        """The name by which a later keeper addresses it."""
        return self.directory.name


class ForkServers:
    """The fork servers of one runtime directory. Thread-safe."""

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
        self._threads = threads
        self._python = python
        self._place = runtime_dir / PLACE
        self._log = LogFile(log_dir / _LOG_NAME, max_bytes=_LOG_BYTES)
        self._groups = groups
        self._environment = environment
        self._config = config
        self._kernels_by = kernels_by
        self._preload = list(preload)

    # Start and adoption

    def spawn(self) -> Instance:
        """Start a fork server and wait until it is ready. Raises NoForkServerError."""
        directory = self._place / f"{self._key()}-{secrets.token_hex(4)}"
        try:
            with self._threads.standing_by(f"forkserver-{directory.name}") as given:
                instance = self._execute(directory)
                given(functools.partial(self._until_gone, instance))
        except (OSError, BackendUnavailable) as error:
            _sweep_rehearsal(directory, self._groups)
            _remove(directory)
            raise NoForkServerError(f"cannot start a fork server: {error}") from error
        try:
            answer = self.receive(instance.connection, within=_LOAD_LIMIT)
            if "pid" not in answer:
                raise NoForkServerError(f"{answer.get('failed')} (log: {self._log.path})")
        except NoForkServerError:
            # It has no servers yet, only a rehearsal.
            end_with_all_below(instance.process)
            raise
        finally:
            _sweep_rehearsal(directory, self._groups)
        return instance

    def take_over(self) -> Instance | None:
        """Return an earlier keeper's fork server if it equals a new one; retire or remove others.

        Raises BackendUnavailable if there is no thread to wait for their ends.
        """
        chosen, key = None, self._key()
        for directory in sorted(self._place.glob("*")):
            instance = self._revisit(directory)
            # It may have become ready after the end of the keeper that waited for it.
            _sweep_rehearsal(directory, self._groups)
            if instance is None:
                _remove(directory)
                continue
            self._threads.start(f"forkserver-{instance.name}", self._until_gone, instance)
            if chosen is None and instance.name.startswith(key):
                chosen = instance
            else:
                self._retire(instance)
        return chosen

    def _execute(self, directory: Path) -> Instance:
        """Start the process; it answers on its connection when it has loaded. Raises OSError."""
        server_dir = directory / _REHEARSAL_DIR
        for private in (self._place.parent, self._place, directory, server_dir):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / REHEARSAL, json.dumps(self._rehearsal(server_dir).message()))
        self._log.rotate()
        headline = f"[labkeeper] a fork server loads, {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        with unix_sockets.listen(directory, _SOCKET) as listener, self._log.open(headline) as log:
            child = subprocess.Popen(  # noqa: S603 - the interpreter is a setting; no piece comes from a shell
                [self._python, PROGRAM, "fork", str(listener.fileno())],
                cwd=directory,
                # Only reserves the space of the mark: each child overwrites it with its own.
                env={**self._environment, MARK: " " * self._longest_mark()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
            with new_child(child) as process:
                connection = connect(directory)
                wire.send(connection, {"do": "keep"})
        return Instance(directory, process, connection, child)

    def _revisit(self, directory: Path) -> Instance | None:
        try:
            connection = connect(directory)
        except OSError:
            return None
        pid, *_ = credentials(connection)
        process = Process.find(pid)
        try:
            wire.send(connection, {"do": "keep"})
            if process is None or "pid" not in self.receive(connection, within=_ANSWER_WITHIN):
                raise NoForkServerError("it is none")
        except (OSError, NoForkServerError) as error:
            # It was still loading for a keeper that is dead, or it is stopped, or of another
            # version: its servers live on without it.
            connection.close()
            _log.warning("cannot take over a fork server", name=directory.name, reason=str(error))
            if process is not None and process.pid != os.getpid():
                process.send(signal.SIGKILL)
                # Its rehearsal ends after it.
                wait_until_ended(process, timeout=_END_WITHIN)
            return None
        return Instance(directory, process, connection)

    # Requests

    def ask(
        self, name: str, request: Mapping[str, Any], files: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Send one request and return the answer. Raises OSError, EOFError, WireError."""
        with connect(self._place / name) as connection:
            wire.send(connection, request, files)
            answer, unexpected = wire.receive(connection)
        for file in unexpected:
            os.close(file)
        return answer

    def receive(self, connection: socket.socket, *, within: float | None = None) -> dict[str, Any]:
        """Return the next unsolicited message.

        Raises NoForkServerError if the fork server ends, the time is up, or the keeper closes.
        """
        ready = wait_until_readable([connection.fileno(), self._threads.wake], timeout=within)
        if not ready or self._threads.closed:
            raise NoForkServerError("the fork server takes too long")
        try:
            return wire.receive(connection)[0]
        except wire.WireError as error:
            raise NoForkServerError(f"cannot understand the fork server: {error}") from error
        except (OSError, EOFError) as error:
            raise NoForkServerError("the fork server has died") from error

    # End

    def _until_gone(self, instance: Instance) -> None:
        """Wait for an instance's end and clean up.

        When the keeper closes, an instance without servers ends too.
        """
        ended = wait_until_ended(instance.process, or_readable=[self._threads.wake], timeout=None)
        if not ended:
            self._retire(instance, all_heard=True)
            ended = wait_until_ended(instance.process, timeout=_END_WITHIN)
        instance.connection.close()
        if instance.child is not None:
            # A live one is left to the next keeper, without the warning that its handle would emit.
            instance.child.returncode = instance.child.wait() if ended else 0
        if ended:
            # Whoever waits for it to load does this, too, but may be killed before.
            _sweep_rehearsal(instance.directory, self._groups)
            _remove(instance.directory)

    def _retire(self, instance: Instance, *, all_heard: bool = False) -> None:
        with contextlib.suppress(OSError, EOFError, wire.WireError):
            self.ask(instance.name, {"do": "retire", "all_heard": all_heard})

    # Inputs

    def _key(self) -> str:
        """Return a hash of a fork server's inputs; one with the same key can be adopted."""
        sources = [path.read_bytes() for path in sorted(PROGRAM.glob("*.py"))]
        settings = json.dumps(
            [
                str(self._python),
                self._environment,
                self._config,
                self._kernels_by,
                self._preload,
            ],
            sort_keys=True,
        )
        return hashlib.sha256(b"\0".join([*sources, settings.encode()])).hexdigest()[:12]

    def _longest_mark(self) -> int:
        """Return the bytes of the longest path of a server's directory."""
        return len(os.fsencode(self._place.parent)) + 1 + _LONGEST_NAME

    def _rehearsal(self, server_dir: Path) -> wire.Launch:
        config = {section: dict(values) for section, values in self._config.items()}
        config.setdefault("ServerApp", {}).update(ip="127.0.0.1", port=0, root_dir=str(server_dir))
        return wire.Launch(
            server_dir=str(server_dir),
            title="jupyter-lab (rehearsal)",
            cwd=os.path.realpath(server_dir),
            env={
                **self._environment,
                "JUPYTER_RUNTIME_DIR": str(server_dir),
                MARK: str(server_dir),
            },
            kernel_env={},
            umask=0o077,
            config=config,
            user=None,
            cgroups=self._groups.create(_rehearsal_name(server_dir.parent)),
            rlimits={},
            encrypt_kernels=False,
            zygote_cgroups=[],
            kernels_by=self._kernels_by,
            preload=self._preload,
            identity_key="",
        )


def remove_dead(runtime_dir: Path, groups: ControlGroups) -> None:
    """Clean up after dead fork servers; a live one ends by itself when it has no more servers."""
    for directory in (runtime_dir / PLACE).glob("*"):
        try:
            connect(directory).close()
        except (ConnectionRefusedError, FileNotFoundError):
            _sweep_rehearsal(directory, groups)
            _remove(directory)
        except OSError:
            continue


def _remove(directory: Path) -> None:
    """Remove a dead fork server's directory, and that of all fork servers with the last one."""
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # It holds other fork servers.
        directory.parent.rmdir()


def _rehearsal_name(directory: Path) -> QualifiedName:
    """Return a name for a rehearsal's control group that no server can have."""
    return QualifiedName(f".{directory.name}")


def _sweep_rehearsal(directory: Path, groups: ControlGroups) -> None:
    """End the processes that a rehearsal left, and remove its directory and control group."""
    name = _rehearsal_name(directory)
    with contextlib.suppress(BackendUnavailable, OSError):
        end_leftovers(name, directory / _REHEARSAL_DIR, set(), grace=0.0, groups=groups)
    groups.remove(name)
    shutil.rmtree(directory / _REHEARSAL_DIR, ignore_errors=True)


def connect(directory: Path) -> socket.socket:
    """Connect to a fork server. Raises OSError."""
    return unix_sockets.connect(directory, _SOCKET, timeout=_ANSWER_WITHIN)
