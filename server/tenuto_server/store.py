"""Where snapshots of sessions are kept while their server is gone: the interface, and a file of SQLite's.

A store knows nothing of sessions but their ids and how many steps they have taken. It never goes back: of two snapshots
of a session the one with more steps stays, whoever writes last. It has one client, so one is a part of the other.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tenuto_server.errors import ConfigurationError, StoreError

_SCHEMA_VERSION = 1
_SCHEMA = "CREATE TABLE session (id INTEGER PRIMARY KEY, num_steps INTEGER NOT NULL, snapshot BLOB NOT NULL)"


class StoredSession(NamedTuple):
    """A session's snapshot in bytes, a SealedSnapshot."""

    session_id: int
    num_steps: int
    snapshot: bytes


class SnapshotStore(Protocol):
    """Its methods block; they are called by one thread at a time. All but close raise StoreError, and may be tried
    again.
    """

    is_shared: bool
    """Whether other servers use it too. Sessions of one that is not are all this server's."""

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        """Drop the sessions that have ended, pairs of id and number of steps, then keep these snapshots. All or none,
        and on disk when it returns. Returns the sessions of which the store knows more steps, which stay as they were.
        """
        ...

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        """Return those of some sessions that are kept."""
        ...

    def session_ids(self) -> list[int]:
        """Return the ids of all sessions that are kept, ascending. Only of a store that is not shared."""
        ...

    def close(self) -> None:
        """Give it up."""
        ...


class SQLiteStore:
    """One file, which one server at a time has. Raises ConfigurationError where that cannot be had."""

    is_shared = False

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What sessions remember is their owners' alone. The files beside it get its mode.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            # Serialised by its owner, not bound to the thread that opens it.
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"durability: {path} cannot be opened ({error})") from error
        try:
            self._open()
        except sqlite3.Error as error:
            self._db.close()
            taken = "database is locked" in str(error)
            reason = "another server has it open" if taken else f"it is damaged or no file of sessions: {error}"
            raise ConfigurationError(f"durability: {path} cannot be used: {reason}") from error

    def _open(self) -> None:
        # Held until the process ends, however it ends.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN IMMEDIATE")
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version == 0 and not tables:
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif version != _SCHEMA_VERSION or tables != {"session"}:
            raise sqlite3.DatabaseError(f"got tables {sorted(tables)} of version {version}")
        self._db.execute("COMMIT")
        if (damage := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(damage)

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        """See SnapshotStore: one transaction."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "DELETE FROM session WHERE id = ? AND num_steps <= ?", [(_signed(i), n) for i, n in ended]
                )
                overtaken = self._put(sessions)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        return overtaken

    def _put(self, sessions: Sequence[StoredSession]) -> set[int]:
        before = self._db.total_changes
        self._db.executemany(
            "INSERT INTO session VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " num_steps = excluded.num_steps, snapshot = excluded.snapshot WHERE num_steps <= excluded.num_steps",
            [(_signed(s.session_id), s.num_steps, s.snapshot) for s in sessions],
        )
        if self._db.total_changes - before == len(sessions):
            return set()
        query = "SELECT 1 FROM session WHERE id = ? AND num_steps > ?"
        asked = ((s.session_id, (_signed(s.session_id), s.num_steps)) for s in sessions)
        return {session_id for session_id, key in asked if self._db.execute(query, key).fetchone()}

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        """See SnapshotStore."""
        found: list[StoredSession] = []
        try:
            for session_id in session_ids:
                query = "SELECT num_steps, snapshot FROM session WHERE id = ?"
                row = self._db.execute(query, (_signed(session_id),)).fetchone()
                if row is not None:
                    found.append(StoredSession(session_id, *row))
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        return found

    def session_ids(self) -> list[int]:
        """See SnapshotStore."""
        try:
            return sorted(i % 2**64 for (i,) in self._db.execute("SELECT id FROM session"))
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error

    def close(self) -> None:
        """See SnapshotStore."""
        self._db.close()


def _signed(session_id: int) -> int:
    """SQLite's integers have a sign."""
    return session_id - 2**64 if session_id >= 2**63 else session_id


def open_store(url: str, lifetime_s: float) -> SnapshotStore:
    """Open ``sqlite:PATH`` or ``redis://HOST:PORT/DB`` (or ``rediss:``). ``lifetime_s``: a shared store forgets a
    session that nobody has written for as long. Raises ConfigurationError.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        return SQLiteStore(Path(rest))
    if scheme in ("redis", "rediss", "unix"):
        from tenuto_server.redis_store import RedisStore

        return RedisStore(url, lifetime_s)
    # The rest may hold a password.
    message = "expected sqlite:PATH or redis://HOST:PORT/DB"
    raise ConfigurationError(f"durability: got {scheme!r} before the first colon, or nothing after it, {message}")
