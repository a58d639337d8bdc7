"""Edges as processes: start, find again, clean up.

Each has a directory, `<state_dir>/edge/<n>/`, with its control socket. The process itself is
`labkeeper.edge`.

On a full disk an edge can be started in the place of another one: it gets the directory of one that
has ended, in which the new socket replaces the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Final

import psutil
import structlog

from labkeeper import shortage, unix_sockets
from labkeeper.backends.local.logs import LogFile
from labkeeper.backends.local.processes import wait_until_ended
from labkeeper.edge import wire
from labkeeper.edge.main import Start
from labkeeper.files import write_private
from labkeeper.forkserver import identity, marks, peers, privileges
from labkeeper.serve.edge.link import CONTROL, Link
from labkeeper.serve.process import LOCK

UPSTREAM: Final = "upstream.sock"
"""The keeper's socket for requests that come through the edge."""
_LOG_NAME: Final = "_edge.log"
"""Log file of all edges in the log directory; no server can have this name."""
_ACCESS_LOG: Final = "_access.log"
_LOG_BYTES: Final = 1024 * 1024
_START_WITHIN: Final = 30.0
"""Seconds in which a new edge must answer, even on a busy machine."""
_ANSWER_WITHIN: Final = 5.0
"""Seconds in which a running edge must answer."""
_END_WITHIN: Final = 2.0
"""Seconds in which an edge must end when told to."""
_INHERITED: Final = re.compile(r"PATH|LANG|LC_\w+|TZ|PYTHON\w+")
"""Variables that an edge gets of the keeper's: whoever gains control of it must find no secrets."""
_ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 1024 * 1024),
}
"""Has glibc return pieces of memory over 1 MiB at once: after compressing, it would keep 15 MiB.
With the first one alone it would return those of each read as well, and get them anew."""
_MODULE: Final = "labkeeper.edge"
_USER: Final = "labkeeper-edge"
"""The user that a root keeper's edge becomes, if it exists; otherwise `nobody`."""

_log = structlog.get_logger("labkeeper.serve.edge")


class EdgeError(Exception):
    """An edge cannot be started; the message is the reason."""


