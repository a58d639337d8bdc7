"""Snapshots in SQLite, in the state directory.

One row a server, its snapshot as JSON. `PRAGMA user_version` tells the layout, so that a newer keeper can carry an older file
over, and an older keeper refuses a newer one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog
from pydantic import TypeAdapter, ValidationError

from labkeeper.core.errors import StoreError
from labkeeper.core.model import ServerName, Snapshot

_log = structlog.get_logger("labkeeper.store")
_LAYOUT: Final = 1
_SNAPSHOT: Final = TypeAdapter(Snapshot)


class SqliteStore:
    """See `core.ports.Store`. Any thread may call it."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, readable by its owner alone. Raises StoreError; a damaged file is left as it is."""
        self._path = path
        self._lock = threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the store {path}: {error}") from error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def load(self) -> list[Snapshot]:
        """Give all servers, by name."""
        with self._doing("read"):
            rows = self._db.execute("SELECT snapshot FROM servers ORDER BY name").fetchall()
        try:
            return [_SNAPSHOT.validate_json(text) for (text,) in rows]
        except ValidationError as error:
            raise self._damaged(str(error)) from error

    def save(self, snapshot: Snapshot) -> None:
        """Keep one server; on the disk when this returns."""
        try:
            text = _SNAPSHOT.dump_json(snapshot).decode()
        except ValueError as error:
            raise StoreError(f"cannot write server '{snapshot.name}' to the store: {error}") from error
        with self._doing("write"):
            self._db.execute(
                "INSERT INTO servers (name, snapshot) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET snapshot = excluded.snapshot",
                (snapshot.name, text),
            )

    def forget(self, name: ServerName) -> None:
        """Drop one server."""
        with self._doing("write"):
            self._db.execute("DELETE FROM servers WHERE name = ?", (name,))

    def _prepare(self) -> None:
        with self._doing("open"):
            # WAL survives a kill at any moment, and NORMAL a crash of this process; only a crash of the machine may cost
            # the last transitions, and no process of ours outlives that.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            (layout,) = self._db.execute("PRAGMA user_version").fetchone()
            if layout == 0:
                self._db.execute("CREATE TABLE servers (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) STRICT")
                self._db.execute(f"PRAGMA user_version = {_LAYOUT}")
        if layout > _LAYOUT:
            raise StoreError(
                f"cannot open the store {self._path}: a newer labkeeper wrote it; use that version, or another state directory"
            )

    @contextmanager
    def _doing(self, verb: str) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                _log.error("the store failed", verb=verb, error=str(error))
                if isinstance(error, sqlite3.OperationalError):
                    raise StoreError(f"cannot {verb} the store {self._path}: {error}") from error
                raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"cannot read the store {self._path}: it is damaged ({why}); it was left as it is: move it away to begin without it, "
            "and end its servers by hand"
        )
