"""Snapshots, orphaned kernels, events and API tokens in SQLite, in the state directory.

One row per server, by qualified name, with its snapshot as JSON; per orphaned kernel; per event;
per webhook, with its last delivered event; per token, only as a hash; per runtime directory in
which servers may run.

`PRAGMA user_version` is the schema version. A newer keeper copies the file and migrates it in one
transaction; an older keeper rejects a newer file.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
from pydantic import TypeAdapter, ValidationError

from labkeeper import shortage
from labkeeper.core.access import WHOLE, Token, View
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.server import FailureClass, OrphanedKernel, Snapshot
from labkeeper.core.spec import LOCAL, QualifiedName

_log = structlog.get_logger("labkeeper.store")


def _renamed(table: str, column: str, old: str, new: str) -> str:
    """Return SQL that renames a JSON member in a column; invalid JSON is reported when read."""
    value = (
        f"json_set(json_remove({column}, '$.{old}'), '$.{new}', json_extract({column}, '$.{old}'))"
    )
    where = f"json_valid({column}) AND json_type({column}, '$.{old}') IS NOT NULL"
    return f"UPDATE {table} SET {column} = {value} WHERE {where}"  # noqa: S608 - of our own names


def _replaced(table: str, column: str, member: str, old: str, new: str) -> str:
    """Return SQL that replaces one value of a JSON member in a column, as `_renamed` does."""
    value = f"json_set({column}, '$.{member}', '{new}')"
    where = f"json_valid({column}) AND json_extract({column}, '$.{member}') = '{old}'"
    return f"UPDATE {table} SET {column} = {value} WHERE {where}"  # noqa: S608 - of our own names


_MIGRATIONS: Final = (
    "CREATE TABLE IF NOT EXISTS servers (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS debts (kernel_id TEXT PRIMARY KEY, debt TEXT NOT NULL) STRICT",
    (
        "CREATE TABLE IF NOT EXISTS history "
        "(id INTEGER PRIMARY KEY, server TEXT, entry TEXT NOT NULL) STRICT"
    ),
    (
        "CREATE TABLE IF NOT EXISTS webhooks "
        "(url TEXT PRIMARY KEY, told INTEGER, delivered INTEGER, dead INTEGER) STRICT"
    ),
    "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, token TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS runtime_dirs (path BLOB PRIMARY KEY) STRICT",
    "; ".join(
        (
            _renamed("servers", "snapshot", "launch", "generation"),
            # The next keeper asks each server for its endpoint again.
            (
                "UPDATE servers SET snapshot = json_set(snapshot, '$.endpoint', NULL) "
                "WHERE json_valid(snapshot)"
            ),
            _renamed("history", "entry", "launch", "generation"),
            _renamed("tokens", "token", "reach", "limits"),
            "ALTER TABLE debts RENAME TO orphans",
            "ALTER TABLE orphans RENAME COLUMN debt TO kernel",
        )
    ),
    "; ".join(
        (
            _replaced("servers", "snapshot", "goal", "renew", "again-keeping-kernels"),
            _replaced("history", "entry", "details.goal", "renew", "again-keeping-kernels"),
        )
    ),
)
"""The migration from each version to the next. The first table may exist without a version, after a
kill in between."""
_VERSION: Final = len(_MIGRATIONS)
_FORGET_EVERY: Final = 100
"""New history entries between removals of old ones; a hundredth of the size of a large history."""
_ACTOR: Final = "CASE WHEN json_valid(entry) THEN json_extract(entry, '$.origin.actor') END"
"""The actor of a history entry; an index only serves a query with the same expression."""
_PROBE: Final = 64 * 1024
"""Bytes written to test whether the disk accepts any; more than one of its blocks."""


_form: Final[Callable[[Any], TypeAdapter[Any]]] = functools.cache(TypeAdapter)
"""Returns the (de)serializer of a type, created on first use since that is slow."""
_T = TypeVar("_T")


class SqliteStore:
    """The stores of `core.ports` (`Store`, `HistoryStore`, `TokenStore`), and `WebhookStore`.

    Any thread may call it. Reads have a connection of their own: a long query of the history
    delays no change of a server.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, mode 0600. Raises StoreError; a damaged file is unchanged."""
        self._path = path
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._wipe_waits = threading.Lock()
        self._examine()
        with ExitStack() as opened:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                self._db = opened.enter_context(closing(self._connect()))
                self._reader = opened.enter_context(closing(self._connect()))
            except OSError as error:
                raise StoreError(f"cannot open the store {path}: {error.strerror}") from error
            except sqlite3.Error as error:
                raise self._failed("open", error) from error
            self._prepare()
            self._reader.execute("PRAGMA query_only = ON")
            opened.pop_all()

    def close(self) -> None:
        """Close the file."""
        # The writer is last: it merges the write-ahead log into the file.
        for connection in (self._reader, self._db):
            connection.close()

    def load(self) -> list[Snapshot]:
        """Return all servers, by name."""
        return self._read(Snapshot, "SELECT snapshot FROM servers ORDER BY name")

    def save(self, snapshot: Snapshot) -> None:
        """Save one server, durably before returning."""
        try:
            text = _text(snapshot)
        except ValueError as error:
            raise StoreError(
                f"cannot write server '{snapshot.name}' to the store: {error}"
            ) from error
        with self._doing("write"):
            self._db.execute(
                "INSERT INTO servers (name, snapshot) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET snapshot = excluded.snapshot",
                (snapshot.qualified_name, text),
            )

    def forget(self, name: QualifiedName) -> None:
        """Remove one server."""
        with self._doing("write"):
            self._db.execute("DELETE FROM servers WHERE name = ?", (name,))

    def orphans(self) -> list[OrphanedKernel]:
        """Return all kernels that are still to be ended."""
        return self._read(OrphanedKernel, "SELECT kernel FROM orphans ORDER BY kernel_id")

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add kernels, durably before returning."""
        rows = [(orphan.kernel_id, _text(orphan)) for orphan in orphans]
        with self._doing("write"):
            self._db.executemany(
                "INSERT INTO orphans (kernel_id, kernel) VALUES (?, ?)"
                " ON CONFLICT (kernel_id) DO UPDATE SET kernel = excluded.kernel",
                rows,
            )

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Remove kernels."""
        with self._doing("write"):
            self._db.executemany(
                "DELETE FROM orphans WHERE kernel_id = ?",
                [(kernel_id,) for kernel_id in kernel_ids],
            )

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

    # History

    def forgotten(self, after: int) -> int:
        """Return the number of dropped entries newer than an id."""
        # Ids have no other gaps, and the newest entry is never dropped.
        return int(
            self._rows(
                "SELECT coalesce(max(id) - ? - count(*), 0) FROM history WHERE id > ?", after, after
            )[0][0]
        )

    def last_id(self) -> int:
        """Return the id of the newest entry."""
        return int(self._rows("SELECT coalesce(max(id), 0) FROM history")[0][0])

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Add entries, durably before returning."""
        rows = [(entry.id, entry.server, _text(entry)) for entry in entries]
        with self._doing("write"):
            self._db.executemany(
                "INSERT OR REPLACE INTO history (id, server, entry) VALUES (?, ?, ?)", rows
            )
            if any(entry.id % max(_FORGET_EVERY, keep // 100) == 0 for entry in entries):
                self._forget_entries(keep)

    def _forget_entries(self, keep: int) -> None:
        """Drop the oldest entries of the most active actors, so that none displaces the others."""
        by_actor = f"SELECT {_ACTOR}, count(*) FROM history GROUP BY 1"  # noqa: S608 - ours
        counts = dict(self._db.execute(by_actor).fetchall())
        share = _fair_share(counts.values(), keep)
        excess = [(actor, count - share) for actor, count in counts.items() if count > share]
        oldest = f"SELECT id FROM history WHERE {_ACTOR} IS ? ORDER BY id LIMIT ?"  # noqa: S608 - ours
        self._db.executemany(f"DELETE FROM history WHERE id IN ({oldest})", excess)  # noqa: S608 - ours

    def remembered(self, view: View = WHOLE, *, after: int, limit: int) -> list[HistoryEntry]:
        """Return the oldest entries newer than an id."""
        return self._select("id", view, after, limit)

    def latest(self, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first."""
        return self._select("id DESC", view, 0, limit)[::-1]

    def _select(self, order: str, view: View, after: int, limit: int) -> list[HistoryEntry]:
        where = ["id > ?"]
        given: list[object] = [after]
        within = view.limits
        if view.server is not None:
            where.append("server = ?")
            given.append(view.server)
        if view.owner is not None:
            # An entry from before there were owners has none.
            where.append("coalesce(json_extract(entry, '$.owner'), ?) = ?")
            given.extend((LOCAL, view.owner))
        if not within.unlimited:
            where.append("server IS NOT NULL")
        if within.servers:
            where.append(f"({' OR '.join('server GLOB ?' for _ in within.servers)})")
            given.extend(within.servers)
        for label in within.labels.items():
            # Compare key and value: a key may contain characters with a meaning in JSON paths.
            where.append(
                "EXISTS (SELECT 1 FROM json_each(entry, '$.labels') WHERE key = ? AND value = ?)"
            )
            given.extend(label)
        if within.users:
            where.append(
                f"json_extract(entry, '$.user') IN ({', '.join('?' for _ in within.users)})"
            )
            given.extend(within.users)
        query = f"SELECT entry FROM history WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?"  # noqa: S608 - ours, above
        return self._read(HistoryEntry, query, *given, limit)

    # Tokens

    def tokens(self) -> list[Token]:
        """Return all tokens."""
        return self._read(Token, "SELECT token FROM tokens ORDER BY id")

    def save_token(self, token: Token) -> None:
        """Save a token, durably before returning."""
        row = (token.id, _text(token))
        with self._doing("write"):
            self._db.execute("INSERT OR REPLACE INTO tokens (id, token) VALUES (?, ?)", row)

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Remove a token."""
        with self._doing("write"):
            self._db.execute("DELETE FROM tokens WHERE id = ?", (id,))

    # Webhooks

    def webhook(self, url: str) -> tuple[int, int, int] | None:
        """Return a webhook's last posted entry and its counts of delivered and dead ones.

        Raises StoreError.
        """
        rows = self._rows("SELECT told, delivered, dead FROM webhooks WHERE url = ?", url)
        if not rows:
            return None
        if None in rows[0]:
            raise self._damaged("a webhook has no numbers")
        told, delivered, dead = rows[0]
        return told, delivered, dead

    def note_webhook(self, url: str, told: int, delivered: int, dead: int) -> None:
        """Store the same, dropping all other webhooks. Raises StoreError."""
        with self._doing("write"):
            self._db.execute("DELETE FROM webhooks WHERE url != ?", (url,))
            self._db.execute(
                "INSERT OR REPLACE INTO webhooks VALUES (?, ?, ?, ?)", (url, told, delivered, dead)
            )

    # Runtime directories

    def runtime_dirs(self) -> list[Path]:
        """Return the directories in which servers may run. Raises StoreError."""
        paths = [path for (path,) in self._rows("SELECT path FROM runtime_dirs ORDER BY path")]
        if not all(path.startswith(b"/") and b"\0" not in path for path in paths):
            raise self._damaged("a runtime directory has no path")
        return [Path(os.fsdecode(path)) for path in paths]

    def note_runtime_dirs(self, directories: Sequence[Path]) -> None:
        """Replace these directories, durably before returning. Raises StoreError."""
        rows = {(os.fsencode(path),) for path in directories}
        known = {(os.fsencode(path),) for path in self.runtime_dirs()}
        if rows == known:
            # Without a write, a keeper can return to its servers even if the disk is full.
            return
        with self._doing("write"):
            # In this order: a keeper killed in between leaves one too many.
            self._db.executemany("INSERT OR IGNORE INTO runtime_dirs (path) VALUES (?)", rows)
            self._db.executemany("DELETE FROM runtime_dirs WHERE path = ?", known - rows)

    def _examine(self) -> None:
        """Reject a file that is damaged or newer than this version.

        Uses a read-only connection: any other would merge the log into the file when it closes.
        """
        if not self._path.exists():
            return
        if not self._path.stat().st_size:
            log = self._path.with_name(f"{self._path.name}-wal")
            if log.exists() and log.stat().st_size:
                raise self._damaged("it is empty, and the log beside it is not")
            return
        with (
            self._doing("open"),
            closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as db,
        ):
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise self._damaged(" ".join(found.split()))
        if version < 0:
            raise self._damaged(f"its schema has the version {version}")
        if version > _VERSION:
            raise StoreError(
                f"cannot open the store {self._path}: a newer labkeeper wrote it; "
                "use that version, or another state directory"
            )

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
            if 0 < version < _VERSION:
                self._copy(version)
            for number, change in enumerate(_MIGRATIONS[version:], start=version + 1):
                # One step at a time, each atomic.
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {change}; PRAGMA user_version = {number}; COMMIT;"
                )
            # Not part of the schema: every query works without it.
            self._db.execute(f"CREATE INDEX IF NOT EXISTS history_by_actor ON history ({_ACTOR})")

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
        _log.info("the store is migrated", version=_VERSION, copy=str(copy))

    def _connect(self, *, timeout: float = 5.0) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=timeout, check_same_thread=False, isolation_level=None
        )

    def _read(self, kind: type[_T], query: str, *given: object) -> list[_T]:
        """Return the objects in a column of JSON. Raises StoreError."""
        rows = self._rows(query, *given)
        try:
            return [_form(kind).validate_json(text) for (text,) in rows]
        except ValidationError as error:
            raise self._damaged(str(error)) from error

    def _rows(self, query: str, *given: object) -> list[tuple[Any, ...]]:
        with self._doing("read"):
            return self._reader.execute(query, given).fetchall()

    @contextmanager
    def _doing(self, verb: str) -> Iterator[None]:
        with self._reading if verb == "read" else self._writing:
            try:
                yield
            except sqlite3.DatabaseError as error:
                if verb != "open":  # The error on opening ends the keeper, which reports it.
                    _log.error("the store failed", verb=verb, error=str(error))
                if isinstance(error, sqlite3.OperationalError):
                    raise self._failed(verb, error) from error
                raise self._damaged(str(error)) from error
            except UnicodeDecodeError as error:
                # From SQLite's message, which quotes the file's content.
                raise self._damaged("it holds a value that is not text") from error

    def _failed(self, verb: str, error: sqlite3.Error) -> StoreError:
        """Return the error with its cause, from a test write if SQLite knows none."""
        # Errors that Python finds in SQLite's results have no code.
        why, full = str(error), getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        probe = self._path.with_name(f"{self._path.name}.probe")
        try:
            probe.write_bytes(bytes(_PROBE))
        except OSError as disk:
            why, full = f"{error} ({disk.strerror})", full or shortage.is_full(disk)
        finally:
            with suppress(OSError):
                probe.unlink()
        cause = {"failure_class": FailureClass.DISK_FULL} if full else {}
        return StoreError(f"cannot {verb} the store {self._path}: {why}", **cause)

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"cannot read the store {self._path}: it is damaged ({why}); it was left as it is: "
            "move it away to begin without it, and end its servers by hand"
        )


def _fair_share(counts: Iterable[int], keep: int) -> int:
    """Return each actor's share, at least 1, for about `keep` in all; smaller ones lose none."""
    left, waiting = keep, sorted(counts)
    while waiting and waiting[0] <= left // len(waiting):
        left -= waiting.pop(0)
    return max(1, left // len(waiting)) if waiting else keep


def _wipe(db: sqlite3.Connection) -> None:
    """Merge the write-ahead log into the file, and empty it."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _text(thing: Any) -> str:
    return _form(type(thing)).dump_json(thing).decode()
