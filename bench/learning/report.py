"""Makes the tables and pictures of docs/learning.md from the raw results of the study.

    python bench/learning/report.py

Replaces what stands between the two markers in the page; the text around them is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from study import ENVIRONMENTS, RESULTS, SEEDS, STEPS, Run

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURES = DOCS / "learning.md", DOCS / "learning"
BEGIN, END = "<!-- figures: begin, made by bench/learning/report.py -->", "<!-- figures: end -->"
LOOKS = {
    "dnc": ("tenuto DNC", "#0b6e4f", "-"),
    "frameconv": ("tenuto Frameconv", "#2a6fbb", "-"),
    "seed-dnc": ("POPGym DiffNC", "#0b6e4f", "--"),
    "seed-frameconv": ("POPGym Frameconv", "#2a6fbb", "--"),
    "lstm": ("RLlib LSTM", "#c1440e", ":"),
    "mlp": ("RLlib MLP", "#777777", ":"),
}
"""Algorithm -> (name, colour, line)."""
TAIL = 10
"""Iterations at the end of a run that its final return is the mean of."""

Curve = list[dict[str, Any]]


def curves_of(env_id: str, algorithm: str) -> list[Curve]:
    """Read the runs that there are, one curve per seed."""
    files = [Run(env_id, algorithm, seed).file for seed in range(SEEDS[algorithm])]
    return [[json.loads(line) for line in f.read_text().splitlines()] for f in files if f.exists()]


def final_return(curve: Curve) -> float:
    """Return the mean of the last iterations' means."""
    return mean(row["return_mean"] for row in curve[-TAIL:])


def steps_until(curve: Curve, share: float) -> int | None:
    """Return the steps after which the return has come this share of the way from its first to 1; None: never."""
    first = next(row["return_mean"] for row in curve if row["return_mean"] is not None)
    level = first + share * (1 - first)
    known = (row for row in curve if row["return_mean"] is not None)
    return next((row["steps"] for row in known if row["return_mean"] >= level), None)


def draw(env_id: str) -> Path:
    """Draw return over steps: a line for the mean of the seeds, a band from the lowest to the highest."""
    figure, axes = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    for algorithm, (name, colour, line) in LOOKS.items():
        curves = curves_of(env_id, algorithm)
        if not curves:
            continue
        length = min(map(len, curves))
        steps = [row["steps"] for row in curves[0][:length]]
        returns = np.array([[row["return_mean"] for row in c[:length]] for c in curves], float)
        axes.plot(steps, returns.mean(axis=0), line, color=colour, label=name, linewidth=1.8)
        if len(curves) > 1:
            axes.fill_between(steps, returns.min(axis=0), returns.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes", title=env_id, xlim=(0, STEPS))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f} k")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{env_id}.svg"
    # Without dates and random ids the same results give the same file.
    with plt.rc_context({"svg.hashsalt": env_id}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def table(env_id: str) -> list[str]:
    """Return the lines of one environment's table."""
    lines = [
        "| | runs | final return | lowest – highest | best | 90 % of the way after | steps/s | steps per CPU second |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for algorithm, (name, *_) in LOOKS.items():
        curves = curves_of(env_id, algorithm)
        if not curves:
            continue
        finals = [final_return(c) for c in curves]
        best = mean(max(row["return_mean"] for row in c if row["return_mean"] is not None) for c in curves)
        reached = [steps_until(c, 0.9) for c in curves]
        until = "–" if None in reached else f"{mean(r for r in reached if r) / 1000:.0f} k steps"
        speeds = (mean(c[-1]["steps"] / c[-1][key] for c in curves) for key in ("wall_s", "cpu_s"))
        spread = f"{min(finals):.2f} – {max(finals):.2f}" if len(finals) > 1 else ""
        cells = [name, len(curves), f"{mean(finals):.2f}", spread, f"{best:.2f}", until, *(f"{s:,.0f}" for s in speeds)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    lines: list[str] = []
    for env_id in ENVIRONMENTS:
        if any((RESULTS / env_id).glob("*.jsonl")):
            picture = draw(env_id).relative_to(DOCS)
            lines += [f"### {env_id}", "", f"![Return over steps on {env_id}]({picture})", "", *table(env_id), ""]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
