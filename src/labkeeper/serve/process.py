"""The keeper as a process: signals that end it, directories that it holds alone, what it may open, who started it."""

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

_DESCRIPTORS: Final = 16384
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ended:
    """Whether a signal asked us to end.

    It is waited for on a socket that the interpreter itself writes to when a signal comes: a lock would sleep through one that
    another thread took just before the main thread slept.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self) -> None:
        """Return when a signal has come; it may have come before."""
        self._reader.recv(1, socket.MSG_PEEK)

    def is_set(self) -> bool:
        """Whether one has come."""
        return bool(select.select([self._reader], [], [], 0)[0])

    def close(self) -> None:
        """Put the signals back as they were."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def make_private(directory: Path) -> None:
    """Make the state directory; one that was there and is not empty keeps its mode: every secret in it is private by itself."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(directory.iterdir()):
            directory.chmod(0o700)
    except OSError as error:
        raise SettingsError(f"cannot use the state directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise SettingsError(f"cannot use the state directory {directory}: it is not writable")


def is_usable(directory: Path) -> bool:
    """Make a directory if need be, and say whether it can be used."""
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.access(directory, os.W_OK | os.X_OK)


@contextmanager
def only_keeper(directory: Path, what: str, variable: str) -> Iterator[None]:
    """Hold the lock of a directory. Raises SettingsError."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(directory))
        except BlockingIOError as held:
            raise SettingsError(
                f"another keeper (pid {held.strerror}) runs on the {what} {directory}; stop it, or choose another {variable}"
            ) from None
        except OSError as error:
            raise SettingsError(f"cannot use the {what} {directory}: {error.strerror}") from error
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. The kernel drops it with the process, so none is ever stale.

    Raises OSError: a BlockingIOError with the pid of the keeper that holds it where another one does.
    """
    descriptor = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode("ascii", errors="replace") or "unknown"
            raise BlockingIOError(error.errno, holder) from None
        with contextlib.suppress(OSError):  # On a full disk the lock holds all the same; it only does not say whose it is.
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def earlier_dirs(known: Iterable[Path], own: Path, stack: ExitStack) -> list[Path]:
    """Return the directories among the known ones that earlier keepers used, not we, and hold the lock of each that has one.

    One that another keeper holds is left to it: it ends what it does not know.
    """
    found = []
    for directory in known:
        if directory == own:
            continue
        try:
            # By another path it may be our own, whose lock we hold.
            if not directory.samefile(own):
                stack.enter_context(_locked(directory))
        except BlockingIOError:
            continue
        except OSError:
            pass  # It is gone, or on a disk that takes no lock; what runs from there is found all the same.
        found.append(directory)
    return found


def allow_descriptors() -> None:
    """Take as many descriptors as we may: each connection, each log and each server needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tell_systemd(state: str) -> None:
    """Tell the service manager, if one listens, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address)
