"""The schema, as the migration from each version to the next.

One row per server, by qualified name, with its snapshot as JSON; per orphaned kernel; per event;
per webhook, with its last delivered event; per token, and per browser session, only as a hash; per
runtime directory in which servers may run; per interval in which the usage of a server was
measured. One row has the last use of all sessions.

`PRAGMA user_version` is the schema version.
"""

from __future__ import annotations

from typing import Final


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


MIGRATIONS: Final = (
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
    "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, session TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS session_use (id INTEGER PRIMARY KEY, use TEXT NOT NULL) STRICT",
    (
        "CREATE TABLE IF NOT EXISTS usage ("
        "server TEXT NOT NULL, level INTEGER NOT NULL, at INTEGER NOT NULL, "
        "generation INTEGER NOT NULL, samples INTEGER NOT NULL, "
        "memory INTEGER NOT NULL, memory_max INTEGER NOT NULL, "
        "cpus REAL NOT NULL, cpus_max REAL NOT NULL, kernels INTEGER NOT NULL, "
        "PRIMARY KEY (server, level, at)) STRICT, WITHOUT ROWID; "
        # Both are removed, or neither: the next server of this name has no part in it.
        "CREATE TRIGGER IF NOT EXISTS usage_of_removed AFTER DELETE ON servers "
        "BEGIN DELETE FROM usage WHERE server = old.name; END"
    ),
)
"""The migration from each version to the next. The first table may exist without a version, after a
kill in between."""
VERSION: Final = len(MIGRATIONS)
ACTOR: Final = "CASE WHEN json_valid(entry) THEN json_extract(entry, '$.origin.actor') END"
"""The actor of a history entry; an index only serves a query with the same expression."""
