"""Sessions that end, come and go while something else is under way with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from shared_store import Engineless, Library
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal
from tenuto_server.sessions import SessionOptions, SessionTable
from tenuto_server.snapshots import from_stored
from tenuto_server.store import SQLiteStore

OPTIONS = SessionOptions(0, 1, False)


class Gate(Engineless):
    """An engine whose jobs run when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_shut = False
        self._held: list[Any] = []

    def submit(self, job: Any, done: Any, *, brief: bool = False) -> None:
        def run() -> None:
            try:
                result, error = job(), None
            except Exception as caught:  # noqa: BLE001
                result, error = None, caught
            done(result, error)

        if self.is_shut:
            self._held.append(run)
        else:
            run()

    def open(self) -> None:
        self.is_shut = False
        held, self._held = self._held, []
        for run in held:
            run()


def library() -> tuple[Library, Gate]:
    made, gate = Library(), Gate()
    made.engine = made.durability._snapshotter._engine = gate
    return made, gate


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_session_whose_state_does_not_reach_the_device_is_not_here() -> None:
    shared, _ = library()
    shared.put(7, 100)

    def fail(slot: int, row: Any) -> None:
        raise torch.OutOfMemoryError("no room for a row")

    unharmed, shared.policy.arena.write_row = shared.policy.arena.write_row, fail
    with pytest.raises(Refusal) as refused:
        await shared.durability.fetch([7])
    assert refused.value.reason == pb.STORE_UNAVAILABLE and 7 not in shared.policy.sessions
    shared.policy.arena.write_row = unharmed
    await shared.durability.fetch([7])
    assert 7 in shared.policy.sessions and not shared.policy.sessions.is_arriving(7)


async def test_a_session_is_not_written_before_its_state_is_there() -> None:
    shared, gate = library()
    shared.put(7, 100)
    sealed = from_stored(shared.shelf.kept[7].snapshot)
    gate.is_shut = True
    adopting = asyncio.create_task(shared.durability._snapshotter.adopt(sealed))
    await turns()
    sessions = shared.policy.sessions
    assert sessions.is_arriving(7) and not len(sessions.changed_slots())
    gate.open()
    await adopting
    assert sessions.changed_slots().tolist() == [sessions.slot_of(7)]


async def test_a_slot_that_changes_hands_while_a_session_arrives_keeps_what_is_its_new_ones() -> None:
    shared, gate = library()
    shared.put(7, 100)
    gate.is_shut = True
    fetching = asyncio.create_task(shared.durability.fetch([7]))
    await turns()
    sessions = shared.policy.sessions
    assert sessions.is_arriving(7)
    slot = sessions.slot_of(7)
    sessions.end(slot, pb.SESSION_CLOSED)
    assert sessions.open(8, OPTIONS, 1.0) == slot
    gate.open()
    await fetching
    assert sessions.durable_index[slot] == -1 and not sessions.exported[slot]
    assert sessions.changed_slots().tolist() == [slot]


async def test_a_session_that_is_closed_while_it_is_written_does_not_come_back(tmp_path: Path) -> None:
    shared, gate = library()
    store = shared.durability._store = SQLiteStore(tmp_path / "sessions.db")
    sessions = shared.policy.sessions
    slot = sessions.open(7, OPTIONS, 1.0)
    gate.is_shut = True
    flushing = asyncio.create_task(shared.durability.flush())
    await turns()
    gate.open()
    # In the same turn of the loop: the copy is made, and nobody has written it yet.
    sessions.end(slot, pb.SESSION_CLOSED)
    shared.durability.end(7, 1)
    assert await flushing and store.session_ids() == []
    assert await shared.durability.flush() and store.session_ids() == []
    store.close()


async def test_whatever_a_store_fails_with_the_ended_sessions_are_dropped_from_it_later() -> None:
    shared, _ = library()

    class Broken:
        is_shared = True

        def write(self, sessions: Any, ended: Any) -> set[int]:
            raise OSError("not foreseen")

    shared.durability._store = Broken()
    shared.durability.end(7, 4)
    assert not await shared.durability.flush()
    assert shared.durability._ended == {7: 4}


def test_a_session_with_a_step_under_way_is_no_older_copy() -> None:
    sessions = SessionTable(capacity=2, server_epoch=1)
    slot = sessions.open(7, OPTIONS, 1.0)
    sessions.exported[slot] = sessions.busy[slot] = True
    assert not sessions.is_older_copy(7, 50)
    sessions.busy[slot] = False
    assert sessions.is_older_copy(7, 50)
