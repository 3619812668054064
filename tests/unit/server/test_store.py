"""What every store of snapshots owes, of SQLite's file and of a real Redis."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from redis_process import RedisProcess
from tenuto_server.errors import ConfigurationError, StoreError
from tenuto_server.store import SnapshotStore, SQLiteStore, StoredSession, open_store

LARGE = 2**64 - 1


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SnapshotStore]:
    if request.param == "sqlite":
        url = f"sqlite:{tmp_path / 'sessions.db'}"
    else:
        running: RedisProcess = request.getfixturevalue("redis")
        running.clear()
        url = running.url
    opened = open_store(url, lifetime_s=60.0)
    yield opened
    opened.close()


def kept(store: SnapshotStore, *ids: int) -> list[StoredSession]:
    return sorted(store.read(ids))


def test_what_is_written_is_read_back(store: SnapshotStore) -> None:
    sessions = [StoredSession(1, 0, b"\x00new"), StoredSession(LARGE, 7, b"old" * 1000)]
    assert store.write(sessions, []) == set()
    assert kept(store, LARGE, 1, 5) == sessions
    assert store.read([]) == [] and store.write([], []) == set()


def test_a_session_never_goes_back(store: SnapshotStore) -> None:
    store.write([StoredSession(1, 5, b"five"), StoredSession(2, 5, b"five")], [])
    overtaken = store.write([StoredSession(1, 4, b"four"), StoredSession(2, 6, b"six"), StoredSession(3, 1, b"x")], [])
    assert overtaken == {1}
    assert kept(store, 1, 2, 3) == [(1, 5, b"five"), (2, 6, b"six"), (3, 1, b"x")]
    assert store.write([StoredSession(1, 5, b"same")], []) == set()
    assert kept(store, 1) == [(1, 5, b"same")]


def test_a_session_that_has_ended_is_dropped_unless_another_server_went_on_with_it(store: SnapshotStore) -> None:
    store.write([StoredSession(1, 5, b"a"), StoredSession(2, 5, b"b"), StoredSession(LARGE, 0, b"c")], [])
    store.write([], [(1, 5), (2, 4), (LARGE, 9), (77, 1)])
    assert kept(store, 1, 2, LARGE) == [(2, 5, b"b")]


def test_a_session_begins_anew_where_what_was_kept_is_dropped_with_the_same_write(store: SnapshotStore) -> None:
    store.write([StoredSession(1, 5, b"old")], [])
    assert store.write([StoredSession(1, 0, b"new")], [(1, 2**62)]) == set()
    assert kept(store, 1) == [(1, 0, b"new")]


def test_a_file_lists_its_sessions_and_keeps_them_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sessions.db"
    first = SQLiteStore(path)
    first.write([StoredSession(i, 1, b"x") for i in (3, LARGE, 1)], [])
    first.close()
    assert SQLiteStore(path).session_ids() == [1, 3, LARGE]


def test_a_file_belongs_to_one_server_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    first = SQLiteStore(path)
    with pytest.raises(ConfigurationError, match="another server has it open"):
        SQLiteStore(path)
    first.close()
    SQLiteStore(path).close()


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 40, "another"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "sessions.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE photos (id INTEGER)")
        other.close()
    with pytest.raises(ConfigurationError, match="damaged or no file of sessions"):
        SQLiteStore(path)


def test_a_file_with_flipped_bytes_is_refused_or_gives_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    store = SQLiteStore(path)
    store.write([StoredSession(i, 1, b"x" * 3000) for i in range(1, 60)], [])
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="damaged"):
        SQLiteStore(path)


def test_a_disk_that_is_full_fails_the_write_and_keeps_what_was(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "sessions.db")
    store.write([StoredSession(1, 1, b"small")], [])
    store._db.execute("PRAGMA max_page_count = 4")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(StoreError, match="full"):
        store.write([StoredSession(i, 2, b"x" * 20_000) for i in (1, 2)], [])
    assert kept(store, 1, 2) == [(1, 1, b"small")]
    store._db.execute("PRAGMA max_page_count = 1000000")  # pyright: ignore[reportPrivateUsage]
    assert store.write([StoredSession(1, 2, b"x" * 20_000)], []) == set()


def test_redis_that_is_away_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    with RedisProcess(tmp_path) as running:
        store = open_store(running.url, 60.0)
        store.write([StoredSession(1, 1, b"kept")], [])
        running.kill()
        with pytest.raises(StoreError, match="redis"):
            store.write([StoredSession(1, 2, b"lost")], [])
        with pytest.raises(StoreError, match="redis"):
            store.read([1])
        running.start()
        assert kept(store, 1) == [(1, 1, b"kept")]
        store.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [("", "expected sqlite:PATH"), ("sqlite:", "expected sqlite:PATH"), ("postgres://x", "expected sqlite:PATH"),
     ("redis://localhost:port", "expected redis://HOST:PORT/DB")],
)  # fmt: skip
def test_an_address_that_makes_no_sense_says_what_was_expected(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        open_store(url, 60.0)
