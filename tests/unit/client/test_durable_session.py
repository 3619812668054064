"""One environment's durable session: whatever becomes of its servers, its actions are those of an undisturbed run."""

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from durable_server import DurableServer, Fate, Held, step_as_a_transport_does, undisturbed
from scripted import observation
from tenuto_client import (
    DeadlineError,
    DrainingError,
    ReplayMismatchError,
    SessionGoneError,
    SessionLostError,
    SessionUnknownError,
    StepIndexError,
    StepResult,
    TenutoError,
    VersionUnknownError,
)
from tenuto_client import durable as durable_module
from tenuto_client.effects import Call
from tenuto_client.session import Session
from tenuto_proto.v1 import policy_pb2 as pb

FINE, CRASH = Fate.FINE, Fate.CRASH
PLAYS = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12)
FATES = st.lists(
    st.tuples(st.sampled_from([fate for fate in Fate if fate is not Fate.CRASH_COLD]), st.integers(1, 4)), max_size=20
).map(lambda runs: [fate for fate, length in runs for _ in range(length)])


def play(
    server: DurableServer, session: Session, plays: list[tuple[int, bool]], usual: bool = False
) -> list[StepResult]:
    """Play, as an environment does that calls again after every error but a lost episode."""
    results: list[StepResult] = []
    for mode, begins in plays:
        while True:
            try:
                if usual:
                    results.append(step_as_a_transport_does(server, session, observation(mode=mode), begins, 0.5))
                else:
                    results.append(server.drive(session.step(observation(mode=mode), begins, 0.5)))
                break
            except TenutoError as error:
                assert not isinstance(error, SessionGoneError), error
    return results


def seed_of(server: DurableServer, session: Session) -> int:
    return server.held[session.session_id].seed


def assert_undisturbed(results: list[StepResult], plays: list[tuple[int, bool]], seed: int) -> None:
    versions = [result.version for result in results]
    assert [result.action for result in results] == undisturbed(seed, plays, versions)
    assert [result.step_index for result in results] == list(range(len(plays)))
    for before, after, (_, begins) in zip(versions, versions[1:], plays[1:], strict=False):
        assert before == after or begins


@given(PLAYS, FATES, st.booleans(), st.sampled_from([0.3, 5.0, 60.0]))
# The server that has just opened the session again restarts, and then the time is up.
@example(
    [(0, False)],
    [FINE, FINE, CRASH, FINE, FINE, CRASH, CRASH, FINE, Fate.FULL, Fate.FULL, CRASH, FINE, Fate.LOST_REQUEST],
    False,
    0.3,
)
@settings(deadline=None, max_examples=150)
def test_nothing_that_happens_to_servers_changes_an_action(
    plays: list[tuple[int, bool]], fates: list[Fate], usual: bool, timeout_s: float
) -> None:
    if timeout_s == 60.0:
        # So long that a version that comes late does come in time.
        fates = [Fate.CRASH_COLD if fate is CRASH else FINE if fate.name.startswith("LOST") else fate for fate in fates]
    server = DurableServer(fates)
    session = Session(server.options(timeout_s=timeout_s))
    results = play(server, session, plays, usual)
    assert_undisturbed(results, plays, seed_of(server, session))
    assert [result.version for result in results] == sorted(result.version for result in results)
    assert len({request.session_id for request in server.sent("Step")}) == 1


@given(PLAYS, st.lists(FATES, min_size=2, max_size=2), st.sets(st.integers(0, 11)))
@settings(deadline=None, max_examples=150)
def test_moving_between_servers_changes_no_action_either(
    plays: list[tuple[int, bool]], fates: list[list[Fate]], moves: set[int]
) -> None:
    here = DurableServer(fates[0])
    there = DurableServer(fates[1], clock=here)
    there.epoch += 1000
    session = Session(here.options())
    results: list[StepResult] = []
    for index, one in enumerate(plays):
        if index in moves and session.session_id:
            try:
                here.drive(session.export())
                try:
                    there.drive(session.import_here())
                    here, there = there, here
                except TenutoError:
                    with suppress(TenutoError):
                        here.drive(session.thaw())
            except TenutoError as error:
                assert not isinstance(error, SessionGoneError) or isinstance(error, SessionLostError)
        results += play(here, session, [one])
    assert_undisturbed(results, plays, seed_of(here, session))


