"""The SQLite file: how it is opened and migrated, its connections, and its errors.

A newer keeper copies the file and migrates it in one transaction; an older keeper rejects a newer
file.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import structlog

from labkeeper import shortage
from labkeeper.core.errors import StoreError
from labkeeper.core.server import FailureClass
from labkeeper.store.migrations import ACTOR, MIGRATIONS, VERSION

_log = structlog.get_logger("labkeeper.store")
_PROBE: Final = 64 * 1024
"""Bytes written to test whether the disk accepts any; more than one of its blocks."""


class Database:
    """The file. Any thread may call it.

    Reads have a connection of their own: a long query of the history delays no change of a server.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, mode 0600. Raises StoreError; a damaged file is unchanged."""
        self._path = path
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._wipe_waits = threading.Lock()
        examine(path)
        with ExitStack() as opened:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                self._db = opened.enter_context(closing(self._connect()))
                self._reader = opened.enter_context(closing(self._connect()))
            except OSError as error:
                raise StoreError(f"cannot open the store {path}: {error.strerror}") from error
            except sqlite3.Error as error:
                raise _failed(path, "open", error) from error
            self._prepare()
            self._reader.execute("PRAGMA query_only = ON")
            opened.pop_all()

    def close(self) -> None:
        """Close the file."""
        # The writer is last: it merges the write-ahead log into the file.
        for connection in (self._reader, self._db):
            connection.close()

    def wipe(self) -> None:
        """Erase removed data from the disk, where the log still has it. Does not raise."""
        if not self._wipe_waits.acquire(blocking=False):
            return  # Another call is waiting and does it for both.
        with self._reading:
            self._wipe_waits.release()
            # Do not wait for other readers of the file, as all server changes would wait, too. What
            # remains then, or on a full disk, is erased by the next call.
            with (
                suppress(StoreError),
                self._doing("write"),
                closing(self._connect(timeout=0.0)) as db,
            ):
                _wipe(db)

    def _prepare(self) -> None:
        with self._doing("open"):
            # WAL survives a kill at any time, and NORMAL a crash of this process; only a crash of
            # the machine may lose the last transitions, and no process of ours outlives that.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            # Overwrites removed data: specs contain secrets.
            self._db.execute("PRAGMA secure_delete = ON")
            # A full disk must not keep a keeper from its servers: the next wipe makes up for it.
            with suppress(sqlite3.OperationalError):
                _wipe(self._db)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if 0 < version < VERSION:
                self._copy(version)
            for number, change in enumerate(MIGRATIONS[version:], start=version + 1):
                # One step at a time, each atomic.
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {change}; PRAGMA user_version = {number}; COMMIT;"
                )
            # Not part of the schema: every query works without it.
            self._db.execute(f"CREATE INDEX IF NOT EXISTS history_by_actor ON history ({ACTOR})")

    def _copy(self, version: int) -> None:
        """Copy the file before its migration, to allow a downgrade."""
        copy = self._path.with_name(f"{self._path.name}.v{version}")
        half = copy.with_name(f"{copy.name}.half")
        try:
            half.unlink(missing_ok=True)
            os.close(os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with closing(sqlite3.connect(half)) as target:
                self._db.backup(target)
            half.replace(copy)
        except OSError as error:
            raise StoreError(
                f"cannot copy the store {self._path} before it is migrated: {error.strerror}"
            ) from error
        _log.info("the store is migrated", version=VERSION, copy=str(copy))

    def _connect(self, *, timeout: float = 5.0) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=timeout, check_same_thread=False, isolation_level=None
        )

    def _rows(self, query: str, *given: object) -> list[tuple[Any, ...]]:
        with self._doing("read"):
            return self._reader.execute(query, given).fetchall()

    @contextmanager
    def _doing(self, verb: str) -> Iterator[None]:
        lock = self._reading if verb == "read" else self._writing
        with lock, _translated(self._path, verb):
            yield

    def _damaged(self, why: str) -> StoreError:
        return _damaged(self._path, why)


def examine(path: Path) -> None:
    """Raise StoreError if the file is damaged, or newer than this version; it stays unchanged.

    Uses a read-only connection: any other would merge the log into the file when it closes.
    """
    if not path.exists():
        return
    if not path.stat().st_size:
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise _damaged(path, "it is empty, and the log beside it is not")
        return
    with (
        _translated(path, "open"),
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db,
    ):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(path, " ".join(found.split()))
    if version < 0:
        raise _damaged(path, f"its schema has the version {version}")
    if version > VERSION:
        raise StoreError(
            f"cannot open the store {path}: a newer labkeeper wrote it; "
            "use that version, or another state directory"
        )


@contextmanager
def _translated(path: Path, verb: str) -> Iterator[None]:
    """Raise StoreError instead of errors of SQLite."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if verb != "open":  # The error on opening ends the keeper, which reports it.
            _log.error("the store failed", verb=verb, error=str(error))
        if isinstance(error, sqlite3.OperationalError):
            raise _failed(path, verb, error) from error
        raise _damaged(path, str(error)) from error
    except UnicodeDecodeError as error:
        # From SQLite's message, which quotes the file's content.
        raise _damaged(path, "it holds a value that is not text") from error


def _failed(path: Path, verb: str, error: sqlite3.Error) -> StoreError:
    """Return the error with its cause, from a test write if SQLite knows none."""
    # Errors that Python finds in SQLite's results have no code.
    why, full = str(error), getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    probe = path.with_name(f"{path.name}.probe")
    try:
        probe.write_bytes(bytes(_PROBE))
    except OSError as disk:
        why, full = f"{error} ({disk.strerror})", full or shortage.is_full(disk)
    finally:
        with suppress(OSError):
            probe.unlink()
    cause = {"failure_class": FailureClass.DISK_FULL} if full else {}
    return StoreError(f"cannot {verb} the store {path}: {why}", **cause)


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"cannot read the store {path}: it is damaged ({why}); it was left as it is: "
        "move it away to begin without it, and end its servers by hand"
    )


def _wipe(db: sqlite3.Connection) -> None:
    """Merge the write-ahead log into the file, and empty it."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
