"""Snapshots, orphaned kernels, events and API tokens in SQLite, in the state directory.

One row for each server, its snapshot as JSON; for each kernel that is still to be ended; for each event; for each webhook, with
the last event that it has received; for each token, as a hash alone; for each runtime directory in which servers may run.

`PRAGMA user_version` is the version of the schema. A newer keeper copies the file, and migrates it in one transaction; an older
keeper refuses a newer file.
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
from labkeeper.core.access import EVERYTHING, Token, TokenLimits
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.server import FailureClass, OrphanedKernel, Snapshot
from labkeeper.core.spec import ServerName

_log = structlog.get_logger("labkeeper.store")


def _renamed(table: str, column: str, old: str, new: str) -> str:
    """Return the SQL that renames a member of the JSON objects in a column; what is no JSON stays, and is reported when read."""
    value = f"json_set(json_remove({column}, '$.{old}'), '$.{new}', json_extract({column}, '$.{old}'))"
    where = f"json_valid({column}) AND json_type({column}, '$.{old}') IS NOT NULL"
    return f"UPDATE {table} SET {column} = {value} WHERE {where}"  # noqa: S608 - of our own names


_MIGRATIONS: Final = (
    "CREATE TABLE IF NOT EXISTS servers (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS debts (kernel_id TEXT PRIMARY KEY, debt TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS history (id INTEGER PRIMARY KEY, server TEXT, entry TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS webhooks (url TEXT PRIMARY KEY, told INTEGER, delivered INTEGER, dead INTEGER) STRICT",
    "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, token TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS runtime_dirs (path BLOB PRIMARY KEY) STRICT",
    "; ".join(
        (
            _renamed("servers", "snapshot", "launch", "generation"),
            # Whoever takes a server up asks it again how it is reached.
            "UPDATE servers SET snapshot = json_set(snapshot, '$.endpoint', NULL) WHERE json_valid(snapshot)",
            _renamed("history", "entry", "launch", "generation"),
            _renamed("tokens", "token", "reach", "limits"),
            "ALTER TABLE debts RENAME TO orphans",
            "ALTER TABLE orphans RENAME COLUMN debt TO kernel",
        )
    ),
)
"""What leads from each version to the next. The first table may be there without a version: a keeper was killed in between."""
_VERSION: Final = len(_MIGRATIONS)
_FORGET_EVERY: Final = 100
"""New entries of the history after which old ones are removed, in a small history; in a large one, a hundredth of it."""
_ACTOR: Final = "CASE WHEN json_valid(entry) THEN json_extract(entry, '$.origin.actor') END"
"""Whose entry of the history it is; the words of an index that serves a query are the same in both."""
_PROBE: Final = 64 * 1024
"""Bytes that are written to hear of a disk whether it takes any; more than one of its blocks."""


_form: Final[Callable[[Any], TypeAdapter[Any]]] = functools.cache(TypeAdapter)
"""Reads and writes a kind of thing; made when there is the first one, since the making takes its time."""
_T = TypeVar("_T")


class SqliteStore:
    """The stores of `core.ports` (`Store`, `HistoryStore`, `TokenStore`), and `history.webhooks.WebhookStore`.

    Any thread may call it. What is read has a connection of its own: a long look into the history holds up no change of a server.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file, readable by its owner alone. Raises StoreError; a damaged file is left as it is."""
        self._path = path
        self._writing, self._reading, self._wipe_waits = threading.Lock(), threading.Lock(), threading.Lock()
        self._examine()
        with ExitStack() as opened:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                self._db, self._reader = (opened.enter_context(closing(self._connect())) for _ in range(2))
            except OSError as error:
                raise StoreError(f"cannot open the store {path}: {error.strerror}") from error
            except sqlite3.Error as error:
                raise self._failed("open", error) from error
            self._prepare()
            self._reader.execute("PRAGMA query_only = ON")
            opened.pop_all()

    def close(self) -> None:
        """Close the file."""
        # The one that wrote comes last: it puts what is in the log beside the file into it.
        for connection in (self._reader, self._db):
            connection.close()

    def load(self) -> list[Snapshot]:
        """Return all servers, by name."""
        return self._read(Snapshot, "SELECT snapshot FROM servers ORDER BY name")

    def save(self, snapshot: Snapshot) -> None:
        """Keep one server; on the disk when this returns."""
        try:
            text = _text(snapshot)
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

    def orphans(self) -> list[OrphanedKernel]:
        """Return all kernels that are still to be ended."""
        return self._read(OrphanedKernel, "SELECT kernel FROM orphans ORDER BY kernel_id")

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Keep some more; on the disk when this returns."""
        rows = [(orphan.kernel_id, _text(orphan)) for orphan in orphans]
        with self._doing("write"):
            self._db.executemany(
                "INSERT INTO orphans (kernel_id, kernel) VALUES (?, ?)"
                " ON CONFLICT (kernel_id) DO UPDATE SET kernel = excluded.kernel",
                rows,
            )

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Drop some."""
        with self._doing("write"):
            self._db.executemany("DELETE FROM orphans WHERE kernel_id = ?", [(kernel_id,) for kernel_id in kernel_ids])

    def wipe(self) -> None:
        """Leave nothing on the disk of what was dropped, which the log beside the file has yet. Does not raise."""
        if not self._wipe_waits.acquire(blocking=False):
            return  # Another call has not begun, and does it for both.
        with self._reading:
            self._wipe_waits.release()
            # Other programs that look into the file are not waited for: all changes of servers would wait, too. What is left
            # then, and where the disk is full, goes with the next call.
            with suppress(StoreError), self._doing("write"), closing(self._connect(timeout=0.0)) as db:
                _wipe(db)

    # The history

    def forgotten(self, after: int) -> int:
        """Count the entries newer than an id that are known no more."""
        # Ids have no gaps but these, and the newest one stays.
        return int(self._rows("SELECT coalesce(max(id) - ? - count(*), 0) FROM history WHERE id > ?", after, after)[0][0])

    def last_id(self) -> int:
        """Return the id of the newest entry."""
        return int(self._rows("SELECT coalesce(max(id), 0) FROM history")[0][0])

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Keep some more; on the disk when this returns."""
        rows = [(entry.id, entry.server, _text(entry)) for entry in entries]
        with self._doing("write"):
            self._db.executemany("INSERT OR REPLACE INTO history (id, server, entry) VALUES (?, ?, ?)", rows)
            if any(entry.id % max(_FORGET_EVERY, keep // 100) == 0 for entry in entries):
                self._forget_entries(keep)

    def _forget_entries(self, keep: int) -> None:
        """Drop the oldest entries of those who have most: nobody fills the history at the cost of others."""
        counts = dict(self._db.execute(f"SELECT {_ACTOR}, count(*) FROM history GROUP BY 1").fetchall())  # noqa: S608 - ours
        share = _fair_share(counts.values(), keep)
        excess = [(actor, count - share) for actor, count in counts.items() if count > share]
        oldest = f"SELECT id FROM history WHERE {_ACTOR} IS ? ORDER BY id LIMIT ?"  # noqa: S608 - ours
        self._db.executemany(f"DELETE FROM history WHERE id IN ({oldest})", excess)  # noqa: S608 - ours

    def remembered(
        self, *, after: int, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING
    ) -> list[HistoryEntry]:
        """Return the oldest that are newer than an id."""
        return self._select("id", after, server, within, limit)

    def latest(self, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the newest ones, the oldest of them first."""
        return self._select("id DESC", 0, server, within, limit)[::-1]

    def _select(self, order: str, after: int, server: ServerName | None, within: TokenLimits, limit: int) -> list[HistoryEntry]:
        where = ["id > ?"]
        given: list[object] = [after]
        if server is not None:
            where.append("server = ?")
            given.append(server)
        if not within.unlimited:
            where.append("server IS NOT NULL")
        if within.servers:
            where.append(f"({' OR '.join('server GLOB ?' for _ in within.servers)})")
            given.extend(within.servers)
        for label in within.labels.items():
            # By its name and its value at once: a key may hold what has a meaning in a path of JSON.
            where.append("EXISTS (SELECT 1 FROM json_each(entry, '$.labels') WHERE key = ? AND value = ?)")
            given.extend(label)
        if within.users:
            where.append(f"json_extract(entry, '$.user') IN ({', '.join('?' for _ in within.users)})")
            given.extend(within.users)
        query = f"SELECT entry FROM history WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?"  # noqa: S608 - ours, above
        return self._read(HistoryEntry, query, *given, limit)

    # Tokens

    def tokens(self) -> list[Token]:
        """Return all."""
        return self._read(Token, "SELECT token FROM tokens ORDER BY id")

    def save_token(self, token: Token) -> None:
        """Keep one; on the disk when this returns."""
        row = (token.id, _text(token))
        with self._doing("write"):
            self._db.execute("INSERT OR REPLACE INTO tokens (id, token) VALUES (?, ?)", row)

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Drop one."""
        with self._doing("write"):
            self._db.execute("DELETE FROM tokens WHERE id = ?", (id,))

    # Webhooks

    def webhook(self, url: str) -> tuple[int, int, int] | None:
        """Return the last entry that a webhook was told, how many it took, and how many are dead. Raises StoreError."""
        rows = self._rows("SELECT told, delivered, dead FROM webhooks WHERE url = ?", url)
        if not rows:
            return None
        if None in rows[0]:
            raise self._damaged("a webhook has no numbers")
        told, delivered, dead = rows[0]
        return told, delivered, dead

    def note_webhook(self, url: str, told: int, delivered: int, dead: int) -> None:
        """Keep the same; of no other webhook any more. Raises StoreError."""
        with self._doing("write"):
            self._db.execute("DELETE FROM webhooks WHERE url != ?", (url,))
            self._db.execute("INSERT OR REPLACE INTO webhooks VALUES (?, ?, ?, ?)", (url, told, delivered, dead))

    # Runtime directories

    def runtime_dirs(self) -> list[Path]:
        """Return those in which servers may run. Raises StoreError."""
        paths = [path for (path,) in self._rows("SELECT path FROM runtime_dirs ORDER BY path")]
        if not all(path.startswith(b"/") and b"\0" not in path for path in paths):
            raise self._damaged("a runtime directory has no path")
        return [Path(os.fsdecode(path)) for path in paths]

    def note_runtime_dirs(self, directories: Sequence[Path]) -> None:
        """Keep these, and no others; on the disk when this returns. Raises StoreError."""
        rows, known = ({(os.fsencode(path),) for path in paths} for paths in (directories, self.runtime_dirs()))
        if rows == known:
            # Nothing is written: a keeper comes back to its servers also on a full disk.
            return
        with self._doing("write"):
            # In this order: a keeper that is killed in between leaves one too many.
            self._db.executemany("INSERT OR IGNORE INTO runtime_dirs (path) VALUES (?)", rows)
            self._db.executemany("DELETE FROM runtime_dirs WHERE path = ?", known - rows)

    def _examine(self) -> None:
        """Refuse a file that is damaged, or newer than we are.

        Read by a connection that cannot write: as it closes, any other would carry its log over into the file.
        """
        if not self._path.exists():
            return
        if not self._path.stat().st_size:
            log = self._path.with_name(f"{self._path.name}-wal")
            if log.exists() and log.stat().st_size:
                raise self._damaged("it is empty, and the log beside it is not")
            return
        with self._doing("open"), closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok" or version < 0:
            raise self._damaged(" ".join(found.split()) if found != "ok" else f"its schema has the version {version}")
        if version > _VERSION:
            raise StoreError(
                f"cannot open the store {self._path}: a newer labkeeper wrote it; use that version, or another state directory"
            )

    def _prepare(self) -> None:
        with self._doing("open"):
            # WAL survives a kill at any moment, and NORMAL a crash of this process; only a crash of the machine may cost
            # the last transitions, and no process of ours outlives that.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            # What is dropped is overwritten: specs hold secrets.
            self._db.execute("PRAGMA secure_delete = ON")
            # A full disk has no room for it, and keeps no keeper from its servers: the next wipe makes up for it.
            with suppress(sqlite3.OperationalError):
                _wipe(self._db)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if 0 < version < _VERSION:
                self._copy(version)
            for number, change in enumerate(_MIGRATIONS[version:], start=version + 1):
                # One step at a time, each whole or not at all.
                self._db.executescript(f"BEGIN IMMEDIATE; {change}; PRAGMA user_version = {number}; COMMIT;")
            # No layout of its own: nothing is read by it that could not be read without.
            self._db.execute(f"CREATE INDEX IF NOT EXISTS history_by_actor ON history ({_ACTOR})")

    def _copy(self, version: int) -> None:
        """Copy the file before it is migrated, for those who want to go back to the labkeeper that wrote it."""
        copy = self._path.with_name(f"{self._path.name}.v{version}")
        half = copy.with_name(f"{copy.name}.half")
        try:
            half.unlink(missing_ok=True)
            os.close(os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with closing(sqlite3.connect(half)) as target:
                self._db.backup(target)
            half.replace(copy)
        except OSError as error:
            raise StoreError(f"cannot copy the store {self._path} before it is migrated: {error.strerror}") from error
        _log.info("the store is migrated", version=_VERSION, copy=str(copy))

    def _connect(self, *, timeout: float = 5.0) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=timeout, check_same_thread=False, isolation_level=None)

    def _read(self, kind: type[_T], query: str, *given: object) -> list[_T]:
        """Return what rows of one column hold. Raises StoreError."""
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
                if verb != "open":  # That one ends the keeper, which says so.
                    _log.error("the store failed", verb=verb, error=str(error))
                if isinstance(error, sqlite3.OperationalError):
                    raise self._failed(verb, error) from error
                raise self._damaged(str(error)) from error
            except UnicodeDecodeError as error:
                # Of SQLite's own words, which quote what the file holds.
                raise self._damaged("it holds what is no text") from error

    def _failed(self, verb: str, error: sqlite3.Error) -> StoreError:
        """Return the error that says why, in the disk's own words where SQLite has only seen that something failed."""
        # Errors that Python finds in what SQLite gives have no code.
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
            f"cannot read the store {self._path}: it is damaged ({why}); it was left as it is: move it away to begin without it, "
            "and end its servers by hand"
        )


def _fair_share(counts: Iterable[int], keep: int) -> int:
    """Return how many entries each may have, at least one, so that all have about `keep`; those who have fewer lose none."""
    left, waiting = keep, sorted(counts)
    while waiting and waiting[0] <= left // len(waiting):
        left -= waiting.pop(0)
    return max(1, left // len(waiting)) if waiting else keep


def _wipe(db: sqlite3.Connection) -> None:
    """Put what is in the log beside the file into it, and empty the log."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _text(thing: Any) -> str:
    return _form(type(thing)).dump_json(thing).decode()