@given(PLAYS, FATES, st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None, max_examples=150)
def test_who_goes_on_after_an_error_knows_which_steps_were_applied(
    plays: list[tuple[int, bool]], fates: list[Fate], patience: random.Random, usual: bool
) -> None:
    """After an error whose outcome is unknown the next call completes the step; after another the step never was."""
    server = DurableServer(fates)
    session = Session(server.options(timeout_s=0.3))
    applied: list[tuple[int, bool]] = []
    results: list[StepResult | None] = []
    for index, (mode, begins) in enumerate(plays):
        may_go_on = index > 0 and not begins and index + 1 < len(plays) and not plays[index + 1][1]
        while True:
            try:
                if usual:
                    result = step_as_a_transport_does(server, session, observation(0.1 * index, mode), begins, None)
                else:
                    result = server.drive(session.step(observation(0.1 * index, mode), begins, None))
            except TenutoError as error:
                if not may_go_on or patience.random() < 0.5:
                    continue
                if error.outcome_unknown:
                    applied.append((mode, begins))
                    results.append(None)
            else:
                applied.append((mode, begins))
                results.append(result)
            break
    versions: list[int] = []
    for result in reversed(results):
        # Of a step that nobody saw answered: the version of the one after it, in the same episode.
        versions.insert(0, versions[0] if result is None else result.version)
    actions = undisturbed(seed_of(server, session), applied, versions)
    for index, (result, action) in enumerate(zip(results, actions, strict=True)):
        assert result is None or (result.step_index, result.action) == (index, action)


def started(server: DurableServer, num_steps: int, **options: object) -> Session:
    """A durable session that has taken this many steps of mode 1."""
    session = Session(server.options(**options))
    play(server, session, [(1, index == 0) for index in range(num_steps)])
    server.calls.clear()
    return session


def sent(server: DurableServer) -> list[tuple[int, int]]:
    """(step index, replayed version) of the steps that were sent."""
    return [(step.step_index, step.replayed_version) for step in server.sent("Step")]


def test_only_the_steps_that_the_server_has_undone_are_sent_again_as_they_were() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.store()
    before = [server.drive(session.step(observation(mode=mode), False, mode / 2)) for mode in (0, 1, 2)]
    assert [result.durable_step for result in before] == [2, 2, 2]
    first = server.sent("Step")
    server.restart()
    server.newest += 1
    server.calls.clear()
    assert server.drive(session.step(observation(mode=1), False, None)).step_index == 5
    assert sent(server) == [(5, 0), (2, 3), (3, 3), (4, 3), (5, 0)]
    for again, once in zip(server.sent("Step")[1:4], first, strict=True):
        again.replayed_version = 0
        assert again == once


def test_steps_that_are_durable_are_not_kept() -> None:
    server = DurableServer()
    session = started(server, 50)
    assert session._durable is not None and session._durable.history.first_index == 0
    server.store()
    server.drive(session.step(observation(), False, None))
    assert session._durable.history.first_index == 50


def test_a_session_that_was_never_stored_begins_again_with_its_id_and_seed() -> None:
    server = DurableServer()
    session = started(server, 3, version=3, deterministic=True)
    server.restart()
    server.drive(session.step(observation(mode=2), False, None))
    [opened] = server.sent("OpenSession")
    assert (opened.session_id, opened.seed) == (session.session_id, session.session_id)
    assert (opened.policy_name, opened.version, opened.deterministic) == ("walker", 3, True)
    assert sent(server) == [(3, 0), (0, 3), (1, 3), (2, 3), (3, 0)]


