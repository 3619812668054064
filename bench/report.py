"""What every benchmark's report is made of: tables for the terminal and for Markdown, goals, and the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

VERSIONS = ("torch", "grpcio", "uvloop", "ray", "dnc")


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1
    """Columns that are text; the others are figures."""

    def print(self, console: Console) -> None:
        """Show it in the terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for i, header in enumerate(self.headers):
            table.add_column(header, justify="left" if i < self.num_left else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """Return it as Markdown, without its title."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Goal:
    """What is wanted of a figure, and what it was."""

    what: str
    got: float | None
    """None: not measured in this run."""
    wanted: float
    at_least: bool = False
    """The figure is to be at least, not at most, what is wanted."""

    @property
    def held(self) -> bool | None:
        """Whether it was reached; None where it was not measured."""
        if self.got is None:
            return None
        return self.got >= self.wanted if self.at_least else self.got <= self.wanted


def table_of(goals: Sequence[Goal]) -> Table:
    """One row per goal."""
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [
        [g.what, figure(g.got, 2), f"{'≥' if g.at_least else '≤'} {g.wanted:g}", words[g.held]] for g in goals
    ]  # fmt: skip
    return Table("Goals, judged from this run", ("goal", "got", "wanted", "held"), rows)


def figure(value: float | None, digits: int = 0) -> str:
    """A figure as text, a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def ratio(value: float | None, reference: float | None) -> float | None:
    """Return the ratio, None where either is missing."""
    return value / reference if value is not None and reference else None


def machine() -> dict[str, str]:
    """Say what ran where: processor, memory, versions, commit, command."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "memory": f"{int(memory[1]) / 2**20:.0f} GB" if memory else "unknown",
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "commit": (commit or "unknown") + (" and changes" if changed else ""),
        "command": "python " + shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def _versions() -> list[str]:
    found: list[str] = []
    for name in VERSIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