class Instances:
    """The edges of one state directory. Not thread-safe."""

    def __init__(
        self,
        state_dir: Path,
        server_dirs: Path,
        address: tuple[str, int],
        *,
        secure: bool = False,
        log_max_bytes: int = 10 * 1024 * 1024,
    ) -> None:
        """`address` is the public one; `secure` says whether to speak TLS there.

        `log_max_bytes` is the size at which the access log is rotated.

        `server_dirs` holds the directories of servers, whose processes cannot command the edge.
        """
        self.address = address
        self.secure = secure
        self.user = _edge_user()
        self.build = _build()
        self._place = state_dir / "edge"
        self._lock_file = state_dir / LOCK
        self._key_file = state_dir / "edge.key"
        self._log = LogFile(state_dir / "logs" / _LOG_NAME, max_bytes=_LOG_BYTES)
        self.access_log = LogFile(state_dir / "logs" / _ACCESS_LOG, max_bytes=log_max_bytes)
        self._server_dirs = server_dirs
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        """Those that this keeper has started, by pid."""
        self._unused: list[Path] = []
        """Directories of edges that have ended: without space, no other could be created."""

    @contextlib.contextmanager
    def upstream(self) -> Iterator[socket.socket]:
        """Yield the keeper's listening socket for requests that come through the edge.

        Raises OSError.
        """
        listener = unix_sockets.listen(self._place, UPSTREAM, user=self.user)
        # The file stays: the next keeper's replaces it, even without space for another one.
        with listener:
            yield listener

    def find(self) -> list[Link]:
        """Return the edges that earlier keepers left, without those that fail. Raises OSError."""
        self._place.mkdir(mode=0o700, exist_ok=True)
        if self.user is not None:
            # That user only passes through it, to the keeper's socket.
            os.chown(self._place, -1, self.user[1])
        self._place.chmod(0o700 if self.user is None else 0o710)
        found = []
        for directory in sorted(path for path in self._place.iterdir() if path.is_dir()):
            try:
                found.append(Link.open(directory, self.key(), within=_ANSWER_WITHIN))
            except (ConnectionRefusedError, FileNotFoundError):
                self._unused.append(directory)
            except (OSError, EOFError, wire.WireError) as error:
                _log.warning("ended an edge that does not answer", reason=str(error))
                _kill(directory)
                self._unused.append(directory)
        return found

    def start(self, public: socket.socket) -> Link:
        """Start an edge that serves on a listening socket, and wait until it answers.

        Raises EdgeError.
        """
        child = None
        try:
            directory = self._directory()
            child = self._execute(directory, public)
            link = Link.open(directory, self.key(), within=_START_WITHIN)
        except (OSError, EOFError, wire.WireError) as error:
            if child is not None:
                child.kill()
                child.wait()
            why = shortage.reason_of(error)
            raise EdgeError(f"cannot start an edge: {why} (log: {self._log.path})") from error
        self._unused.remove(directory)
        self._children[child.pid] = child
        return link

    def _directory(self) -> Path:
        """Return an unused directory, created if there is none. Raises OSError."""
        self._unused = [directory for directory in self._unused if directory.is_dir()]
        if not self._unused:
            directory = self._place / secrets.token_hex(4)
            directory.mkdir(mode=0o700)
            self._unused.append(directory)
        return self._unused[0]

    def tidy(self) -> None:
        """Remove the directories that are not used."""
        for directory in self._unused:
            shutil.rmtree(directory, ignore_errors=True)
        self._unused = []

    def _execute(self, directory: Path, public: socket.socket) -> subprocess.Popen[bytes]:
        self._log.rotate()
        headline = f"[labkeeper] an edge starts, {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        with (
            unix_sockets.listen(directory, CONTROL) as control,
            _opened(self._place) as place,
            _opened_log(self._log, headline) as log,
            _opened_log(self.access_log) as access_log,
        ):
            files = (public.fileno(), control.fileno(), place, access_log.fileno())
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", _MODULE],
                cwd=directory,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                umask=0o077,
                start_new_session=True,
                pass_fds=files,
            )
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(self._start_message(*files).encode())
        return child

    def _start_message(self, public: int, control: int, place: int, access_log: int) -> Start:
        return Start(
            public=public,
            control=control,
            directory=place,
            keeper=UPSTREAM,
            address=self.address,
            secure=self.secure,
            build=self.build,
            key=self.key(),
            server_dirs=os.path.realpath(self._server_dirs),
            lock=self._lock_file.stat().st_ino,
            access_log=access_log,
            user=self.user,
        )

    def key(self) -> str:
        """Return the key that keepers and edges share, created if missing. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if key := self._key_file.read_text(encoding="ascii").strip():
                return key
        key = secrets.token_hex(32)
        write_private(self._key_file, key + "\n")
        return key

    def bury(self, link: Link, *, kill: bool = False) -> None:
        """Close the link to an edge that ends; the next one can have its directory.

        One that still runs is killed if `kill` says so, or if it does not end in time.
        """
        if kill or not wait_until_ended(link.process, timeout=_END_WITHIN):
            link.process.send(signal.SIGKILL)
            wait_until_ended(link.process, timeout=_END_WITHIN)
        link.close()
        child = self._children.pop(link.process.pid, None)
        if child is not None:
            child.wait()
        self._unused.append(link.directory)

    def leave(self, links: Sequence[Link]) -> None:
        """Leave edges to the next keeper."""
        for link in links:
            link.close()
            child = self._children.pop(link.process.pid, None)
            if child is not None:
                # It is not to be waited for, and its handle would warn of that.
                child.returncode = 0


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """Yield a descriptor by which another user can pass through a directory. Raises OSError."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened_log(log: LogFile, headline: str = "") -> Iterator[IO[bytes]]:
    """Yield a log for an edge to write to. On a full disk its lines are lost, until there is space.

    Without space for the file itself, all that this edge writes is lost.
    """
    try:
        stream = log.open(headline)
    except OSError as error:
        _log.warning("an edge cannot write its log", file=str(log.path), error=error.strerror)
        stream = _open_if_there_is_one(log)
    with stream:
        yield stream


def _open_if_there_is_one(log: LogFile) -> IO[bytes]:
    """Open a log that may have no space, or else what loses all lines. Raises OSError."""
    with contextlib.suppress(OSError):
        return log.open()
    return Path(os.devnull).open("ab", buffering=0)


def _kill(directory: Path) -> None:
    """Kill an edge that does not answer, such as a suspended one."""
    with (
        contextlib.suppress(OSError, psutil.Error),
        unix_sockets.connect(directory, CONTROL, timeout=_ANSWER_WITHIN) as connection,
    ):
        # The process that listens; before the edge did, it was a keeper, which has ended.
        process = psutil.Process(peers.credentials(connection)[0])
        if _MODULE in process.cmdline():
            process.kill()
            process.wait(_END_WITHIN)


def _edge_user() -> tuple[int, int] | None:
    """Return the user and group of a root keeper's edge; None: any other keeper's own."""
    if os.geteuid() != 0:
        return None
    for name in (_USER, "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return None


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in os.environ if _INHERITED.fullmatch(name)}
    return inherited | _ALLOCATOR


def _build() -> str:
    """Return a hash of what an edge is made from; an edge with the same one is not replaced."""
    program = Path(wire.__file__).parent
    sources = [*sorted(program.glob("*.py"))]
    sources += [Path(str(module.__file__)) for module in (identity, marks, peers, privileges)]
    made_from = [path.read_bytes() for path in sources]
    made_from += [sys.executable.encode(), sys.version.encode()]
    made_from += [version(library).encode() for library in ("brotli", "httptools")]
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()[:12]
