"""Pictures and tables made from a run: everybody in them is named, and only what stands between the marks changes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra study")

import pictures
from peers.contenders import ECHO, FORWARD, PEERS
from peers.rows import Figures, Key, Rows

OURS = ("tenuto, batch", "tenuto, stream", "tenuto, unary")


def run_of_all() -> Rows:
    rows = Rows()
    for number, name in enumerate((*OURS, *PEERS.values(), *ECHO.values(), FORWARD), 1):
        for sessions, processes in ((1, 1), (16, 1), (16, 16)):
            turn = Figures(100.0 * number * sessions, 1.0 / number, 2.0 / number, 50.0, 5.0)
            rows.at(Key("frameconv", sessions, processes, name, "peer")).turns.append(turn)
    rows.at(Key("dnc", 16, 1, OURS[0], "tenuto")).turns.append(Figures(1e9, 1e9, 1e9, 1.0, 1.0))
    return rows


@pytest.mark.parametrize("draw", [pictures.throughput, pictures.latency, pictures.many_processes])
def test_every_contender_is_named_in_its_picture(draw: pictures.Draw) -> None:
    drawn = io.StringIO()
    with pictures.plt.rc_context(pictures.STYLE):
        draw(run_of_all()).savefig(drawn, format="svg")
    for name in (*OURS, *PEERS.values()):
        assert f">{name}<" in drawn.getvalue()


def test_a_line_has_one_process_and_the_policy_that_peers_have() -> None:
    sessions, found = pictures.line_of(run_of_all(), "tenuto, batch")
    assert sessions == [1, 16] and [f.steps_per_s for f in found] == [100.0, 1600.0]


def test_a_contender_that_never_ran_is_left_out() -> None:
    rows = run_of_all()
    for row in rows:
        if row.key.name == PEERS["triton"]:
            row.turns.clear()
    drawn = io.StringIO()
    with pictures.plt.rc_context(pictures.STYLE):
        pictures.throughput(rows).savefig(drawn, format="svg")
    assert ">Triton<" not in drawn.getvalue() and ">Ray Serve<" in drawn.getvalue()


def test_the_readmes_table_has_everybody_and_the_best_in_bold() -> None:
    table = pictures.speeds(run_of_all())
    assert table.headers == ["sessions", *OURS, *PEERS.values()]
    # The later a name stands in the run, the faster it was made.
    assert table.rows[0] == ["1", "100", "200", "300", "400", "500", "**600**"]
    assert [line[0] for line in table.rows] == ["1", "16", "16, a process each"]


def test_a_table_replaces_the_one_between_its_marks() -> None:
    page = "a\n<!-- peers: begin, made by bench/pictures.py -->\nold\n<!-- peers: end -->\nz\n"
    once = pictures.filled(page, "peers", ["new"])
    assert "old" not in once and once.startswith("a\n") and once.endswith("\nz\n")
    assert pictures.filled(once, "peers", ["new"]) == once
    with pytest.raises(AssertionError, match="expected the lines"):
        pictures.filled(page, "engine", ["new"])


def test_the_page_has_what_ran_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    assert pictures.read("peers") is None
    machine = {
        "processor": "2 x Fast",
        "memory": "24 GB",
        "versions": "Python 3",
        "commit": "abc",
        "command": "python x",
    }
    goals = [{"what": "a goal", "got": None, "wanted": 2, "at_least": False, "held": None}]
    told = {"machine": machine, "rows": run_of_all().to_json(), "goals": goals}
    (tmp_path / "peers.json").write_text(json.dumps(told))
    found = pictures.read("peers")
    assert found is not None
    lines = "\n".join(pictures.section(found, Rows.from_json(found["rows"]).table()))
    assert "2 x Fast, 24 GB; Python 3; commit abc. `python x`" in lines
    assert "| frameconv | tenuto, batch | 16 | 1 | 1,600 |" in lines and "| a goal | – | ≤ 2 | not measured |" in lines