def test_a_server_that_forgot_more_than_is_kept_has_lost_the_episode_but_not_the_next() -> None:
    server = DurableServer()
    session = started(server, 4)
    server.store()
    server.drive(session.step(observation(), False, None))
    old_id = session.session_id
    server.stored.clear()
    server.restart()
    with pytest.raises(SessionLostError):
        server.drive(session.step(observation(), False, None))
    result = server.drive(session.step(observation(), True, None))
    assert result.step_index == 0 and session.session_id != old_id


def test_steps_are_kept_up_to_a_bound_beyond_which_a_restart_loses_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_module, "MAX_KEPT_STEPS", 4)
    server = DurableServer()
    session = started(server, 1)
    server.store(told=False)
    play(server, session, [(1, False)] * 6)
    server.restart()
    with pytest.raises(SessionLostError, match=r"goes on at step 1; the client keeps the steps from 3 on"):
        server.drive(session.step(observation(), False, None))
    assert server.sent("CloseSession")
    assert server.drive(session.step(observation(), True, None)).step_index == 0


@pytest.mark.parametrize("what", ["action", "version"])
def test_a_replay_that_differs_is_told_and_ends_the_session(what: str) -> None:
    server = DurableServer()
    session = started(server, 3)
    server.store()
    play(server, session, [(1, False)] * 3)
    [stored] = server.stored[session.session_id]
    if what == "action":
        stored.digest = b"the state is another one"
    else:
        stored.version, server.newest = 9, 9
        step = server._step
        server._step = lambda *arguments: step(*arguments[:-1], 0)  # pyright: ignore
    server.restart()
    old_id = session.session_id
    with pytest.raises(ReplayMismatchError, match=what):
        server.drive(session.step(observation(), False, None))
    assert [request.session_id for request in server.sent("CloseSession")] == [old_id]
    with pytest.raises(ReplayMismatchError):
        server.drive(session.step(observation(), False, None))
    assert server.drive(session.step(observation(), True, None)).step_index == 0


def test_a_server_that_is_ahead_is_not_followed() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.held[session.session_id].num_steps = 9
    with pytest.raises(StepIndexError) as caught:
        server.drive(session.step(observation(), False, None))
    assert caught.value.expected == 9 and session.step_index == 2


@pytest.mark.parametrize("begins", [False, True])
def test_a_draining_server_is_waited_for_also_where_an_episode_begins(begins: bool) -> None:
    server = DurableServer()
    session = started(server, 2)
    server.fates = [Fate.DRAIN]
    old_id = session.session_id
    assert server.drive(session.step(observation(mode=2), begins, None)).step_index == 2
    assert session.session_id == old_id and server.pauses_s and not server.sent("CloseSession")


def test_a_server_that_drains_for_too_long_is_an_error_and_the_session_goes_on_later() -> None:
    server = DurableServer()
    session = started(server, 2, timeout_s=1.0)
    server.fates = [Fate.DRAIN] * 50
    with pytest.raises(DrainingError, match="gave up"):
        server.drive(session.step(observation(mode=2), True, None))
    server.fates.clear()
    assert server.drive(session.step(observation(mode=2), True, None)).step_index == 2


def test_a_version_that_is_still_being_loaded_is_waited_for() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.newest += 1
    server.restart()
    server.cold_calls = 8
    assert server.drive(session.step(observation(), False, None)).version == 3
    assert server.pauses_s


def test_a_version_that_never_comes_is_an_error_and_the_next_episode_begins_in_a_new_session() -> None:
    server = DurableServer()
    session = started(server, 2, timeout_s=1.0)
    old_id = session.session_id
    server.newest += 1
    server.restart()
    server.cold_calls = 10_000
    with pytest.raises(VersionUnknownError):
        server.drive(session.step(observation(), False, None))
    assert session.session_id == old_id
    results = list[StepResult]()
    for _ in range(2):
        with suppress(TenutoError):
            results.append(server.drive(session.step(observation(), True, None)))
            break
    assert results[0].step_index == 0 and session.session_id != old_id


