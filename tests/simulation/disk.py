"""What survives a server: snapshots in pages of memory, or in a real file of SQLite's.

Writes fail for a while, crash before and after their commit, and tear: what a crash leaves of a page may be half of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tenuto_server.errors import StoreError
from tenuto_server.store import SQLiteStore, StoredSession


class Disk:
    """One store's memory; the laws look into it. ``is_shared``: several servers use it at once, as Redis."""

    def __init__(self, world: Any, *, is_shared: bool) -> None:
        self.world, self.is_shared = world, is_shared
        self.pages: dict[int, StoredSession] = {}
        self.fails = False
        """Whether it is full just now."""
        self.tears = False
        """Whether the next crash tears what is being written."""
        self.torn: set[int] = set()
        """Sessions of which a page was ever torn."""

    def num_steps(self, session_id: int) -> int:
        """Steps of a session that are safe; -1: none is known."""
        page = self.pages.get(session_id)
        return -1 if page is None else page.num_steps

    def open(self) -> Store:
        return Store(self)

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        """Commit, as SnapshotStore says."""
        for session_id, num_steps in ended:
            if self.num_steps(session_id) <= num_steps:
                self.pages.pop(session_id, None)
        overtaken: set[int] = set()
        for session in sessions:
            if self.num_steps(session.session_id) > session.num_steps:
                overtaken.add(session.session_id)
            else:
                self.pages[session.session_id] = session
        return overtaken

    def tear(self, sessions: Sequence[StoredSession]) -> None:
        """Write some of the pages, and one of them badly."""
        rng = self.world.rng_of("disk")
        for session in sessions[: rng.randint(1, len(sessions))]:
            data = bytearray(session.snapshot)
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            self.pages[session.session_id] = session._replace(snapshot=bytes(data))
            self.torn.add(session.session_id)
            self.world.count("torn page")

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        return [self.pages[i] for i in session_ids if i in self.pages]

    def session_ids(self) -> list[int]:
        return sorted(self.pages)

    def close(self) -> None:
        """Let go of the file, where there is one."""


class FileDisk(Disk):
    """The production store on a file. Shared, it has the rules of SQLite and the servers of Redis."""

    def __init__(self, world: Any, path: Path, *, is_shared: bool) -> None:
        super().__init__(world, is_shared=is_shared)
        self._path = path
        self._store: SQLiteStore | None = SQLiteStore(path) if is_shared else None
        self._looking: sqlite3.Connection | None = None

    def open(self) -> Store:
        if not self.is_shared:
            if self._store is not None:
                self._store.close()
            self._store = SQLiteStore(self._path)
        return Store(self)

    def num_steps(self, session_id: int) -> int:
        assert self._store is not None
        found = self._store.read([session_id])
        return found[0].num_steps if found else -1

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        assert self._store is not None
        return self._store.write(sessions, ended)

    def tear(self, sessions: Sequence[StoredSession]) -> None:
        """SQLite's own log is what tears here: nothing of the transaction is there."""

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        assert self._store is not None
        return self._store.read(session_ids)

    def session_ids(self) -> list[int]:
        assert self._store is not None
        return self._store.session_ids()

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


class Store:
    """A SnapshotStore: one process's way to the disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._world = disk, disk.world
        self.is_shared = disk.is_shared

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        world, disk = self._world, self._disk
        world.require_alive()
        if disk.fails:
            world.count("write failed")
            raise StoreError("disk: no space left")
        if disk.tears and sessions and world.failpoint("before_snapshot_commit", only_look=True):
            disk.tear(sessions)
        world.failpoint("before_snapshot_commit")
        overtaken = disk.write(sessions, list(ended))
        world.trace("committed", [(s.session_id % 10000, s.num_steps) for s in sessions])
        world.failpoint("after_snapshot_commit")
        return overtaken

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        self._world.require_alive()
        if self._disk.fails:
            raise StoreError("disk: input/output error")
        return self._disk.read(session_ids)

    def session_ids(self) -> list[int]:
        return self._disk.session_ids()

    def close(self) -> None:
        """Its process ends."""
