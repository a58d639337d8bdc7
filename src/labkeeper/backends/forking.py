"""The fork server as the keeper sees it: started or taken over, asked for servers, replaced when it has aged or died.

Each has a directory, `<runtime_dir>/.forkservers/<key>-<n>/`; the key stands for all that it was made from. The process itself is
`standalone/forkserver.py`, which also says how the two speak to each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

from labkeeper.backends.crew import Crew
from labkeeper.backends.leftovers import end_leftovers
from labkeeper.backends.logfile import LogFile
from labkeeper.backends.processes import Process, wait_until_ended
from labkeeper.backends.standalone import wire
from labkeeper.backends.standalone.child import MARK
from labkeeper.backends.standalone.forkserver import REHEARSAL
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.model import ServerName
from labkeeper.files import write_private

STANDALONE: Final = Path(wire.__file__).parent
"""What runs in the servers' own interpreter; run as a program."""

_PLACE: Final = ".forkservers"
"""The directory of all fork servers in a runtime directory; no server has such a name."""
_LOG_NAME: Final = "_forkserver.log"
"""The log of all fork servers in the log directory; no server has such a name either."""
_LOG_BYTES: Final = 1024 * 1024
_WARM_UP: Final = 3.0
"""Seconds that a fork server takes to load, as long as none has told."""
_LOAD_LIMIT: Final = 120.0
"""Seconds after which one that still loads is given up."""
_EXEC_SHARE: Final = 0.8
"""What executing a server takes, as a share of loading: it imports the same, but initialises once."""
_ANSWER_WITHIN: Final = 5.0
"""Seconds in which a fork server answers a request, on however busy a machine."""
_PAUSES: Final = (0.2, 600.0)
"""Seconds until the next one is started after one that failed: at first, and at most."""
_DYING: Final = 0.2
"""Seconds in which one that was killed is gone."""
_END_WITHIN: Final = 1.0
"""Seconds in which a fork server without servers ends when it is told to."""
_LONGEST_NAME: Final = 63
"""Characters of a server's name (RFC 1123)."""
_REHEARSAL_ROOM: Final = "rehearsal"
_CREDENTIALS: Final = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""
_AT_START: Final = re.compile(r"^(PYTHON|JUPYTER(?!_(RUNTIME|CONFIG|DATA)_DIR$)|LD_|LC_|LANG|MALLOC_|GLIBC_)")
"""Environment variables that are read when a program starts or a module is imported: too late for a forked server."""
_ONE_THREAD: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Libraries that would start threads when they are imported are told not to; in the fork server only."""

_log = structlog.get_logger("labkeeper.backends.forking")


class CannotFork(Exception):  # noqa: N818 - no error: the server is executed instead
    """A server has to be executed; its text says why."""


@dataclass(frozen=True, slots=True)
class _Instance:
    """One fork server process."""

    directory: Path
    process: Process
    connection: socket.socket
    """Held as long as we live. What the fork server has to say unasked comes by it."""
    child: subprocess.Popen[bytes] | None = None
    """Set when it is a child of ours, which we have to reap."""


class _NoForkServerError(Exception):
    """There is no fork server; its text says why."""


class ForkServer:
    """Keeps one fork server ready. Thread-safe."""

    def __init__(
        self,
        crew: Crew,
        *,
        python: Path,
        runtime_dir: Path,
        log_dir: Path,
        environment: Mapping[str, str],
        config: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """`environment` and `config` (Jupyter's) are those of a server that asks for nothing in particular."""
        self._crew = crew
        self._python = python
        self._place = runtime_dir / _PLACE
        self._log = LogFile(log_dir / _LOG_NAME, max_bytes=_LOG_BYTES)
        self._environment = dict(environment)
        self._config = config
        self._changed = threading.Condition()
        self._current: _Instance | None = None
        self._why_not = ""
        """Why there is none, and none is loading."""
        self._begun = time.monotonic()
        self._warm_up = _WARM_UP

    def start(self) -> None:
        """Take over what an earlier keeper left, or begin to load."""
        self._crew.start("forkserver", self._supervise)

    # What servers need of it

    def launch(self, launch: wire.Launch, log: int, report: int) -> tuple[Process, str]:
        """Fork a server; give its process and the name of its parent. Waits for one that loads where that is sooner than exec.

        Raises CannotFork.
        """
        self._check(launch.env)
        while True:
            instance = self._await_ready()
            try:
                with _only_for_the_child(launch) as file:
                    answer = self._ask(instance.directory, {"do": "launch"}, [file, log, report])
            except (OSError, EOFError, wire.WireError) as error:
                # Killed, since it may be stopped rather than gone; its servers live on without it.
                instance.process.send(signal.SIGKILL)
                self._give_up(instance)
                # It may have forked all the same.
                with contextlib.suppress(BackendUnavailable):
                    end_leftovers(ServerName(Path(launch.room).name), Path(launch.room), set(), grace=0.0)
                raise CannotFork(f"the fork server did not answer ({type(error).__name__})") from error
            if "pid" in answer:
                return Process(answer["pid"], answer["started"]), instance.directory.name
            if "retired" not in answer:
                raise CannotFork(f"the fork server could not: {answer.get('error')}")
            self._give_up(instance)

    def attach(self, name: str, pid: int, report: int) -> bool:
        """Let the end of a server be reported to us by the fork server of this name; say whether that is its parent."""
        with contextlib.suppress(OSError, EOFError, wire.WireError):
            return self._ask(self._place / name, {"do": "attach", "pid": pid}, [report]).get("known") is True
        return False

    def close(self) -> None:
        """Let it end as soon as it has no servers; if it has none now, it is gone when this returns. The crew ends first."""
        instance = self._current
        if instance is not None:
            with contextlib.suppress(OSError, EOFError, wire.WireError):
                self._ask(instance.directory, {"do": "retire"})
            self._part_with(instance, ended=wait_until_ended(instance.process, timeout=_END_WITHIN))

    def _check(self, environment: Mapping[str, str]) -> None:
        for name in sorted(environment.keys() | self._environment.keys()):
            differs = environment.get(name) != self._environment.get(name)
            if differs and _AT_START.match(name):
                raise CannotFork(f"the environment variable {name} takes effect only when a program starts")

    def _await_ready(self) -> _Instance:
        """Give the one that serves; wait for one that loads, unless executing a server is sooner. Raises CannotFork."""
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

    # Which one serves

    def _supervise(self) -> None:
        pause, longest = _PAUSES
        instance = self._take_over()
        while not self._crew.closed:
            try:
                instance = instance or self._spawn()
                self._serve_by(instance)
                # It was replaced in good order, and the next one is wanted at once.
                pause = _PAUSES[0]
            except _NoForkServerError as error:
                if self._crew.closed:
                    return
                _log.warning("there is no fork server; servers are executed", reason=str(error), next_in=pause)
                self._set(None, str(error))
                if self._crew.sleep(pause):
                    return
                pause = min(pause * 4, longest)
                self._set(None, "")
            instance = None

    def _serve_by(self, instance: _Instance) -> None:
        """Let one serve until it retires, or we end. Raises _NoForkServerError when it dies."""
        self._set(instance, "")
        begun = time.monotonic()
        try:
            message = self._hear(instance.connection, within=None)
            _log.info("the fork server is replaced", reason=message.get("retired"))
        except _NoForkServerError:
            if self._crew.closed:
                return
            # One that has served for long died of something new.
            if time.monotonic() - begun < _PAUSES[1]:
                raise
        finally:
            if not self._crew.closed:
                self._give_up(instance)
                self._crew.start(f"forkserver-{instance.process.pid}", self._bury, instance)

    def _set(self, instance: _Instance | None, why_not: str) -> None:
        with self._changed:
            if instance is None:
                self._begun = time.monotonic()
            self._current, self._why_not = instance, why_not
            self._changed.notify_all()

    def _give_up(self, instance: _Instance) -> None:
        """Ask this one for nothing more; the supervisor sees that by its connection."""
        with self._changed:
            if self._current is instance:
                self._set(None, "")
        with contextlib.suppress(OSError):
            instance.connection.shutdown(socket.SHUT_RDWR)

    # One process

    def _spawn(self) -> _Instance:
        """Start one, and wait until it is ready. Raises _NoForkServerError."""
        directory = self._place / f"{self._key()}-{secrets.token_hex(4)}"
        try:
            instance = self._execute(directory)
        except OSError as error:
            self._remove(directory)
            raise _NoForkServerError(f"cannot start a fork server: {error}") from error
        try:
            answer = self._hear(instance.connection, within=_LOAD_LIMIT)
            if "pid" not in answer:
                raise _NoForkServerError(f"{answer.get('failed')} (log: {self._log.path})")
        except _NoForkServerError:
            instance.process.send(signal.SIGKILL)
            self._part_with(instance, ended=wait_until_ended(instance.process, timeout=_END_WITHIN))
            raise
        finally:
            _sweep_rehearsal(directory)
        with self._changed:
            self._warm_up = time.monotonic() - self._begun
        _log.info("the fork server is ready", pid=instance.process.pid, seconds=round(self._warm_up, 2))
        return instance

    def _execute(self, directory: Path) -> _Instance:
        """Start its process; it answers on its connection when it has loaded. Raises OSError."""
        room = directory / _REHEARSAL_ROOM
        for private in (self._place.parent, self._place, directory, room):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / REHEARSAL, json.dumps(self._rehearsal(room).message()))
        self._log.rotate()
        headline = f"[labkeeper] a fork server loads, {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        with _listener(directory) as listener, self._log.open(headline) as log:
            child = subprocess.Popen(  # noqa: S603 - the interpreter is a setting; no piece comes from a shell
                [self._python, STANDALONE, "forkserver", str(listener.fileno())],
                cwd=directory,
                # Of the mark only the place is made here: each child writes its own there.
                env={**_ONE_THREAD, **self._environment, MARK: " " * self._longest_room()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
            process = Process.find(child.pid)
            if process is None:  # Only when it was reaped, and nobody but us does that.
                raise OSError("its process vanished")
            try:
                connection = _connect(directory)
                wire.send(connection, {"do": "keep"})
            except OSError:
                child.kill()
                child.wait()
                raise
        return _Instance(directory, process, connection, child)

    def _take_over(self) -> _Instance | None:
        """Find what an earlier keeper left: give one that is as we would start it, retire all others, remove what is dead."""
        chosen = None
        for directory in sorted(self._place.glob("*")) if self._place.is_dir() else ():
            instance = self._revisit(directory)
            if instance is None:
                self._remove(directory)
            elif chosen is None and directory.name.startswith(self._key()):
                chosen = instance
            else:
                with contextlib.suppress(OSError, EOFError, wire.WireError):
                    self._ask(directory, {"do": "retire"})
                self._crew.start(f"forkserver-{instance.process.pid}", self._bury, instance)
        return chosen

    def _revisit(self, directory: Path) -> _Instance | None:
        try:
            connection = _connect(directory)
        except OSError:
            return None
        pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        process = Process.find(pid)
        try:
            wire.send(connection, {"do": "keep"})
            if process is None or "pid" not in self._hear(connection, within=_ANSWER_WITHIN):
                raise _NoForkServerError("it is none")
        except (OSError, _NoForkServerError):
            # It was still loading for a keeper that is dead, or is stopped: its servers live on without it.
            connection.close()
            if process is not None and process.pid != os.getpid():
                process.send(signal.SIGKILL)
            return None
        return _Instance(directory, process, connection)

    def _bury(self, instance: _Instance) -> None:
        """Wait for the end of one that serves no more, and remove what is left of it; not longer than we live."""
        ended = wait_until_ended(instance.process, or_readable=[self._crew.wake], timeout=None)
        # When we end too, one that was killed just now is still waited for; one with servers lives on.
        self._part_with(instance, ended=ended or wait_until_ended(instance.process, timeout=_DYING))

    def _part_with(self, instance: _Instance, *, ended: bool) -> None:
        instance.connection.close()
        if instance.child is not None:
            # A living one is left to the next keeper, without the warning that its handle would give.
            instance.child.returncode = instance.child.wait() if ended else 0
        if ended:
            self._remove(instance.directory)

    def _remove(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # Others are in there.
            self._place.rmdir()

    # What is said

    def _ask(self, directory: Path, request: Mapping[str, Any], files: list[int] | None = None) -> dict[str, Any]:
        """Send one request, and give the answer. Raises OSError, EOFError, WireError."""
        with _connect(directory) as connection:
            wire.send(connection, request, files or [])
            answer, unexpected = wire.receive(connection)
        for file in unexpected:
            os.close(file)
        return answer

    def _hear(self, connection: socket.socket, *, within: float | None) -> dict[str, Any]:
        """Wait for what a fork server says unasked. Raises _NoForkServerError when it ends, is silent, or we end."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._crew.wake, select.POLLIN)
        ready = poll.poll(None if within is None else within * 1000)
        if not ready or self._crew.closed:
            raise _NoForkServerError("the fork server takes too long")
        try:
            return wire.receive(connection)[0]
        except (OSError, EOFError, wire.WireError) as error:
            raise _NoForkServerError("the fork server has died") from error

    # What it is made from

    def _key(self) -> str:
        """Name all that a fork server is made from: one of the same name can be taken over."""
        sources = [path.read_bytes() for path in sorted(STANDALONE.glob("*.py"))]
        settings = json.dumps([str(self._python), self._environment, self._config], sort_keys=True)
        return hashlib.sha256(b"\0".join([*sources, settings.encode()])).hexdigest()[:12]

    def _longest_room(self) -> int:
        return len(os.fsencode(self._place.parent)) + 1 + _LONGEST_NAME

    def _rehearsal(self, room: Path) -> wire.Launch:
        config = {section: dict(values) for section, values in self._config.items()}
        config.setdefault("ServerApp", {}).update(ip="127.0.0.1", port=0, root_dir=str(room))
        return wire.Launch(
            room=str(room),
            title="",
            cwd=str(room),
            env={**self._environment, "JUPYTER_RUNTIME_DIR": str(room), MARK: str(room)},
            umask=0o077,
            config=config,
            user=None,
            cgroups=[],
            rlimits={},
        )


def _sweep_rehearsal(directory: Path) -> None:
    """End what a rehearsal may have left running, and remove its room."""
    with contextlib.suppress(BackendUnavailable):
        end_leftovers(ServerName("rehearsal"), directory / _REHEARSAL_ROOM, set(), grace=0.0)
    shutil.rmtree(directory / _REHEARSAL_ROOM, ignore_errors=True)


@contextlib.contextmanager
def _only_for_the_child(launch: wire.Launch) -> Iterator[int]:
    """Give an open file in memory that holds a launch; the fork server passes it on without reading it. Raises OSError."""
    file = os.memfd_create("launch")
    try:
        with os.fdopen(os.dup(file), "w") as stream:
            json.dump(launch.message(), stream)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def _socket_path(directory: Path) -> Iterator[str]:
    """Give a path to the socket that is short enough: addresses of Unix sockets have at most 107 bytes."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/socket"
    finally:
        os.close(descriptor)


def _listener(directory: Path) -> socket.socket:
    """Make the socket of a fork server, for its user only. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _socket_path(directory) as path:
            listener.bind(path)
            Path(path).chmod(0o600)
        # The fork server does so again. Until then its keeper can connect already, and waits for an answer.
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _connect(directory: Path) -> socket.socket:
    """Connect to a fork server. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_WITHIN)
        with _socket_path(directory) as path:
            connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection
