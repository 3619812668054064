"""Draws the pictures of docs/pictures and fills in the tables of bench/RESULTS.md and README.md from the runs kept in
bench/results.

    make pictures           (python bench/pictures.py)

Text and axes are of a grey, and lines of colours, that can be read on white and on black.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import durability
import engine
from overload import run as overload
from peers.contenders import ECHO, FORWARD, PEERS
from peers.rows import Figures, Rows
from report import Goal, Table, figure, table_of

HERE = Path(__file__).parent
RESULTS, PICTURES = HERE / "results", HERE.parent / "docs" / "pictures"
PAGE, README = HERE / "RESULTS.md", HERE.parent / "README.md"
GREY = "#7f8790"
OURS, TRITON, RAY, WEBSOCKET = "#179c71", "#3f83d8", "#b05cc6", "#d4761c"
LOOKS = {
    "tenuto, batch": (OURS, "-"),
    "tenuto, stream": (OURS, "--"),
    "tenuto, unary": (OURS, ":"),
    PEERS["triton"]: (TRITON, "-"),
    PEERS["ray"]: (RAY, "-"),
    PEERS["websocket"]: (WEBSOCKET, "-"),
}
"""Contender -> (colour, line)."""
FLOORS = (ECHO["unary"], ECHO["stream"], FORWARD)
BARS = {engine.ENGINE: ("tenuto's engine", OURS), engine.PLAIN: ("torch, Policy.step", TRITON),
        engine.PACKAGE: ("package dnc, core alone", WEBSOCKET)}  # fmt: skip
NAMES = {"dnc": "DNC", "frameconv": "Frameconv"}
STYLE: Any = {
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "text.color": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "savefig.transparent": True,
    # Without random ids the same results give the same file.
    "svg.fonttype": "none", "svg.hashsalt": "tenuto", "font.family": "sans-serif",
}  # fmt: skip
LABEL_GAP = 0.045
"""Between two labels beside an axis, as a share of its height."""
Draw = Callable[[Rows], Figure]


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    sections: dict[str, list[str]] = {}
    with plt.rc_context(STYLE):
        if (told := read("peers")) is not None:
            rows = Rows.from_json(told["rows"])
            save(throughput(rows), "throughput", told["machine"])
            save(latency(rows), "latency", told["machine"])
            save(many_processes(rows), "processes", told["machine"])
            sections["peers"] = section(told, rows.table())
            README.write_text(filled(README.read_text(), "speed", [speeds(rows).markdown()]))
        if (told := read("engine")) is not None:
            medians = {(memory, rows, who): us for memory, rows, who, us in told["rows"]}
            save(engine_bars(medians), "engine", told["machine"])
            sections["engine"] = section(told, engine.table(medians))
        if (told := read("overload")) is not None:
            levels = [overload.Level(**level) for level in told["levels"]]
            save(overload_curves(levels), "overload", told["machine"])
            bound_ms = 2 * told["flags"]["max_queue_delay_ms"]
            table, goals = overload.report(levels, told["capacity_per_s"], bound_ms)
            sections["overload"] = [origin(told), "", table.markdown(), "", goals.markdown()]
        if (told := read("durability")) is not None:
            table = durability.table_of(durability.read(told["rows"]))
            sections["durability"] = [origin(told), "", table.markdown()]
    page = PAGE.read_text()
    for name, lines in sections.items():
        page = filled(page, name, lines)
    PAGE.write_text(page)


def read(name: str) -> dict[str, Any] | None:
    """Return a run that is kept, None where there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def section(told: dict[str, Any], table: Table) -> list[str]:
    """Return the lines that the page has of a run: machine, table, goals."""
    goals = [Goal(g["what"], g["got"], g["wanted"], g["at_least"]) for g in told["goals"]]
    return [origin(told), "", table.markdown(), "", table_of(goals).markdown()]


def origin(told: dict[str, Any]) -> str:
    """Say of a run what ran where."""
    machine = told["machine"]
    where = f"{machine['processor']}, {machine['memory']}; {machine['versions']}; commit {machine['commit']}"
    return f"{where}. `{machine['command']}`"


