"""The report of a run beside peers: ratios to the right rows, failures told, goals judged from figures alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peers.contenders import ECHO, FORWARD, PEERS
from peers.goals import goals_of
from peers.rows import Figures, Key, Rows
from report import Goal, Table, table_of


def figures(steps_per_s: float, p99_ms: float = 2.0, server_us: float = 100.0, own_us: float | None = None) -> Figures:
    return Figures(steps_per_s, 1.0, p99_ms, server_us, 50.0, own_us)


def rows_of(*found: tuple[int, int, str, Figures], policy: str = "frameconv") -> Rows:
    rows = Rows()
    for sessions, processes, name, turn in found:
        kind = "tenuto" if name.startswith("tenuto") else "peer" if name in PEERS.values() else "floor"
        rows.at(Key(policy, sessions, processes, name, kind)).turns.append(turn)
    return rows


def test_a_row_is_the_median_of_its_turns() -> None:
    rows = rows_of(*((1, 1, "Triton", figures(rate)) for rate in (10.0, 30.0, 20.0)))
    [row] = rows
    assert row.median == figures(20.0)


def test_the_best_peer_is_that_of_the_same_sessions_and_processes() -> None:
    rows = rows_of(
        (16, 1, "tenuto, stream", figures(300.0)),
        (16, 1, "Triton", figures(100.0)),
        (16, 1, "websocket", figures(200.0)),
        (16, 1, ECHO["stream"], figures(900.0)),
        (16, 16, "Triton", figures(5000.0)),
        (64, 1, "Triton", figures(4000.0)),
    )
    row = rows.find(16, "tenuto, stream")
    assert row is not None and rows.of_best_peer(row) == 1.5


def test_a_floor_is_the_echo_of_the_same_messages() -> None:
    rows = rows_of(
        (16, 1, "tenuto, unary", figures(50.0)),
        (16, 1, "tenuto, batch", figures(600.0)),
        (16, 1, ECHO["unary"], figures(100.0)),
        (16, 1, ECHO["stream"], figures(900.0)),
        (16, 1, FORWARD, figures(1200.0)),
    )
    unary, batch = rows.find(16, "tenuto, unary"), rows.find(16, "tenuto, batch")
    assert unary is not None and batch is not None
    assert rows.echo(unary) == 100.0 and rows.echo(batch) == 900.0 and rows.forward(batch) == 1200.0


def test_a_peer_that_died_is_told_in_its_row_and_is_no_reference() -> None:
    rows = rows_of((1, 1, "tenuto, stream", figures(100.0)), (1, 1, "websocket", figures(80.0)))
    dead = rows.at(Key("frameconv", 1, 1, "Triton", "peer"))
    dead.failures += ["its server died", "its server died"]
    limping = rows.find(1, "websocket")
    assert limping is not None
    limping.failures.append("a client process ended")
    lines = {line[1]: line for line in rows.table().rows}
    assert lines["Triton"][4] == "–" and lines["Triton"][-1] == "2 of 2 turns: its server died"
    assert lines["websocket"][4] == "80" and lines["websocket"][-1] == "1 of 2 turns: a client process ended"
    assert lines["tenuto, stream"][5] == "1.25"


def test_rows_survive_json() -> None:
    rows = rows_of((1, 1, "tenuto, batch", figures(100.0, own_us=1.5)), (1, 1, "Triton", figures(80.0)))
    rows.at(Key("frameconv", 1, 1, "Ray Serve", "peer")).failures.append("not installed")
    again = Rows.from_json(rows.to_json())
    assert again.to_json() == rows.to_json() and again.table() == rows.table()


@pytest.mark.parametrize(("got", "at_least", "held"), [(1.9, False, True), (2.1, False, False), (2.1, True, True),
                                                       (1.9, True, False), (None, True, None)])  # fmt: skip
def test_a_goal_is_held_on_its_side_of_what_is_wanted(got: float | None, at_least: bool, held: bool | None) -> None:
    goal = Goal("steps", got, 2.0, at_least)
    assert goal.held is held
    assert table_of([goal]).rows[0][-1] == {True: "yes", False: "no", None: "not measured"}[held]


def test_goals_are_judged_from_the_rows_they_name_and_no_others() -> None:
    rows = rows_of(
        (64, 1, "tenuto, unary", figures(90.0)),
        (64, 1, "Triton", figures(100.0)),
        (16, 16, "tenuto, stream", figures(100.0, server_us=40.0)),
        (16, 16, "Triton", figures(50.0, server_us=100.0)),
        (256, 1, "tenuto, batch", replace(figures(100.0, p99_ms=4.0), own_us=1.5)),
        (256, 1, "Ray Serve", figures(4.0)),
        (256, 1, FORWARD, figures(200.0)),
    )
    goals = {goal.what: goal for goal in goals_of(rows)}
    judged = {what: goal.got for what, goal in goals.items() if goal.held is not None}
    assert judged == {
        "64 sessions, unary: steps/s, of Triton's": 0.9,
        "16 processes, one session on a stream each: steps/s, of the best peer's": 2.0,
        "16 processes, one session on a stream each: server CPU per step, of Triton's": 0.4,
        "StepBatch of 256, frameconv: steps/s, of the best peer's": 25.0,
        "StepBatch of 256, frameconv: steps/s, of the bare forward pass's": 0.5,
        "StepBatch of 256, frameconv: server µs per session, all but the forward pass": 1.5,
        "p99 by p50, where it is longest (frameconv, tenuto, batch, 256 in 1)": 4.0,
    }
    assert [goals[what].held for what in judged] == [True, True, False, True, False, True, False]


def test_a_table_is_markdown_too() -> None:
    table = Table("title", ("who", "steps/s"), [("tenuto", "1")])
    assert table.markdown() == "| who | steps/s |\n| --- | --- |\n| tenuto | 1 |"
