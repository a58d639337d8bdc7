"""Processes of this machine: who is who, who is left, who has ended.

A pid alone names nobody, since the kernel hands it out again. Here a process is its pid and the moment it started, which together
are unique until the machine boots again. What a server started is found by a mark that its environment carries and
all its children inherit, whatever session or parent they have moved to.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from labkeeper import shortage
from labkeeper.forkserver import marks

_LOOK_EVERY: Final = 0.1
"""Seconds between two looks at a process where the system cannot tell us of its end (no pidfd)."""
_EXECUTED_WITHIN: Final = 0.5
"""Seconds in which a program that is executed is taken to get its environment."""
_BETWEEN_READS: Final = 0.001
"""Seconds between two of its reads; what is at the same place in both and empty is no environment."""
_LISTENS: Final = "0A"
"""The state of a TCP socket that listens, as /proc/net/tcp writes it."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process, past or present. `started` is opaque: equal for the same process on the same boot."""

    pid: int
    started: str

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """Identify the live process that has this pid now. Raises OSError where no descriptor is free to look."""
        with shortage.suppress_others(psutil.Error, OSError):
            return cls(pid, _started(pid))
        return None

    def alive(self) -> bool:
        """Whether it still runs. A zombie does not."""
        try:
            return _started(self.pid) == self.started and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            return False
        except (psutil.Error, OSError):
            # It cannot be told (no descriptor is free, say): what is not proven dead is taken for alive.
            return True

    def is_current(self) -> bool:
        """Whether it is the one that has its pid now, be it a zombie; also when that cannot be told."""
        try:
            return _started(self.pid) == self.started
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            return False
        except (psutil.Error, OSError):
            return True

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to it, and to no other that may have its pid by now; return whether it was there."""
        try:
            if sys.platform == "linux":
                handle = os.pidfd_open(self.pid)
                try:
                    # The descriptor holds the pid: what is compared now is what is signalled.
                    if _started(self.pid) != self.started:
                        return False
                    signal.pidfd_send_signal(handle, number)
                finally:
                    os.close(handle)
            elif self.alive():
                os.kill(self.pid, number)
        except (psutil.Error, OSError):
            return False
        return True

    def descendants(self) -> list[Process]:
        """Return its children and theirs, as far as they are still linked to it."""
        if not self.alive():
            return []
        # Those that cannot be looked for now are found by their marks when it has ended.
        with contextlib.suppress(psutil.Error, OSError):
            children = psutil.Process(self.pid).children(recursive=True)
            return [found for child in children if (found := Process.find(child.pid)) is not None]
        return []

    def listens_on(self, port: int) -> bool:
        """Whether it holds a listening socket on this TCP port; where its descriptors are closed to us, whether its user does."""
        if sys.platform == "linux":
            return any(self._holds(socket) for socket in _listening(port))
        try:
            sockets = psutil.Process(self.pid).net_connections(kind="tcp")
        except psutil.Error:
            return False
        return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)

    def _holds(self, socket: _Listening) -> bool:
        try:
            return socket.name in _held(self.pid)
        except PermissionError:
            # As for root without the capability to trace others, in a container.
            return socket.uid == _uid(self.pid)
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class _Listening:
    """A socket that listens."""

    name: str
    """What links to it in /proc say."""
    uid: int


def _listening(port: int) -> Iterator[_Listening]:
    """Find the sockets that listen on a TCP port. Read by the line: Linux names those that listen before all others."""
    where = f":{port:04X}"
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError), table.open(encoding="ascii") as lines:
            for line in lines:
                _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
                if state == _LISTENS and local.endswith(where):
                    yield _Listening(f"socket:[{inode}]", int(uid))


def _held(pid: int) -> Iterator[str]:
    """Name what a process holds open. Raises OSError."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            yield str(descriptor.readlink())


def _uid(pid: int) -> int | None:
    """Return which user a process runs as; None when it is gone."""
    try:
        return psutil.Process(pid).uids().effective
    except psutil.Error:
        return None


def _started(pid: int) -> str:
    """Return the moment a process started, in a form that no change of the clock alters."""
    if sys.platform == "linux":
        # As fork servers tell it of their children.
        return marks.started(pid)
    return repr(psutil.Process(pid).create_time())


