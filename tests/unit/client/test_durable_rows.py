"""Durable sessions of N environments that step together: each row goes on as an undisturbed run would."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durable_server import DurableServer, Fate, Held, undisturbed
from tenuto_client import (
    DrainingError,
    ReplayMismatchError,
    RowsError,
    SessionGoneError,
    SessionLostError,
    StepIndexError,
    TenutoError,
    VectorStepResult,
    VersionUnknownError,
)
from tenuto_client import durable as durable_module
from tenuto_client.effects import Call
from tenuto_client.session_rows import SessionRows

N = 3
FATES = st.lists(
    st.tuples(st.sampled_from([fate for fate in Fate if fate is not Fate.CRASH_COLD]), st.integers(1, 4)), max_size=20
).map(lambda runs: [fate for fate, length in runs for _ in range(length)])
ROW = st.tuples(st.integers(0, 2), st.booleans(), st.booleans())
"""Mode, whether an episode begins, whether the row steps at all."""
PLAYS = st.lists(st.tuples(*[ROW] * N), min_size=1, max_size=8)


def observations(modes: list[int]) -> dict[str, Any]:
    return {"camera": np.zeros((len(modes), 2), np.float32), "mode": np.array(modes)}


def step(server: DurableServer, rows: SessionRows, *modes: int, **given: Any) -> VectorStepResult:
    """Without ``raise_errors`` an error is raised."""
    return server.drive(
        rows.step(
            observations(list(modes)),
            given.get("starts"),
            given.get("rewards"),
            given.get("mask"),
            given.get("raise_errors", True),
        )
    )


@given(PLAYS, FATES, st.sampled_from([0.3, 5.0]), st.sampled_from([2, 256]))
@settings(deadline=None, max_examples=200)
def test_nothing_that_happens_to_servers_changes_an_action_of_a_row(
    plays: list[list[tuple[int, bool, bool]]], fates: list[Fate], timeout_s: float, max_batch_rows: int
) -> None:
    server = DurableServer(fates)
    server.policy.limits.max_batch_rows = max_batch_rows
    rows = SessionRows(server.options(timeout_s=timeout_s, seed=10), N)
    while True:
        try:
            server.drive(rows.connect())
            break
        except TenutoError as error:
            assert not isinstance(error, SessionGoneError)
    ids = rows.session_ids.tolist()
    played: list[list[tuple[int, bool]]] = [[] for _ in range(N)]
    answers: list[list[tuple[int, int, int]]] = [[] for _ in range(N)]
    for play in plays:
        mask = np.array([steps for _, _, steps in play])
        starts = np.array([begins for _, begins, _ in play])
        for row, (mode, begins, steps) in enumerate(play):
            if steps:
                played[row].append((mode, begins))
        while mask.any():
            modes = [mode for mode, _, _ in play]
            result = step(server, rows, *modes, starts=starts & mask, mask=mask, raise_errors=False)
            for row, error in result.errors.items():
                assert not isinstance(error, SessionGoneError), (row, error)
            for row in np.flatnonzero(mask).tolist():
                if row not in result.errors:
                    mask[row] = False
                    action, version = int(result.actions[row]), int(result.versions[row])
                    answers[row].append((int(result.step_indices[row]), action, version))
    assert rows.session_ids.tolist() == ids
    for row in range(N):
        versions = [version for _, _, version in answers[row]]
        actions = undisturbed(10 + row, played[row], versions)
        assert [(index, action) for index, action, _ in answers[row]] == list(enumerate(actions))
        assert versions == sorted(versions)


def started(server: DurableServer, num_steps: int, **options: object) -> SessionRows:
    """Rows that have taken this many steps of modes 0, 1, 2."""
    rows = SessionRows(server.options(**options), N)
    for _ in range(num_steps):
        step(server, rows, 0, 1, 2)
    server.calls.clear()
    return rows


def sent(server: DurableServer) -> list[list[tuple[int, int]]]:
    """Step index and replayed version of each row of the requests."""
    return [
        list(zip(request.step_indices, request.replayed_versions or [0] * len(request.step_indices), strict=True))
        for request in server.sent("StepBatch")
    ]


def test_a_replay_is_a_request_per_vector_step_of_the_rows_that_need_it() -> None:
    server = DurableServer()
    rows = started(server, 2)
    server.store()
    step(server, rows, 0, 1, 2)
    step(server, rows, 2, 1, 0, rewards=[0.5, 1.0, 1.5])
    first = server.sent("StepBatch")[1]
    ahead = rows.session_ids.tolist()[1]
    server.store(told=False)
    kept = server.stored[ahead]
    for session_id, snapshots in server.stored.items():
        server.stored[session_id] = [snapshots[-1 if session_id == ahead else 0]]
    assert kept[-1].num_steps == 4
    server.restart()
    server.calls.clear()
    result = step(server, rows, 0, 0, 0)
    assert result.step_indices.tolist() == [4, 4, 4]
    assert sent(server) == [[(4, 0)] * 3, [(2, 3)] * 2, [(3, 3)] * 2, [(4, 0)] * 2]
    again = server.sent("StepBatch")[2]
    assert list(again.rewards) == [first.rewards[0], first.rewards[2]]


def test_a_row_that_rests_does_not_make_the_others_keep_their_steps() -> None:
    server = DurableServer()
    rows = started(server, 1)
    for _ in range(500):
        server.store()
        step(server, rows, 0, 1, 2, mask=[True, True, False])
    assert rows._durable is not None and len(rows._durable.history) <= 66
    server.restart()
    assert step(server, rows, 0, 1, 2).step_indices.tolist() == [501, 501, 1]


def test_results_say_how_much_is_durable() -> None:
    server = DurableServer()
    rows = started(server, 3)
    server.store()
    assert step(server, rows, 0, 1, 2).durable_steps.tolist() == [3, 3, 3]  # pyright: ignore
    forgetful = DurableServer()
    forgetful.is_durable = False
    plain = SessionRows(forgetful.options(), N)
    assert step(forgetful, plain, 0, 1, 2).durable_steps is None and plain._durable is None


def test_a_row_whose_replay_differs_ends_alone() -> None:
    server = DurableServer()
    rows = started(server, 3)
    server.store()
    step(server, rows, 0, 1, 2)
    bad = rows.session_ids.tolist()[1]
    server.stored[bad][0].digest = b"the state is another one"
    server.restart()
    with pytest.raises(RowsError) as caught:
        step(server, rows, 0, 1, 2)
    assert {row: type(error) for row, error in caught.value.errors.items()} == {1: ReplayMismatchError}
    assert [request.session_id for request in server.sent("CloseSession")] == [bad]
    assert caught.value.result.step_indices.tolist() == [4, 0, 4]
    with pytest.raises(RowsError):
        step(server, rows, 0, 1, 2)
    assert step(server, rows, 0, 1, 2, starts=[False, True, False]).step_indices.tolist() == [6, 0, 6]


def test_rows_that_were_never_stored_begin_again_with_their_ids_and_seeds() -> None:
    server = DurableServer()
    rows = started(server, 2, seed=10)
    ids = rows.session_ids.tolist()
    server.restart()
    assert step(server, rows, 0, 1, 2).step_indices.tolist() == [2, 2, 2]
    assert [(request.session_id, request.seed) for request in server.sent("OpenSession")] == [
        (ids[0], 10), (ids[1], 11), (ids[2], 12),
    ]  # fmt: skip


def test_rows_of_which_too_little_is_kept_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_module, "MAX_KEPT_STEPS", 4)
    server = DurableServer()
    rows = started(server, 1)
    server.store(told=False)
    for _ in range(6):
        step(server, rows, 0, 1, 2)
    server.restart()
    with pytest.raises(SessionLostError, match=r"goes on at step 1; the client keeps the steps from 3 on"):
        step(server, rows, 0, 1, 2)
    assert step(server, rows, 0, 1, 2, starts=[True] * 3).step_indices.tolist() == [0, 0, 0]


def test_a_draining_server_is_waited_for_also_where_episodes_begin() -> None:
    server = DurableServer()
    rows = started(server, 2)
    ids = rows.session_ids.tolist()
    server.fates = [Fate.DRAIN]
    assert step(server, rows, 0, 1, 2, starts=[True] * 3).step_indices.tolist() == [2, 2, 2]
    assert rows.session_ids.tolist() == ids and not server.sent("CloseSession")
    server.fates = [Fate.DRAIN] * 100
    with pytest.raises(DrainingError):
        step(server, rows, 0, 1, 2, starts=[True] * 3)
    server.fates.clear()
    assert step(server, rows, 0, 1, 2).step_indices.tolist() == [3, 3, 3]


def test_a_version_that_never_comes_is_an_error_and_the_next_episode_begins_in_a_new_session() -> None:
    server = DurableServer()
    rows = started(server, 2, timeout_s=1.0)
    ids = rows.session_ids.tolist()
    server.newest += 1
    server.restart()
    server.cold_calls = 10_000
    with pytest.raises(VersionUnknownError):
        step(server, rows, 0, 1, 2)
    assert rows.session_ids.tolist() == ids
    with pytest.raises(VersionUnknownError):
        step(server, rows, 0, 1, 2, starts=[True] * 3)
    assert step(server, rows, 0, 1, 2, starts=[True] * 3).step_indices.tolist() == [0, 0, 0]


def test_a_server_that_is_ahead_is_not_followed() -> None:
    server = DurableServer()
    rows = started(server, 2)
    server.held[rows.session_ids.tolist()[0]].num_steps = 9
    with pytest.raises(RowsError) as caught:
        step(server, rows, 0, 1, 2)
    assert {row: type(error) for row, error in caught.value.errors.items()} == {0: StepIndexError}


def test_a_row_in_doubt_that_another_server_turns_out_to_have_is_not_lost_while_it_is_replayed() -> None:
    server = DurableServer()
    rows = SessionRows(server.options(seed=10), N)
    step(server, rows, 1, 1, 1)
    step(server, rows, 1, 1, 1)
    plain, ahead = server.faultless, list[dict[int, Held]]()

    def elsewhere(call: Call) -> Any:
        request: Any = call.request
        if call.method == "StepBatch" and request.replayed_versions and ahead:
            # The server that has applied the step stores it, and the one that is asked reads that.
            server.held.update(ahead.pop())
        answer = plain(call)
        if call.method == "StepBatch" and 2 in request.step_indices and not server.num_restarts:
            ahead.append({i: replace(held) for i, held in server.held.items()})
        return answer

    server.faultless = elsewhere  # pyright: ignore
    server.fates = [Fate.CRASH_AFTER]
    result = step(server, rows, 2, 0, 1)
    plays = [[(1, False), (1, False), (mode, False)] for mode in (2, 0, 1)]
    expected = [undisturbed(10 + row, play, [3] * 3)[2] for row, play in enumerate(plays)]
    assert result.actions.tolist() == expected and result.step_indices.tolist() == [2] * N
