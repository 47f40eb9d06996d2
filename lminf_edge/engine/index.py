"""What is on disk: conversations, their tokens and their snapshots, in SQLite. The states themselves are files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lminf_edge.history import Tokens

VERSION = 1

_SCHEMA = """
CREATE TABLE conversations (name TEXT PRIMARY KEY, used REAL, n_tokens INTEGER, anchor TEXT) WITHOUT ROWID;
CREATE TABLE tokens (
    conversation TEXT REFERENCES conversations ON DELETE CASCADE, start INTEGER, data BLOB,
    PRIMARY KEY (conversation, start));
CREATE TABLE snapshots (
    name TEXT PRIMARY KEY, conversation TEXT REFERENCES conversations ON DELETE CASCADE,
    position INTEGER, n_rollback INTEGER, n_dropped INTEGER, n_sinks INTEGER, n_bytes INTEGER) WITHOUT ROWID;
CREATE INDEX snapshots_of ON snapshots (conversation);
CREATE TABLE keys (
    snapshot TEXT REFERENCES snapshots ON DELETE CASCADE, key BLOB, n_tokens INTEGER,
    PRIMARY KEY (snapshot, key)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class SnapshotRow:
    name: str
    conversation: str
    position: int
    n_rollback: int
    n_dropped: int
    n_sinks: int
    n_bytes: int


class Index:
    """The database; all calls come from the thread that made it. Every call is one transaction."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it; one of another version is begun anew.

        Raises sqlite3.Error if it cannot be used, OperationalError if another process uses it.
        """
        self._db = sqlite3.connect(path, timeout=1, isolation_level=None)
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one process at a time: it deletes files it does not know
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # survives the process, if not always the power
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA secure_delete = ON")  # what was deleted cannot be read from the file
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            tables = self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for table in ("keys", "snapshots", "tokens", "conversations"):
                    if (table,) in tables:
                        self._db.execute(f"DROP TABLE {table}")
                for statement in _SCHEMA.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def conversations(self) -> Iterator[tuple[str, float, int, int | None]]:
        """Name, last use in seconds since 1970, number of tokens, anchor."""
        for name, used, n_tokens, anchor in self._db.execute("SELECT * FROM conversations"):
            yield name, used, n_tokens, None if anchor is None else int(anchor)

    def snapshots(self) -> Iterator[tuple[SnapshotRow, dict[bytes, int]]]:
        """Every snapshot, with its keys and how many tokens they stand for."""
        keys: dict[str, dict[bytes, int]] = {}
        for snapshot, key, n_tokens in self._db.execute("SELECT * FROM keys"):
            keys.setdefault(snapshot, {})[key] = n_tokens
        for row in self._db.execute("SELECT * FROM snapshots"):
            yield SnapshotRow(*row), keys.get(row[0], {})

    def write_turn(self, name: str, used: float, anchor: int | None, n_kept: int, new: Tokens) -> None:
        """A conversation keeps its first n_kept tokens and goes on with `new` (n_tokens,)."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET used = excluded.used, n_tokens = excluded.n_tokens, anchor = excluded.anchor",
                (name, used, n_kept + len(new), None if anchor is None else str(anchor)),
            )
            self._db.execute("DELETE FROM tokens WHERE conversation = ? AND start >= ?", (name, n_kept))
            last = self._db.execute(
                "SELECT start, data FROM tokens WHERE conversation = ? ORDER BY start DESC LIMIT 1", (name,)
            ).fetchone()
            if last is not None and last[0] + len(last[1]) // 4 > n_kept:
                self._db.execute(
                    "UPDATE tokens SET data = ? WHERE conversation = ? AND start = ?",
                    (last[1][: 4 * (n_kept - last[0])], name, last[0]),
                )
            if len(new):
                data = np.ascontiguousarray(new, dtype="<i4").tobytes()
                self._db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (name, n_kept, data))

    def tokens(self, name: str) -> Tokens:
        """All tokens of a conversation: int32 (n_tokens,)."""
        rows = self._db.execute("SELECT data FROM tokens WHERE conversation = ? ORDER BY start", (name,)).fetchall()
        return np.frombuffer(b"".join(data for (data,) in rows), dtype="<i4").astype(np.int32)

    def write_snapshot(self, row: SnapshotRow, keys: dict[bytes, int]) -> bool:
        """Its file is there already. False, and nothing is written, if its conversation has been deleted meanwhile."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            known = self._db.execute("SELECT 1 FROM conversations WHERE name = ?", (row.conversation,)).fetchone()
            if known is None:
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?)",
                (row.name, row.conversation, row.position, row.n_rollback, row.n_dropped, row.n_sinks, row.n_bytes),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", [(row.name, key, n) for key, n in keys.items()]
            )
        return True

    def delete_snapshot(self, name: str) -> None:
        self._db.execute("DELETE FROM snapshots WHERE name = ?", (name,))

    def delete_conversation(self, name: str) -> None:
        self._db.execute("DELETE FROM conversations WHERE name = ?", (name,))