def test_a_replay_that_takes_too_long_goes_on_with_the_next_call() -> None:
    server = DurableServer()
    session = started(server, 40, timeout_s=1.0)
    server.restart()
    slow = server.faultless

    def slowly(call: object) -> object:
        server.now_s += 0.1
        return slow(call)  # pyright: ignore

    server.faultless = slowly  # pyright: ignore
    num_errors = 0
    while session.step_index == 40:
        try:
            server.drive(session.step(observation(mode=2), False, None))
        except DeadlineError as error:
            assert "call step again" in str(error) and not error.outcome_unknown
            num_errors += 1
    assert 3 < num_errors < 12
    replayed = [index for index, version in sent(server) if version]
    assert replayed == list(range(40))


def test_a_server_that_forgets_the_session_after_a_replay_is_not_said_to_have_restarted() -> None:
    server = DurableServer()
    session = started(server, 3)
    server.store()
    play(server, session, [(1, False)] * 2)
    server.restart()
    play(server, session, [(1, False)])
    server.held.clear()
    with pytest.raises(SessionUnknownError) as caught:
        server.drive(session.step(observation(), False, None))
    assert type(caught.value) is SessionUnknownError


def test_a_step_whose_reply_was_lost_with_the_server_is_applied_once() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.fates = [Fate.CRASH_AFTER]
    assert server.drive(session.step(observation(mode=2), False, None)).step_index == 2
    assert server.held[session.session_id].num_steps == 3


def test_a_session_that_is_opened_again_where_nothing_is_durable_keeps_no_more_steps() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.restart()
    server.is_durable = False
    assert server.drive(session.step(observation(mode=2), False, None)).durable_step is None
    server.restart()
    with pytest.raises(SessionLostError):
        server.drive(session.step(observation(mode=2), False, None))


def test_a_replay_over_a_stream_travels_with_replays_only() -> None:
    server = DurableServer()
    session = started(server, 2)
    server.restart()
    server.drive(session.step(observation(mode=2), False, None))
    steps = [call.step for call in server.calls if call.step is not None]
    assert [step.form.replays for step in steps] == [False, True, True, False]
    replay = steps[1]
    assert list(replay.form.join([replay], 1.0).replayed_versions) == [3]
    assert not steps[0].form.join([steps[0]], 1.0).replayed_versions
    assert replay.form.key != steps[0].form.key
    reply = pb.StepBatchResponse(versions=[3], durable_steps=[7])
    reply.actions.CopyFrom(server.held[session.session_id].reply.action)
    reply.actions.shape.append(1)
    [result] = replay.form.cut([replay], reply)
    assert isinstance(result, StepResult) and result.durable_step == 7


def test_a_step_in_doubt_that_another_server_turns_out_to_have_is_not_lost_while_it_is_replayed() -> None:
    server = DurableServer()
    session = started(server, 2)
    plain, ahead = server.faultless, list[Held]()

    def elsewhere(call: Call) -> Any:
        if call.method == "Step" and call.request.replayed_version and ahead:  # pyright: ignore
            # The server that has applied the step stores it, and the one that is asked reads that.
            server.held[session.session_id] = ahead.pop()
        answer = plain(call)
        if isinstance(answer, pb.StepResponse) and answer.step_index == 2 and not server.num_restarts:
            ahead.append(replace(server.held[session.session_id]))
        return answer

    server.faultless = elsewhere  # pyright: ignore
    server.fates = [Fate.CRASH_AFTER]
    results = [server.drive(session.step(observation(mode=mode), False, None)) for mode in (2, 1)]
    seed = seed_of(server, session)
    assert [r.action for r in results] == undisturbed(seed, [(1, False)] * 2 + [(2, False), (1, False)], [3] * 4)[2:]