def filled(page: str, name: str, lines: Sequence[str]) -> str:
    """Replace what stands between the page's two marks of this name."""
    begin, end = f"<!-- {name}: begin, made by bench/pictures.py -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    assert found and end in rest, f"expected the lines {begin} and {end}"
    return "\n".join([before + begin, "", *lines, "", end + rest.partition(end)[2]])


def speeds(rows: Rows) -> Table:
    """Return the README's table: steps/s of tenuto and its peers, the best of each line in bold."""
    lines: list[list[str]] = []
    for sessions, processes in sorted({(r.key.sessions, r.key.processes) for r in rows}, key=lambda k: (k[1], k[0])):
        found = [rows.find(sessions, name, processes) for name in LOOKS]
        steps = [row.steps_per_s if row else None for row in found]
        best = max((s for s in steps if s is not None), default=None)
        what = str(sessions) if processes == 1 else f"{sessions}, a process each"
        lines.append([what, *(f"**{figure(s)}**" if s == best is not None else figure(s) for s in steps)])
    return Table("", ["sessions", *LOOKS], lines)


def throughput(rows: Rows) -> Figure:
    """Steps per second over sessions, peers and floors beside tenuto."""
    drawing, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    labels: list[tuple[float, str, str]] = []
    for name in FLOORS:
        sessions, found = line_of(rows, name)
        axes.plot(sessions, [f.steps_per_s for f in found], color=GREY, linewidth=0.8, alpha=0.8)
        labels += [(f.steps_per_s, name, GREY) for f in found[-1:]]
    for name, (colour, style) in LOOKS.items():
        sessions, found = line_of(rows, name)
        axes.plot(sessions, [f.steps_per_s for f in found], style, color=colour, marker="o", markersize=4)
        labels += [(f.steps_per_s, name, colour) for f in found[-1:]]
    axes.set(yscale="log", ylabel="steps per second", title="Throughput, one client process; grey: floors")
    over_sessions(axes, rows)
    label(axes, labels)
    return drawing


def latency(rows: Rows) -> Figure:
    """p50 and p99 of a call over sessions."""
    drawing, pair = plt.subplots(1, 2, figsize=(8.4, 4.4), layout="constrained", sharey=True)
    percentiles: list[tuple[str, Callable[[Figures], float]]] = [
        ("p50", lambda f: f.p50_ms),
        ("p99", lambda f: f.p99_ms),
    ]
    for axes, (percentile, of) in zip(pair, percentiles, strict=True):
        labels: list[tuple[float, str, str]] = []
        for name, (colour, style) in LOOKS.items():
            sessions, found = line_of(rows, name)
            axes.plot(sessions, [of(f) for f in found], style, color=colour, marker="o", markersize=4)
            labels += [(of(f), name, colour) for f in found[-1:]]
        axes.set(yscale="log", title=f"{percentile} of a step, one client process")
        over_sessions(axes, rows)
        label(axes, labels)
    pair[0].set_ylabel("milliseconds")
    return drawing


def many_processes(rows: Rows) -> Figure:
    """Throughput and the server's CPU where every session has a process of its own."""
    found = [(row.key.name, row.median) for row in rows if row.key.processes > 1]
    shown = sorted(((name, f) for name, f in found if f is not None), key=lambda x: x[1].steps_per_s)
    count = max((row.key.processes for row in rows), default=0)
    drawing, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained", sharey=True)
    names, colours = [name for name, _ in shown], [LOOKS.get(name, (GREY, ""))[0] for name, _ in shown]
    bars(left, names, [f.steps_per_s for _, f in shown], colours, f"steps per second, {count} processes of one session")
    bars(right, names, [f.server_us or 0.0 for _, f in shown], colours, "server's CPU per step, µs")
    return drawing


