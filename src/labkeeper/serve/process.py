"""The keeper's process: termination signals, directory locks, descriptor limit, service manager."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from labkeeper.core.errors import SettingsError

LOCK: Final = "keeper.lock"
"""File in a keeper's directories that it has locked as long as it runs."""
DESCRIPTORS: Final = 16384
"""The descriptors that a keeper wants."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ended:
    """Whether a termination signal was received.

    The interpreter itself writes to the socket on which `wait` blocks: a lock would miss a signal
    that another thread received just before the main thread blocked.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self) -> None:
        """Wait for a signal; returns at once if one was received before."""
        self._reader.recv(1, socket.MSG_PEEK)

    def is_set(self) -> bool:
        """Whether a signal was received."""
        return bool(select.select([self._reader], [], [], 0)[0])

    def close(self) -> None:
        """Restore the earlier signal handlers."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def _make_private(directory: Path) -> None:
    """Create the state directory; a non-empty one keeps its mode: its secrets are private files."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(directory.iterdir()):
            directory.chmod(0o700)
    except OSError as error:
        raise SettingsError(
            f"cannot use the state directory {directory}: {error.strerror}"
        ) from error
    if not is_usable(directory):
        raise SettingsError(f"cannot use the state directory {directory}: it is not writable")


def is_usable(directory: Path) -> bool:
    """Whether a keeper can use a directory that exists."""
    return os.access(directory, os.W_OK | os.X_OK)


def own_directories(state_dir: Path, runtime_dir: Path, stack: ExitStack) -> None:
    """Lock the keeper's directories, created if missing. Raises SettingsError."""
    _make_private(state_dir)
    stack.enter_context(only_keeper(state_dir, "state directory", "LABKEEPER_STATE_DIR"))
    with contextlib.suppress(OSError):
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_usable(runtime_dir):
        # Also the default one: another keeper that uses it would end these servers, unknown to its
        # store.
        stack.enter_context(only_keeper(runtime_dir, "runtime directory", "LABKEEPER_RUNTIME_DIR"))


@contextmanager
def only_keeper(directory: Path, what: str, variable: str) -> Iterator[None]:
    """Hold the lock of a directory. Raises SettingsError."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(directory))
        except BlockingIOError as held:
            raise SettingsError(
                f"another keeper (pid {held.strerror}) runs on the {what} {directory}; "
                f"stop it, or choose another {variable}"
            ) from None
        except OSError as error:
            raise SettingsError(f"cannot use the {what} {directory}: {error.strerror}") from error
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; the kernel releases it with the process, so none is stale.

    Raises OSError; if another keeper holds it, BlockingIOError with that keeper's pid.
    """
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, _pid_in(descriptor)) from None
        with contextlib.suppress(OSError):  # On a full disk, only the pid is missing.
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def holder(directory: Path) -> str | None:
    """Return the pid, as text, of the keeper that has locked a directory; None if there is none.

    Raises OSError.
    """
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(descriptor)
    finally:
        os.close(descriptor)
    return None


def _pid_in(descriptor: int) -> str:
    """Return the pid in a lock file as text."""
    return os.read(descriptor, 20).decode("ascii", errors="replace") or "unknown"


def earlier_dirs(known: Iterable[Path], own: Path, stack: ExitStack) -> list[Path]:
    """Return the directories that earlier keepers used, without `own`, locking each that exists.

    Directories that another keeper holds are left out, since it ends servers that it does not know.
    """
    found = []
    for directory in known:
        if directory == own:
            continue
        try:
            # By another path it may be this keeper's own, which is locked already.
            if not directory.samefile(own):
                stack.enter_context(_locked(directory))
        except BlockingIOError:
            continue
        except OSError:
            pass  # It is gone, or its disk has no locks; its processes are found anyway.
        found.append(directory)
    return found


def allow_descriptors() -> None:
    """Raise the descriptor limit: each connection, log and server needs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tell_systemd(state: str) -> None:
    """Notify the service manager, if there is one, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    if address:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        ):
            notify.sendto(state.encode(), address)
