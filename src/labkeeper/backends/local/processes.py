"""Processes of this machine: their identity, descendants and ends.

A pid alone identifies no process, since the kernel reuses it. Together with its start time it is
unique until the machine reboots. What a server started is found by a mark in its environment, which
all its children inherit, even in another session or with another parent.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from labkeeper import shortage
from labkeeper.core.errors import BackendUnavailable
from labkeeper.forkserver import marks

_LOOK_EVERY: Final = 0.1
"""Polling interval in seconds where the system cannot report a process's end (no pidfd)."""
_EXECUTED_WITHIN: Final = 0.5
"""Seconds in which a program being executed is expected to have its environment."""
_BETWEEN_READS: Final = 0.001
"""Seconds between two reads of it; if it stays empty at the same address, there is none."""
_LISTENS: Final = "0A"
"""The state of a listening TCP socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process, past or present; `started` is opaque, and constant for a process and boot."""

    pid: int
    started: str

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """Return the live process that has this pid now, or None.

        Raises OSError if no file descriptor is free.
        """
        with shortage.suppress_others(psutil.Error, OSError):
            return cls(pid, _started(pid))
        return None

    def alive(self) -> bool:
        """Whether it still runs. A zombie does not."""
        try:
            return (
                _started(self.pid) == self.started
                and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            return False
        except (psutil.Error, OSError):
            # Unknown (no file descriptor is free, for example): not proven dead counts as alive.
            return True

    def is_current(self) -> bool:
        """Whether it still holds its pid, even as a zombie; also True if that is unknown."""
        try:
            return _started(self.pid) == self.started
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            return False
        except (psutil.Error, OSError):
            return True

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal, never to another process that reuses its pid.

        Return whether the signal was sent.
        """
        try:
            if sys.platform == "linux":
                handle = os.pidfd_open(self.pid)
                try:
                    # The descriptor pins the pid: the process compared here is the one signalled.
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
        # Those that cannot be listed now are found by their marks when it has ended.
        with contextlib.suppress(psutil.Error, OSError):
            children = psutil.Process(self.pid).children(recursive=True)
            return [found for child in children if (found := Process.find(child.pid)) is not None]
        return []

    def listens_on(self, port: int) -> bool:
        """Whether it holds a listening socket on this TCP port.

        If its descriptors cannot be read, whether its user holds one.
        """
        if sys.platform == "linux":
            return self._holds_any(_listening(port))
        try:
            sockets = psutil.Process(self.pid).net_connections(kind="tcp")
        except psutil.Error:
            return False
        return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)

    def _holds_any(self, listening: Iterable[tuple[str, int]]) -> bool:
        try:
            held = set(_held(self.pid))
        except PermissionError:
            # For example root in a container without the capability to trace other processes.
            user = _uid(self.pid)
            return any(owner == user for _, owner in listening)
        except OSError:
            return False
        return any(name in held for name, _ in listening)


def _listening(port: int) -> Iterator[tuple[str, int]]:
    """Yield the sockets that listen on a TCP port: the target of their links in /proc, and user.

    Read line by line, because Linux lists listening sockets first.
    """
    where = f":{port:04X}"
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError), table.open(encoding="ascii") as lines:
            for line in lines:
                _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
                if state == _LISTENS and local.endswith(where):
                    yield f"socket:[{inode}]", int(uid)


def _held(pid: int) -> Iterator[str]:
    """Yield the link targets of a process's open descriptors. Raises OSError."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            yield str(descriptor.readlink())


def _uid(pid: int) -> int | None:
    """Return a process's effective user, or None if it has ended."""
    try:
        return psutil.Process(pid).uids().effective
    except psutil.Error:
        return None


def _started(pid: int) -> str:
    """Return a process's start time in a form that clock changes do not alter."""
    if sys.platform == "linux":
        # The form in which fork servers report their children.
        return marks.started(pid)
    return repr(psutil.Process(pid).create_time())


@contextlib.contextmanager
def new_child(child: subprocess.Popen[bytes]) -> Iterator[Process]:
    """Yield the process of a child of the keeper; if the block raises, end the child."""
    try:
        process = Process.find(child.pid)
        if process is None:  # Possible only if it was reaped, which only the keeper does.
            raise BackendUnavailable(f"cannot find the new process {child.pid}")
        yield process
    except BaseException:
        child.kill()
        child.wait()
        raise


def boot_id() -> str:
    """Return the identifier of the current boot."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return repr(psutil.boot_time())


def spared() -> set[int]:
    """Return the pids that are never killed as leftovers: the keeper's and its ancestors'."""
    return {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def marked(name: str, value: str, *, users: Collection[int] | None = None) -> list[Process]:
    """Return every live process of some users, or of any, whose environment sets `name` to `value`.

    The keeper and its ancestors are left out.
    """
    ours = spared()
    found = []
    for pid in psutil.pids():
        if pid in ours:
            continue
        with shortage.suppress_others(psutil.Error, OSError):
            if (
                value in _values(pid, name)
                and is_of(pid, users)
                and (known := Process.find(pid)) is not None
            ):
                found.append(known)
    return found


def server_dirs_marked(name: str, directory: Path) -> set[Path]:
    """Return the paths in a directory that processes of the keeper's user have as value of `name`.

    Raises OSError.
    """
    found: set[Path] = set()
    for pid in psutil.pids():
        with shortage.suppress_others(psutil.Error, OSError):
            paths = {
                path for value in _values(pid, name) if (path := Path(value)).parent == directory
            }
            if paths and is_of(pid, {os.getuid()}) and sees(pid, directory):
                found |= paths
    return found


def is_of(pid: int, users: Collection[int] | None) -> bool:
    """Whether a process runs for one of these users; True for None. Raises psutil.Error.

    Any user can set any variable. The real user counts: the effective user of a setuid program is
    root, whoever started it.
    """
    return users is None or psutil.Process(pid).uids().real in users


def sees(pid: int, directory: Path) -> bool:
    """Whether a process and the keeper see the same directory at a path.

    In a container with a keeper of its own, the path is another directory. Also True if the process
    has no such path, since a server may confine what it starts; False if only the process has one.
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
    """Return a variable's value in a process's environment, or b"" if it is unset or unreadable.

    Raises OSError if no file descriptor is free.
    """
    with shortage.suppress_others(psutil.Error, OSError):
        return next((os.fsencode(value) for value in _values(pid, name)), b"")
    return b""


def _values(pid: int, name: str) -> set[str]:
    """Return a variable's values in a process's environment. Raises OSError, psutil.Error."""
    if sys.platform == "linux":
        # Not parsed: that could take longer than a process needs to start another and end.
        environment = b"\0" + _environment(pid)
        _, *found = environment.split(b"\0" + os.fsencode(name) + b"=")
        return {os.fsdecode(rest.partition(b"\0")[0]) for rest in found}
    return {psutil.Process(pid).environ().get(name, "")}


def _environment(pid: int) -> bytes:
    """Return a process's environment, waiting while a program is being executed. Raises OSError.

    Until then it is empty; on a busy machine that can outlast several scans of all processes.
    """
    until = time.monotonic() + _EXECUTED_WITHIN
    before = None
    while (
        not (environment := Path(f"/proc/{pid}/environ").read_bytes()) and time.monotonic() < until
    ):
        place = _place_of_environment(pid)
        # Do not wait for a process that cleared its environment: users could start any number of
        # these.
        if place is None or (place == before and place[1] != 0):
            break
        before = place
        time.sleep(_BETWEEN_READS)
    return environment


def _place_of_environment(pid: int) -> tuple[int, int] | None:
    """Return the addresses of its start and end: zeros while a program is being executed.

    None for a kernel thread.
    """
    with shortage.suppress_others(OSError):
        Path(f"/proc/{pid}/exe").readlink()
        return marks.stat(pid).environment
    return None


def wait_until_ended(
    process: Process, *, or_readable: Sequence[int] = (), timeout: float | None
) -> bool:
    """Wait until a process ends, a descriptor becomes readable, or `timeout` seconds have passed.

    Return whether the process has ended. Blocks in the kernel where possible.
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
        # The descriptor refers to the pid's present holder. It becomes readable for a zombie.
        if not process.is_current():
            return True
        return handle in wait_until_readable([handle, *or_readable], timeout=timeout)
    finally:
        os.close(handle)


def _look_until_ended(process: Process, or_readable: Sequence[int], timeout: float | None) -> bool:
    until = None if timeout is None else time.monotonic() + timeout
    while process.alive():
        left = _LOOK_EVERY if until is None else min(_LOOK_EVERY, until - time.monotonic())
        if left <= 0 or wait_until_readable(or_readable, timeout=left):
            return not process.alive()
    return True


def wait_until_readable(descriptors: Iterable[int], *, timeout: float | None) -> list[int]:
    """Wait until descriptors are readable; return these, or none after `timeout` seconds."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    ready = poll.poll(None if timeout is None else max(0.0, timeout) * 1000)
    return [descriptor for descriptor, _ in ready]


def end_all(processes: Iterable[Process], *, grace: float, within: float) -> list[Process]:
    """End processes and return those that still live.

    Sends SIGTERM, then SIGKILL after `grace` seconds, and waits until `within` seconds have passed.
    A `grace` of 0 sends SIGKILL at once.
    """
    left = [p for p in processes if p.alive()]
    begun = time.monotonic()
    for number, until in ((signal.SIGTERM, begun + grace), (signal.SIGKILL, begun + within)):
        if number is signal.SIGTERM and not grace:
            continue
        for process in left:
            process.send(number)
        left = [
            process
            for process in left
            if not wait_until_ended(process, timeout=until - time.monotonic())
        ]
    return left