def boot_id() -> str:
    """Name the present boot of this machine."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return repr(psutil.boot_time())


def spared() -> set[int]:
    """Return the pids that are never ended as somebody's leftovers: ourselves, and those that started us."""
    return {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def marked(name: str, value: str, *, users: Collection[int] | None = None) -> list[Process]:
    """Find every live process of some users, or of any, whose environment has `name` set to `value`.

    Ourselves and those that started us are not among them.
    """
    ours = spared()
    found = []
    for pid in psutil.pids():
        if pid in ours:
            continue
        with shortage.suppress_others(psutil.Error, OSError):
            if value in _values(pid, name) and is_of(pid, users) and (known := Process.find(pid)) is not None:
                found.append(known)
    return found


def server_dirs_marked(name: str, directory: Path) -> set[Path]:
    """Return the paths in a directory that `name` is set to in the environment of any process of our own user. Raises OSError."""
    found: set[Path] = set()
    for pid in psutil.pids():
        with shortage.suppress_others(psutil.Error, OSError):
            paths = {path for value in _values(pid, name) if (path := Path(value)).parent == directory}
            if paths and is_of(pid, {os.getuid()}) and sees(pid, directory):
                found |= paths
    return found


def is_of(pid: int, users: Collection[int] | None) -> bool:
    """Whether a process runs for one of these users, or any if None: anybody can set any variable. Raises psutil.Error.

    It is the real user that counts. The effective one of a setuid program is root, whoever has started it.
    """
    return users is None or psutil.Process(pid).uids().real in users


def sees(pid: int, directory: Path) -> bool:
    """Whether a directory is the same to a process as to us; another one has that path in a container with a keeper of its own.

    Also where it has none of that path: what a server starts may be shut in somewhere. Where only it has one, that is another.
    """
    try:
        theirs = Path(f"/proc/{pid}/root{directory}").stat()
    except OSError:
        return True
    try:
        return os.path.samestat(theirs, directory.stat())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def carries(pid: int, name: str) -> bytes:
    """Return what a variable is set to in the environment of a process; b"" where it is not, or may not be read.

    Raises OSError where no descriptor is free to read it.
    """
    with shortage.suppress_others(psutil.Error, OSError):
        return next((os.fsencode(value) for value in _values(pid, name)), b"")
    return b""


def _values(pid: int, name: str) -> set[str]:
    """Return what a variable is set to in the environment of a process. Raises OSError, psutil.Error."""
    if sys.platform == "linux":
        # Read as it is: parsing it would take longer than a process may need to start another and end.
        environment = b"\0" + _environment(pid)
        _, *found = environment.split(b"\0" + os.fsencode(name) + b"=")
        return {os.fsdecode(rest.partition(b"\0")[0]) for rest in found}
    return {psutil.Process(pid).environ().get(name, "")}


def _environment(pid: int) -> bytes:
    """Read the environment of a process, once it has one: while a program is executed there is none. Raises OSError.

    That takes Linux a moment, which can be longer than several looks through all processes when the machine is busy.
    """
    until = time.monotonic() + _EXECUTED_WITHIN
    before = None
    while not (environment := Path(f"/proc/{pid}/environ").read_bytes()) and time.monotonic() < until:
        place = _place_of_environment(pid)
        # One that has taken its environment away is not waited for: anybody can do that, in any number of processes.
        if place is None or (place == before and place[1] != "0"):
            break
        before = place
        time.sleep(_BETWEEN_READS)
    return environment


def _place_of_environment(pid: int) -> tuple[str, str] | None:
    """Return where it begins and ends: zeros in a program that is executed; None for a thread of Linux itself."""
    with shortage.suppress_others(OSError):
        Path(f"/proc/{pid}/exe").readlink()
        fields = marks.stat(pid)
        return fields[47], fields[48]
    return None


def wait_until_ended(process: Process, *, or_readable: Sequence[int] = (), timeout: float | None) -> bool:
    """Wait for the end of a process; give up when a descriptor becomes readable, or after `timeout` seconds.

    Says whether the process has ended. Sleeps in the kernel where it can.
    """
    if sys.platform != "linux":
        return _look_until_ended(process, or_readable, timeout)
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    except OSError:
        return _look_until_ended(process, or_readable, timeout)
    try:
        # The descriptor is of whoever has the pid now. It tells of a zombie by itself.
        if not process.is_current():
            return True
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        for descriptor in or_readable:
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(None if timeout is None else max(0.0, timeout) * 1000)
        return any(descriptor == handle for descriptor, _ in ready)
    finally:
        os.close(handle)


def _look_until_ended(process: Process, or_readable: Sequence[int], timeout: float | None) -> bool:
    until = None if timeout is None else time.monotonic() + timeout
    poll = select.poll()
    for descriptor in or_readable:
        poll.register(descriptor, select.POLLIN)
    while process.alive():
        left = _LOOK_EVERY if until is None else min(_LOOK_EVERY, until - time.monotonic())
        if left <= 0 or poll.poll(left * 1000):
            return not process.alive()
    return True


def end_all(processes: Iterable[Process], *, grace: float, within: float) -> list[Process]:
    """End processes: SIGTERM, `grace` seconds, SIGKILL, until `within` seconds have passed; give those that still live.

    A `grace` of 0 sends SIGKILL at once.
    """
    left = [p for p in processes if p.alive()]
    begun = time.monotonic()
    for number, until in ((signal.SIGTERM, begun + grace), (signal.SIGKILL, begun + within)):
        if number is signal.SIGTERM and not grace:
            continue
        for process in left:
            process.send(number)
        pause = 0.002
        while (left := [p for p in left if p.alive()]) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
    return left