def engine_bars(medians: engine.Microseconds) -> Figure:
    """Time per row of a batch, for each memory and size."""
    memories = list(dict.fromkeys(memory for memory, _, _ in medians))
    sizes = list(dict.fromkeys(rows for _, rows, _ in medians))
    drawing, panels = plt.subplots(1, len(memories), figsize=(8.4, 3.8), layout="constrained", sharey=True)
    for axes, memory in zip(panels, memories, strict=True):
        shown = [who for who in BARS if (memory, sizes[0], who) in medians]
        width = 0.8 / len(shown)
        for place, who in enumerate(shown):
            name, colour = BARS[who]
            heights = [medians[memory, rows, who] / rows for rows in sizes]
            at = [i + width * (place - (len(shown) - 1) / 2) for i in range(len(sizes))]
            axes.bar(at, heights, width * 0.92, color=colour, label=name)
        axes.set(yscale="log", title=NAMES[memory], xlabel="rows of the batch")
        axes.set_xticks(range(len(sizes)), [str(rows) for rows in sizes])
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel("µs per row, one thread")
    # The panel of the DNC has all of them.
    drawing.legend(
        *panels[memories.index("dnc")].get_legend_handles_labels(), loc="outside upper center", ncols=len(BARS),
        frameon=False, labelcolor="linecolor",
    )  # fmt: skip
    return drawing


def overload_curves(levels: Sequence[overload.Level]) -> Figure:
    """What a server does of what is asked of it, and how long that takes, over the load."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    loads = [level.factor for level in levels]
    left.plot(loads, [level.goodput_per_s for level in levels], color=OURS, marker="o", markersize=4)
    left.plot(loads, [level.offered_per_s for level in levels], color=GREY, linewidth=0.8)
    left.set(title="Steps per second; grey: offered", ylim=(0, 1.6 * max(level.goodput_per_s for level in levels)))
    for name, style, values in (("p99", "-", [v.p99_ms for v in levels]), ("p50", "--", [v.p50_ms for v in levels])):
        right.plot(loads, values, style, color=OURS, marker="o", markersize=4, label=name)
    right.set(title="Milliseconds of an admitted step", ylim=(0, None))
    right.legend(frameon=False, labelcolor="linecolor")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="load, of the capacity")
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
    return drawing


def line_of(rows: Rows, name: str) -> tuple[list[int], list[Figures]]:
    """Return a contender's sessions and figures, those of one client process."""
    found = [(row.key.sessions, row.median) for row in rows
             if row.key.name == name and row.key.processes == 1 and row.key.policy == "frameconv"]  # fmt: skip
    known = sorted((sessions, median) for sessions, median in found if median is not None)
    return [sessions for sessions, _ in known], [median for _, median in known]


def over_sessions(axes: Axes, rows: Rows) -> None:
    """Make the axis one of sessions, in powers of two."""
    axes.set_xscale("log", base=2)
    sessions = sorted({row.key.sessions for row in rows if row.key.processes == 1})
    axes.set_xticks(sessions, [str(n) for n in sessions])
    axes.set_xlabel("sessions, one step in flight each")


def label(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, apart from each other."""
    to_share = axes.transAxes.inverted()
    last = -1.0
    for value, name, colour in sorted(labels):
        share = float(to_share.transform(axes.transData.transform((1, value)))[1])
        last = max(share, last + LABEL_GAP)
        axes.annotate(name, (1.02, last), xycoords="axes fraction", va="center", color=colour, annotation_clip=False)


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str], title: str) -> None:
    """Draw bars that lie, each with its figure."""
    drawn = axes.barh(names, values, color=colours)
    axes.bar_label(drawn, [figure(value) for value in values], padding=3, color=GREY)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.18)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def save(drawing: Figure, name: str, machine: dict[str, str]) -> None:
    """Write the picture with the machine under it."""
    caption = f"{machine['processor']}, all on one machine; commit {machine['commit']}\n{machine['versions']}"
    drawing.supxlabel(caption, fontsize=8, color=GREY)
    drawing.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    plt.close(drawing)


if __name__ == "__main__":
    main()
