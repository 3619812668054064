"""Sessions that are looked for in a store which other servers use too."""

from __future__ import annotations

import asyncio

import pytest

from shared_store import Library
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal
from tenuto_server.sessions import SessionOptions


async def test_a_lookup_that_fails_is_no_answer_to_those_who_waited_for_it() -> None:
    library = Library()
    library.put(7)
    library.gate.clear()
    library.shelf.fails = True
    first = asyncio.create_task(library.durability.fetch([7]))
    second = asyncio.create_task(library.durability.fetch([7]))
    await asyncio.sleep(0)
    library.gate.set()
    with pytest.raises(Refusal) as refused:
        await first
    library.shelf.fails = False
    await second
    assert refused.value.reason == pb.STORE_UNAVAILABLE
    assert 7 in library.policy.sessions and library.shelf.num_reads == 2


async def test_a_caller_who_leaves_takes_nobody_along() -> None:
    library = Library()
    library.put(7)
    library.gate.clear()
    first = asyncio.create_task(library.durability.fetch([7]))
    second = asyncio.create_task(library.durability.fetch([7]))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    library.gate.set()
    await second
    assert 7 in library.policy.sessions


async def test_a_session_twice_in_a_request_keeps_no_other_from_being_found() -> None:
    library = Library()
    library.put(8)
    await library.durability.fetch([7, 7, 8])
    await asyncio.wait_for(library.durability.fetch([8]), 10)
    assert 8 in library.policy.sessions


async def test_a_session_whose_policy_is_still_loaded_is_not_unknown() -> None:
    library = Library(is_served=False)
    library.put(7)
    with pytest.raises(Refusal) as refused:
        await library.durability.fetch([7])
    assert refused.value.reason == pb.STORE_UNAVAILABLE
    library.registry.add(library.policy)
    await library.durability.fetch([7])
    assert 7 in library.policy.sessions


async def test_a_session_that_was_idle_here_only_comes_back() -> None:
    library = Library()
    sessions = library.policy.sessions
    for session_id in (7, 8):
        sessions.end(sessions.open(session_id, SessionOptions(0, 0, False), 0.0), pb.SESSION_EXPIRED)
    library.put(7, num_steps=3)
    library.put(8)
    assert not library.registry.has_reached(7, 3) and library.registry.has_reached(8, 0)
    await library.durability.fetch([7, 8])
    assert 7 in sessions and sessions.next_index[sessions.slot_of(7)] == 3
    assert 8 not in sessions, "nobody went on with it: it has expired"


async def test_what_cannot_be_read_is_dropped_but_not_what_another_server_has_stored_since() -> None:
    library = Library()
    library.put(7, num_steps=3)
    library.shelf.kept[7] = library.shelf.kept[7]._replace(snapshot=b"torn")
    await library.durability.fetch([7])
    assert 7 not in library.policy.sessions
    library.durability.begin(7)
    await library.durability.flush()
    assert library.shelf.ended == [(7, 3)], "a store keeps what has more steps"


async def test_a_session_for_which_there_is_no_room_is_not_unknown() -> None:
    library = Library(capacity=1)
    sessions = library.policy.sessions
    slot = sessions.open(9, SessionOptions(0, 0, False), 0.0)
    library.put(7)
    with pytest.raises(Refusal) as refused:
        await library.durability.fetch([7])
    assert refused.value.reason == pb.CAPACITY_REACHED
    sessions.end(slot, pb.SESSION_CLOSED)
    await library.durability.fetch([7])
    assert 7 in sessions


async def test_a_restarted_server_restores_later_what_it_has_no_room_for() -> None:
    library = Library(capacity=1)
    library.shelf.is_shared = False
    library.put(7)
    library.put(8)
    await library.durability.prepare()
    await library.durability.restore()
    sessions = library.policy.sessions
    assert 7 in sessions and 8 not in sessions
    with pytest.raises(Refusal) as refused:
        await library.durability.fetch([8])
    assert refused.value.reason == pb.STORE_UNAVAILABLE
    sessions.end(sessions.slot_of(7), pb.SESSION_EXPIRED)
    await library.durability.restore()
    assert 8 in sessions


async def test_a_copy_that_went_on_while_it_was_written_is_not_dropped_as_old() -> None:
    library = Library()
    sessions = library.policy.sessions
    library.put(7, num_steps=3)
    await library.durability.fetch([7])
    slot = sessions.slot_of(7)
    sessions.next_index[slot], library.shelf.overtakes = 4, {7}
    library.gate.clear()
    writing = asyncio.create_task(library.durability.flush())
    await asyncio.sleep(0)
    sessions.next_index[slot] = 6
    library.gate.set()
    await writing
    assert 7 in sessions and sessions.num_changed() == 1
    await library.durability.flush()
    assert 7 not in sessions, "another server is further: it is read again when it is asked for"
