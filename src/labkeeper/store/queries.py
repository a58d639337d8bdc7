"""The queries of the store."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from labkeeper.core.access import WHOLE, Session, SessionUse, Token, View
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.ports import UsagePoints
from labkeeper.core.server import OrphanedKernel, Snapshot
from labkeeper.core.spec import LOCAL, QualifiedName
from labkeeper.core.usage import Point
from labkeeper.store.database import Database
from labkeeper.store.migrations import ACTOR

_FORGET_EVERY: Final = 100
"""New history entries between removals of old ones; a hundredth of the size of a large history."""
_ADD_USAGE: Final = """
INSERT INTO usage
SELECT ?1, ?2, ?3, ?4, ?5, round(?6), round(?7), ?8, ?9, ?10
WHERE EXISTS (SELECT 1 FROM servers WHERE name = ?1)
ON CONFLICT (server, level, at) DO UPDATE SET
  generation = max(generation, excluded.generation),
  samples = samples + excluded.samples,
  memory = round(memory + (excluded.memory - memory) * 1.0
                 * excluded.samples / (samples + excluded.samples)),
  memory_max = max(memory_max, excluded.memory_max),
  cpus = cpus + (excluded.cpus - cpus) * excluded.samples / (samples + excluded.samples),
  cpus_max = max(cpus_max, excluded.cpus_max),
  kernels = max(kernels, excluded.kernels)
"""
"""As `Point.merged` does it."""
_TRIM_USAGE: Final = """
DELETE FROM usage WHERE server = ?1 AND level = ?2 AND at <= (
  SELECT at FROM usage WHERE server = ?1 AND level = ?2 ORDER BY at DESC LIMIT 1 OFFSET ?3)
"""
_form: Final[Callable[[Any], TypeAdapter[Any]]] = functools.cache(TypeAdapter)
"""Returns the (de)serializer of a type, created on first use since that is slow."""
_T = TypeVar("_T")


class SqliteStore(Database):
    """The stores of `core.ports` (all that end with `Store`), and `WebhookStore`."""

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
        by_actor = f"SELECT {ACTOR}, count(*) FROM history GROUP BY 1"  # noqa: S608 - ours
        counts = dict(self._db.execute(by_actor).fetchall())
        share = _fair_share(counts.values(), keep)
        excess = [(actor, count - share) for actor, count in counts.items() if count > share]
        oldest = f"SELECT id FROM history WHERE {ACTOR} IS ? ORDER BY id LIMIT ?"  # noqa: S608 - ours
        self._db.executemany(f"DELETE FROM history WHERE id IN ({oldest})", excess)  # noqa: S608 - ours

    def remembered(self, view: View = WHOLE, *, after: int, limit: int) -> list[HistoryEntry]:
        """Return the oldest entries newer than an id."""
        return self._select("id", view, after, limit)

    def latest(self, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first."""
        return self._select("id DESC", view, 0, limit)[::-1]

    def _select(self, order: str, view: View, after: int, limit: int) -> list[HistoryEntry]:
        where, given = _asked(view)
        where.append("id > ?")
        given.append(after)
        within = view.limits
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

    # Sessions

    def sessions(self) -> list[Session]:
        """Return all sessions, the oldest first."""
        return self._read(Session, "SELECT session FROM sessions ORDER BY rowid")

    def save_session(self, session: Session) -> None:
        """Save a session, durably before returning."""
        with self._doing("write"):
            self._db.execute(
                "INSERT INTO sessions (id, session) VALUES (?, ?)", (session.id, _text(session))
            )

    def forget_sessions(self, ids: Collection[str]) -> None:
        """Remove sessions."""
        with self._doing("write"):
            self._db.executemany("DELETE FROM sessions WHERE id = ?", [(id_,) for id_ in ids])

    def session_use(self) -> SessionUse | None:
        """Return when sessions were last used; None if never saved."""
        return next(iter(self._read(SessionUse, "SELECT use FROM session_use")), None)

    def save_session_use(self, use: SessionUse) -> None:
        """Save when sessions were last used, durably before returning."""
        with self._doing("write"):
            self._db.execute(
                "INSERT OR REPLACE INTO session_use (id, use) VALUES (1, ?)", (_text(use),)
            )

    # Usage

    def add_usage(self, points: UsagePoints) -> None:
        """Add points in one transaction, merged with those of the same intervals."""
        rows = [
            (server, level, *point) for (server, level), found in points.items() for point in found
        ]
        with self._doing("write"), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(_ADD_USAGE, rows)

    def trim_usage(self, sizes: Mapping[int, int]) -> None:
        """Keep the newest points of each server, as many as each level allows."""
        servers = self._rows("SELECT name FROM servers")
        rows = [(name, level, size) for (name,) in servers for level, size in sizes.items()]
        with self._doing("write"), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(_TRIM_USAGE, rows)

    def usage(self, server: QualifiedName, level: int, *, since: int) -> list[Point]:
        """Return the points of a level that start at `since` or later, oldest first."""
        rows = self._rows(
            "SELECT at, generation, samples, memory, memory_max, cpus, cpus_max, kernels "
            "FROM usage WHERE server = ? AND level = ? AND at >= ? ORDER BY at",
            server,
            level,
            since,
        )
        try:
            points: list[Point] = _form(list[Point]).validate_python(rows)
        except ValidationError as error:
            raise self._damaged(str(error)) from error
        return points

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

    def _read(self, kind: type[_T], query: str, *given: object) -> list[_T]:
        """Return the objects in a column of JSON. Raises StoreError."""
        rows = self._rows(query, *given)
        try:
            return [_form(kind).validate_json(text) for (text,) in rows]
        except ValidationError as error:
            raise self._damaged(str(error)) from error


def _asked(view: View) -> tuple[list[str], list[object]]:
    """Return the conditions of what a view asks for, and their values."""
    conditions: dict[str, tuple[object, ...]] = {}
    if view.server is not None:
        conditions["server = ?"] = (view.server,)
    if view.owner is not None:
        # An entry from before there were owners has none.
        conditions["coalesce(json_extract(entry, '$.owner'), ?) = ?"] = (LOCAL, view.owner)
    if view.kind is not None:
        conditions["json_extract(entry, '$.kind') = ?"] = (view.kind,)
    if view.actor:
        conditions["instr(json_extract(entry, '$.origin.actor'), ?)"] = (view.actor,)
    if view.before is not None:
        conditions["id < ?"] = (view.before,)
    return [*conditions], [value for values in conditions.values() for value in values]


def _fair_share(counts: Iterable[int], keep: int) -> int:
    """Return each actor's share, at least 1, for about `keep` in all; smaller ones lose none."""
    left, waiting = keep, sorted(counts)
    while waiting and waiting[0] <= left // len(waiting):
        left -= waiting.pop(0)
    return max(1, left // len(waiting)) if waiting else keep


def _text(thing: Any) -> str:
    return _form(type(thing)).dump_json(thing).decode()
