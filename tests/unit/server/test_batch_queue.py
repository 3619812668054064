"""The rules of waiting: shares of parties, what is let in, and that no row is lost."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.batch_queue import Batch, BatchQueue, Ticket, TicketState
from tenuto_server.errors import Refusal


def ticket(party: str = "", num_rows: int = 1, checkpoint: str = "v1", deadline_s: float = inf) -> Ticket:
    return Ticket(checkpoint, num_rows, None, 0.0, deadline_s, party=party)


def put(queue: BatchQueue, party: str = "", num_rows: int = 1, count: int = 1, **more: object) -> list[Ticket]:
    tickets = [ticket(party, num_rows, **more) for _ in range(count)]  # type: ignore[arg-type]
    for one in tickets:
        queue.put(one)
    return tickets


def measured(queue: BatchQueue, rows_per_s: float) -> BatchQueue:
    """The queue, after its device has computed full batches at this speed."""
    queue.finished(Batch("v1", num_rows=queue.max_batch), queue.max_batch / rows_per_s)
    return queue


def refusal(queue: BatchQueue, num_rows: int, party: str = "", remaining_s: float = inf) -> Refusal | None:
    try:
        queue.require_room(num_rows, party, remaining_s)
    except Refusal as refused:
        assert refused.reason == pb.QUEUE_FULL
        return refused
    return None


# ---------------------------------------------------------------------------------------------------- fair shares


def test_a_modest_party_is_in_the_next_batch_behind_thousands_of_another() -> None:
    queue = BatchQueue(8, 0.0, 100_000)
    put(queue, "greedy", 2, count=2_000)
    queue.take(0.0)
    [modest] = put(queue, "modest")
    assert modest in queue.take(0.0)[0].tickets


def test_parties_that_both_wait_get_equal_rows_whatever_the_size_of_their_messages() -> None:
    queue = BatchQueue(8, 0.0, 100_000)
    put(queue, "large", 8, count=50)
    put(queue, "small", 1, count=400)
    had = {"large": 0, "small": 0}
    for _ in range(40):
        for one in queue.take(0.0)[0].tickets:
            had[one.party] += one.num_rows
        assert abs(had["large"] - had["small"]) <= 8


def test_nobody_saves_up_for_later_by_waiting_for_nothing() -> None:
    queue = BatchQueue(4, 0.0, 100_000)
    put(queue, "old", count=400)
    for _ in range(50):
        queue.take(0.0)
    put(queue, "new", count=400)
    parties = [one.party for _ in range(10) for one in queue.take(0.0)[0].tickets]
    assert 18 <= parties.count("new") <= 22


def test_a_party_cannot_push_another_back_with_a_checkpoint_of_its_own() -> None:
    queue = BatchQueue(4, 0.0, 100_000)
    put(queue, "greedy", count=400, checkpoint="old")
    queue.take(0.0)
    [modest] = put(queue, "modest", checkpoint="new")
    assert queue.take(0.0)[0].tickets == [modest]


def test_the_tickets_of_a_batch_are_in_the_order_in_which_they_came() -> None:
    queue = BatchQueue(6, 0.0, 100)
    tickets = [put(queue, party)[0] for party in "aabbcacb"]
    taken = queue.take(0.0)[0].tickets
    assert taken == sorted(taken, key=tickets.index) and {one.party for one in taken} == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------ what is let in


def test_what_would_wait_longer_than_the_target_is_refused_with_the_time_until_it_would_not() -> None:
    queue = measured(BatchQueue(10, 0.0, 10_000, max_delay_s=0.5), 100.0)
    put(queue, num_rows=10, count=4)
    assert refusal(queue, 10) is None
    put(queue, num_rows=10)
    refused = refusal(queue, 1)
    assert refused is not None and refused.retry_after_s == pytest.approx(0.5)


def test_what_fits_into_the_next_batch_is_let_in_however_slow_the_device_was() -> None:
    queue = measured(BatchQueue(10, 0.0, 10_000, max_delay_s=0.5), 0.001)
    put(queue, num_rows=9)
    assert refusal(queue, 1) is None and refusal(queue, 2) is not None


def test_before_anything_was_measured_only_the_rows_are_counted() -> None:
    queue = BatchQueue(10, 0.0, 100, max_delay_s=0.5)
    put(queue, num_rows=10, count=10)
    refused = refusal(queue, 1)
    assert refused is not None and refused.retry_after_s == 1.0


def test_what_would_be_reached_after_its_deadline_is_refused() -> None:
    queue = measured(BatchQueue(10, 0.0, 10_000, max_delay_s=5.0), 100.0)
    put(queue, num_rows=10, count=10)
    assert refusal(queue, 1, remaining_s=0.9) is not None
    assert refusal(queue, 1, remaining_s=1.1) is None
    # Another party's row comes before almost all of these.
    assert refusal(queue, 1, "modest", remaining_s=0.1) is None


def test_a_full_queue_has_room_for_whoever_is_below_its_share() -> None:
    queue = measured(BatchQueue(10, 0.0, 10_000, max_delay_s=1.0), 100.0)
    while refusal(queue, 5, "greedy") is None:
        put(queue, "greedy", 5)
    assert queue.num_rows == 100
    while refusal(queue, 5, "modest") is None:
        put(queue, "modest", 5)
    assert queue.num_rows == 150
    assert refusal(queue, 5, "greedy") is not None


def test_a_device_that_slows_down_does_not_shut_out_whoever_has_nothing_waiting() -> None:
    queue = measured(BatchQueue(10, 0.0, 10_000, max_delay_s=1.0), 1_000.0)
    put(queue, "greedy", 10, count=100)
    for _ in range(30):
        queue.finished(Batch("v1", num_rows=10), 0.1)
    assert queue.rows_per_s == pytest.approx(100, rel=0.1)
    assert refusal(queue, 1, "greedy") is not None and refusal(queue, 10, "modest") is None


def test_parties_however_many_fill_no_more_than_twice_the_rows() -> None:
    queue = BatchQueue(10, 0.0, 100)
    for party in range(1_000):
        if refusal(queue, 1, str(party)) is None:
            put(queue, str(party))
    assert queue.num_rows == 200


def test_small_batches_say_nothing_about_the_speed_of_the_device() -> None:
    queue = BatchQueue(256, 0.0, 100_000, max_delay_s=0.5)
    queue.finished(Batch("v1", num_rows=1), 0.003)
    assert queue.rows_per_s is None
    queue.finished(Batch("v1", num_rows=1, num_left=1), 0.01)
    assert queue.rows_per_s == pytest.approx(100)


# --------------------------------------------------------------------------------------------------------- always


Action = tuple[str, int, str, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "take", "remove", "expire"]),
        st.integers(1, 8),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
    ),
    max_size=80,
)


@given(ACTIONS, st.sampled_from([0.0, 5.0]))
def test_every_row_leaves_once_and_the_counts_are_right(actions: list[Action], max_wait_s: float) -> None:
    queue = BatchQueue(8, max_wait_s, 1_000)
    waiting: list[Ticket] = []
    now_s = 0.0
    for kind, num_rows, party, number in actions:
        now_s += 1.0
        left: list[Ticket] = []
        if kind == "put":
            waiting += put(queue, party, num_rows, checkpoint=f"v{number % 2}", deadline_s=now_s + 10 * number + 1)
        elif kind == "take" and waiting:
            batch, late = queue.take(now_s)
            assert batch.num_rows == sum(one.num_rows for one in batch.tickets) <= 8
            assert batch.tickets or late
            assert all(one.deadline_s > now_s and one.state is TicketState.RUNNING for one in batch.tickets)
            assert all(one.deadline_s <= now_s and one.state is TicketState.QUEUED for one in late)
            assert all(one.checkpoint == batch.checkpoint for one in [*batch.tickets, *late])
            assert all(a.number < b.number for a, b in pairwise(batch.tickets))
            left = [*batch.tickets, *late]
        elif kind == "remove" and waiting:
            left = [waiting[number % len(waiting)]]
            queue.remove(left[0])
        elif kind == "expire":
            left = queue.expire(now_s)
            assert set(left) == {one for one in waiting if one.deadline_s <= now_s}
        assert len(set(left)) == len(left)
        waiting = [one for one in waiting if one not in left]
        assert queue.num_rows == sum(one.num_rows for one in waiting) and len(queue) == len(waiting)
        assert queue.num_parties == len({one.party for one in waiting})
        assert (queue.ready_at() is None) == (not waiting)
    assert set(queue.drain()) == set(waiting) and len(queue) == queue.num_rows == queue.num_parties == 0


@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=30), min_size=2, max_size=6))
def test_nobody_starves_while_it_waits_it_has_had_as_much_as_any_other(sizes: list[list[int]]) -> None:
    queue = BatchQueue(8, 0.0, 10_000)
    left = {str(party): sum(rows) for party, rows in enumerate(sizes)}
    had = dict.fromkeys(left, 0)
    for party, rows in enumerate(sizes):
        for num_rows in rows:
            put(queue, str(party), num_rows)
    while len(queue):
        for one in queue.take(0.0)[0].tickets:
            had[one.party] += one.num_rows
            left[one.party] -= one.num_rows
        for party in (party for party in left if left[party]):
            # Two messages: one of each of the two that are compared.
            assert max(had.values()) - had[party] <= 16


@given(st.lists(st.integers(1, 8), max_size=60), st.integers(1, 8))
def test_whoever_comes_to_a_busy_queue_is_served_by_the_second_batch(backlog: list[int], num_rows: int) -> None:
    queue = BatchQueue(8, 0.0, 10_000)
    for size in backlog:
        put(queue, "greedy", size)
    for _ in range(len(backlog) // 4):
        if len(queue):
            queue.take(0.0)
    [mine] = put(queue, "modest", num_rows)
    batches = [queue.take(0.0)[0] for _ in range(2) if len(queue)]
    assert any(mine in batch.tickets for batch in batches)
