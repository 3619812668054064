"""The session table under every interleaving of open, admit, commit, release, close and expire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import SlotPool
from tenuto_server.errors import Refusal
from tenuto_server.sessions import Admission, Door, ReplyStore, SessionOptions, SessionTable

OPTIONS = SessionOptions(pinned_version=0, seed=1, deterministic=False)
CAPACITY = 4


def admit(table: SessionTable, ids: list[int], indices: list[int], newest: int = 1, **options: Any) -> Admission:
    n = len(ids)
    starts = np.array(options.pop("starts", [False] * n))
    columns = np.array(ids, np.uint64), np.array(indices, np.uint64), starts
    return table.admit(*columns, options.pop("refused", {}), newest, options.pop("door", Door.OPEN))


def commit(table: SessionTable, admission: Admission, now_s: float = 0.0, reward: float = np.nan) -> Any:
    slots = admission.slots[admission.run]
    rewards = np.full(len(slots), reward, np.float32)
    return table.commit(slots, admission.episode_starts[admission.run], rewards, now_s)


def reasons(admission: Admission) -> dict[int, int]:
    return {row: refusal.reason for row, refusal in admission.refused.items()}


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(CAPACITY, server_epoch=9)


def test_a_step_under_way_is_joined_by_its_repetition_and_refuses_others(table: SessionTable) -> None:
    slot = table.open(7, OPTIONS, 0.0)
    first = admit(table, [7], [0])
    table.ticket[slot] = "the ticket"
    again, next_one = admit(table, [7], [0]), admit(table, [7], [1])
    assert first.run.tolist() == [0] and again.joined == {0: "the ticket"}
    assert reasons(next_one) == {0: pb.STEP_IN_FLIGHT}
    commit(table, first)
    replay = admit(table, [7], [0])
    assert (replay.run.size, replay.joined, replay.refused) == (0, {}, {})


def test_a_failed_step_leaves_the_session_where_it_was(table: SessionTable) -> None:
    slot = table.open(7, OPTIONS, 0.0)
    commit(table, admit(table, [7], [0], newest=1))
    failed = admit(table, [7], [1], newest=2, starts=[True])
    table.release(failed.slots, 5.0)
    assert (table.next_index[slot], table.version[slot], table.num_episodes[slot]) == (1, 1, 1)
    assert admit(table, [7], [1], newest=2).versions.tolist() == [1]


def test_a_session_keeps_its_version_until_the_episode_ends(table: SessionTable) -> None:
    table.open(7, OPTIONS, 0.0)
    versions: list[int] = []
    for index, (newest, start) in enumerate([(1, False), (2, False), (3, False), (3, True), (4, False)]):
        admission = admit(table, [7], [index], newest=newest, starts=[start])
        versions += admission.versions.tolist()
        commit(table, admission)
    assert versions == [1, 1, 1, 3, 3] and table.versions_in_use() == {3}


def test_a_pinned_session_keeps_its_version_over_episodes(table: SessionTable) -> None:
    table.open(7, SessionOptions(2, 1, False), 0.0)
    assert table.versions_in_use() == {2}
    for index in range(3):
        admission = admit(table, [7], [index], newest=5, starts=[True])
        assert admission.versions.tolist() == [2]
        commit(table, admission)


def test_a_version_is_in_use_while_a_step_that_begins_an_episode_with_it_runs(table: SessionTable) -> None:
    table.open(7, OPTIONS, 0.0)
    commit(table, admit(table, [7], [0], newest=1))
    running = admit(table, [7], [1], newest=2, starts=[True])
    assert table.versions_in_use() == {1, 2}
    commit(table, running)
    assert table.versions_in_use() == {2}


def test_capacity_is_refused_with_its_reason_and_freed_by_closing(table: SessionTable) -> None:
    slots = [table.open(i, OPTIONS, 0.0) for i in range(CAPACITY)]
    with pytest.raises(Refusal) as caught:
        table.open(99, OPTIONS, 0.0)
    assert caught.value.reason == pb.CAPACITY_REACHED
    table.end(slots[1], pb.SESSION_CLOSED)
    assert table.open(99, OPTIONS, 0.0) == slots[1]


def test_a_busy_session_is_never_idle_and_its_slot_outlives_its_closing(table: SessionTable) -> None:
    slot = table.open(7, OPTIONS, 0.0)
    running = admit(table, [7], [0])
    assert table.idle_slots(1e6, 1.0) == []
    table.end(slot, pb.SESSION_CLOSED)
    assert table.pool.num_leased == 1 and reasons(admit(table, [7], [0])) == {0: pb.SESSION_CLOSED}
    commit(table, running)
    assert table.pool.num_leased == 0


def test_idle_sessions_are_found_by_the_clock_that_is_handed_in(table: SessionTable) -> None:
    old, young = table.open(1, OPTIONS, 0.0), table.open(2, OPTIONS, 8.0)
    assert table.idle_slots(10.0, 5.0) == [old]
    table.end(old, pb.SESSION_EXPIRED)
    assert reasons(admit(table, [1], [0])) == {0: pb.SESSION_EXPIRED}
    assert table.idle_slots(13.5, 5.0) == [young]


def test_draining_finishes_episodes_but_begins_none(table: SessionTable) -> None:
    table.open(7, OPTIONS, 0.0)
    commit(table, admit(table, [7], [0]))
    assert reasons(admit(table, [7], [1], starts=[True], door=Door.NO_EPISODES)) == {0: pb.DRAINING}
    assert admit(table, [7], [1], door=Door.NO_EPISODES).run.tolist() == [0]


def test_rewards_belong_to_the_episode_of_the_action_before(table: SessionTable) -> None:
    table.open(7, OPTIONS, 0.0)
    finished: list[Any] = []
    for index, (start, reward) in enumerate([(True, 9.0), (False, 1.0), (True, 2.0), (False, np.nan), (True, np.nan)]):
        finished += commit(table, admit(table, [7], [index], newest=index + 1, starts=[start]), reward=reward)
    assert finished == [(1, 3.0)], "the second episode's rewards were never sent, so it has no return"


def test_a_session_that_ends_finishes_its_episode_only_with_the_last_reward(table: SessionTable) -> None:
    for session, last_reward, expected in ((7, 2.0, [(1, 3.5)]), (8, np.nan, []), (9, np.inf, [])):
        slot = table.open(session, OPTIONS, 0.0)
        commit(table, admit(table, [session], [0]))
        commit(table, admit(table, [session], [1]), reward=1.5)
        assert table.end(slot, pb.SESSION_CLOSED, last_reward)[1] == expected


def test_a_close_under_a_running_step_adds_the_last_reward_after_that_steps(table: SessionTable) -> None:
    slot = table.open(7, OPTIONS, 0.0)
    commit(table, admit(table, [7], [0]))
    applied = admit(table, [7], [1])
    assert table.end(slot, pb.SESSION_CLOSED, 2.0)[1] == []
    assert commit(table, applied, reward=1.5) == [(1, 3.5)]

    slot = table.open(8, OPTIONS, 0.0)
    commit(table, admit(table, [8], [0]))
    not_applied = admit(table, [8], [1])
    table.end(slot, pb.SESSION_CLOSED, 2.0)
    assert table.release(not_applied.slots, 0.0) == [(1, 2.0)]


@pytest.mark.parametrize("reward", [np.inf, -np.inf, np.nan])
def test_a_reward_that_is_not_finite_is_not_known(table: SessionTable, reward: float) -> None:
    table.open(7, OPTIONS, 0.0)
    commit(table, admit(table, [7], [0]))
    commit(table, admit(table, [7], [1]), reward=1.5)
    assert commit(table, admit(table, [7], [2], starts=[True]), reward=reward) == [(1, 1.5)]


def test_a_stored_reply_is_of_one_session_and_one_step() -> None:
    replies = ReplyStore(CAPACITY, (), np.dtype(np.int64), 2)
    replies.session_id[:2], replies.step_index[:2] = [7, 8], [3, 3]
    ids, indices, slots = np.array([7, 8, 9, 7], np.uint64), np.array([3, 4, 3, 3], np.uint64), np.array([0, 1, 1, 0])
    assert replies.overtaken(ids, indices, slots) == [1, 2]


def test_a_row_refused_earlier_touches_no_session(table: SessionTable) -> None:
    slots = [table.open(i, OPTIONS, 0.0) for i in (1, 2)]
    refusal = Refusal(pb.OBSERVATION_NOT_FINITE, "nan")
    admission = admit(table, [1, 2], [0, 0], refused={0: refusal})
    assert admission.run.tolist() == [1] and table.busy[slots].tolist() == [False, True]
    assert admission.slots.tolist() == [CAPACITY, slots[1]]


def test_ended_sessions_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch, table: SessionTable) -> None:
    monkeypatch.setattr("tenuto_server.sessions.MAX_REMEMBERED", 3)
    for i in range(10, 15):
        table.end(table.open(i, OPTIONS, 0.0), pb.SESSION_CLOSED)
    assert [table.ended(i) is not None for i in range(10, 15)] == [False, False, True, True, True]
    assert reasons(admit(table, [10], [0])) == {0: pb.SESSION_UNKNOWN}


def told(refusal: Refusal) -> tuple[Any, ...]:
    """All that a caller can learn from a refusal."""
    return refusal.code, refusal.reason, str(refusal), refusal.metadata


def test_to_another_principal_a_session_is_as_unknown_as_one_that_never_was() -> None:
    def answers(table: SessionTable) -> list[Any]:
        """What bob is told about session 7 in every state that it can be in, alice's or nobody's."""
        heard: list[Any] = []

        def ask() -> None:
            mine = table.open(8, OPTIONS, 0.0, "bob")
            owners = np.full(2, table.owner_number("bob"), np.int32)
            for index in (0, 1, 2):
                columns = np.array([7, 8], np.uint64), np.full(2, index, np.uint64), np.zeros(2, np.bool_)
                admission = table.admit(*columns, {}, 1, Door.OPEN, owners)
                assert admission.slots[0] == CAPACITY and 0 not in admission.run and not admission.joined
                heard.append(told(admission.refused[0]))
                table.release(admission.slots[admission.run], 0.0)
            assert table.next_index[mine] == 0
            with pytest.raises(Refusal) as caught:
                table.find(7, "bob")
            heard.append(told(caught.value))
            heard.append((table.ended(7, "bob"), table.has(7, "bob"), table.session_ids("bob")))

        ask()
        if table.owner_number("alice") > 0:
            slot = table.find(7, "alice")
            number = np.full(1, table.owner_number("alice"), np.int32)
            running = table.admit(
                np.array([7], np.uint64), np.array([0], np.uint64), np.ones(1, np.bool_), {}, 1, Door.OPEN, number
            )
            table.ticket[slot] = "alice's ticket"
            ask()
            commit(table, running)
            ask()
            table.end(slot, pb.SESSION_CLOSED)
        else:
            ask()
            ask()
        ask()
        return heard

    with_session = SessionTable(CAPACITY, server_epoch=9)
    with_session.open(7, OPTIONS, 0.0, "alice")
    without = SessionTable(CAPACITY, server_epoch=9)
    without.open(9, OPTIONS, 0.0, "")
    assert answers(with_session) == answers(without)


def test_a_principal_without_a_session_is_told_of_none(table: SessionTable) -> None:
    table.open(7, OPTIONS, 0.0, "alice")
    table.end(table.open(6, OPTIONS, 0.0, "alice"), pb.SESSION_CLOSED)
    nobody = np.full(3, table.owner_number("bob"), np.int32)
    columns = np.array([6, 7, 8], np.uint64), np.zeros(3, np.uint64), np.zeros(3, np.bool_)
    refused = table.admit(*columns, {}, 1, Door.OPEN, nobody).refused
    assert {row: refusal.reason for row, refusal in refused.items()} == dict.fromkeys(range(3), pb.SESSION_UNKNOWN)


@pytest.mark.parametrize("ended", [False, True])
def test_an_id_of_somebody_else_cannot_be_opened_and_tells_nothing_else(table: SessionTable, ended: bool) -> None:
    slot = table.open(7, OPTIONS, 0.0, "alice")
    if ended:
        table.end(slot, pb.SESSION_EXPIRED)
    with pytest.raises(Refusal) as others:
        table.open(7, OPTIONS, 0.0, "bob")
    used = table.open(5, OPTIONS, 0.0, "bob")
    table.next_index[used] = 3
    with pytest.raises(Refusal) as own:
        table.open(5, OPTIONS, 0.0, "bob")
    assert told(others.value) == tuple(
        part.replace("session 5", "session 7") if isinstance(part, str) else part for part in told(own.value)
    )


def test_owners_see_their_own_sessions_and_who_may_see_all_sees_all(table: SessionTable) -> None:
    for session_id, owner in ((3, "alice"), (1, "bob"), (2, "alice")):
        table.open(session_id, OPTIONS, 0.0, owner)
    assert [table.session_ids(owner) for owner in ("alice", "bob", "carol", None)] == [[2, 3], [1], [], [1, 2, 3]]
    assert table.owner_name(table.find(2, None)) == "alice"
    reused = table.find(1, "bob")
    table.end(reused, pb.SESSION_CLOSED)
    assert table.open(4, OPTIONS, 0.0, "carol") == reused and table.owner_name(reused) == "carol"


def test_a_slot_changes_its_generation_with_its_owner() -> None:
    pool = SlotPool(2)
    slot = pool.lease()
    assert slot is not None
    slots, generations = np.array([slot]), pool.generation[[slot]].copy()
    pool.require_current(slots, generations)
    pool.release(slot)
    with pytest.raises(AssertionError, match="changed hands"):
        pool.require_current(slots, generations)
    assert pool.lease() == slot
    with pytest.raises(AssertionError, match="changed hands"):
        pool.require_current(slots, generations)
    with pytest.raises(AssertionError, match="not leased"):
        pool.release(1 - slot)


class SessionTableMachine(RuleBasedStateMachine):
    """Compares the table with a plain dictionary of sessions, whatever the order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SessionTable(CAPACITY, 1)
        self.expected: dict[int, int] = {}
        self.running: list[tuple[int, Admission]] = []
        self.closing: set[int] = set()
        self.ids = 0
        self.now_s = 0.0

    @rule()
    def open(self) -> None:
        self.ids += 1
        full = len(self.expected) + len(self.closing) == CAPACITY
        try:
            self.table.open(self.ids, OPTIONS, self.now_s)
            assert not full
            self.expected[self.ids] = 0
        except Refusal as refusal:
            assert full and refusal.reason == pb.CAPACITY_REACHED

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), offset=st.sampled_from([0, 0, 0, -1, 1]), start=st.booleans())
    def step(self, data: st.DataObject, offset: int, start: bool) -> None:
        session = data.draw(st.sampled_from(sorted(self.expected)))
        busy = {s for s, _ in self.running}
        index = max(0, self.expected[session] + offset)
        slot = self.table.find(session)
        admission = admit(self.table, [session], [index], starts=[start])
        if admission.run.size:
            assert session not in busy and index == self.expected[session]
            self.table.ticket[slot] = f"ticket of {session}"
            self.running.append((session, admission))
        elif admission.joined:
            assert session in busy and admission.joined == {0: f"ticket of {session}"}
        elif admission.refused:
            assert session in busy or index not in (self.expected[session], self.expected[session] - 1)
        else:
            assert index == self.expected[session] - 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), succeeded=st.booleans())
    def settle(self, data: st.DataObject, succeeded: bool) -> None:
        session, admission = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if succeeded:
            commit(self.table, admission, self.now_s)
        else:
            self.table.release(admission.slots, self.now_s)
        if session in self.expected:
            self.expected[session] += succeeded
        self.closing.discard(session)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.expected)))
        ended, _ = self.table.end(self.table.find(session), pb.SESSION_CLOSED)
        assert ended.num_steps == self.expected.pop(session)
        if session in {s for s, _ in self.running}:
            self.closing.add(session)

    @rule(seconds=st.floats(0, 4))
    def expire(self, seconds: float) -> None:
        self.now_s += seconds
        for slot in self.table.idle_slots(self.now_s, 3.0):
            session = int(self.table.session_id[slot])
            assert session not in {s for s, _ in self.running}
            self.table.end(slot, pb.SESSION_EXPIRED)
            del self.expected[session]

    @invariant()
    def free_and_leased_slots_add_up(self) -> None:
        pool = self.table.pool
        assert pool.num_leased == len(self.expected) + len(self.closing) == int(pool.leased.sum())
        assert self.table.session_ids() == sorted(self.expected)

    @invariant()
    def every_session_is_where_it_should_be(self) -> None:
        slots = [self.table.find(session) for session in self.expected]
        assert len(set(slots)) == len(slots)
        for slot, (session, steps) in zip(slots, self.expected.items(), strict=True):
            assert self.table.session_id[slot] == session and self.table.next_index[slot] == steps


TestSessionTable = SessionTableMachine.TestCase
TestSessionTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
