"""What came of a run: the medians of each contender's turns, and how they stand to each other."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peers.contenders import ECHO, FORWARD, Kind
from report import Table, figure, ratio


@dataclass(frozen=True)
class Key:
    """Which line of the table."""

    policy: str
    sessions: int
    processes: int
    """Client processes."""
    name: str
    kind: Kind


@dataclass(frozen=True)
class Figures:
    """Of one turn, or the medians of several."""

    steps_per_s: float
    p50_ms: float
    """Of a call: a step, or one step of all rows."""
    p99_ms: float
    server_us: float | None
    """CPU of the server per step; None for the forward pass alone."""
    client_us: float | None
    """CPU of the client processes per step."""
    own_us: float | None = None
    """The server's CPU per step without the forward pass; of tenuto alone, which tells how long that took."""


@dataclass
class Row:
    """One line: its turns, and the reasons of those that failed."""

    key: Key
    turns: list[Figures] = field(default_factory=list[Figures])
    failures: list[str] = field(default_factory=list[str])

    @property
    def median(self) -> Figures | None:
        """The median of each figure."""
        if not self.turns:
            return None
        columns = ([getattr(turn, f.name) for turn in self.turns] for f in fields(Figures))
        return Figures(*(None if None in c else statistics.median(c) for c in columns))  # pyright: ignore[reportArgumentType]

    @property
    def steps_per_s(self) -> float | None:
        """The median, where there is one."""
        return self.median.steps_per_s if self.median else None


class Rows:
    """All lines of a run, in the order in which they were first measured."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = {row.key: row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def at(self, key: Key) -> Row:
        """Return a key's row, a new one where there is none."""
        return self._rows.setdefault(key, Row(key))

    def find(self, sessions: int, name: str, processes: int = 1, policy: str = "frameconv") -> Row | None:
        """Return a row, None where it was not measured."""
        of = (policy, sessions, processes, name)
        return next((r for r in self if (r.key.policy, r.key.sessions, r.key.processes, r.key.name) == of), None)

    def best_peer(self, row: Row) -> float | None:
        """Steps/s of the best peer at the same sessions."""
        return max(
            (found for r in self._beside(row) if r.key.kind == "peer" and (found := r.steps_per_s)), default=None
        )

    def echo(self, row: Row) -> float | None:
        """Steps/s of the echo of the same messages: a lone call per step, or many rows in a message."""
        if row.key.kind != "tenuto":
            return None
        name = ECHO["unary" if row.key.name.endswith("unary") else "stream"]
        return next((r.steps_per_s for r in self._beside(row) if r.key.name == name), None)

    def forward(self, row: Row) -> float | None:
        """Steps/s of the forward pass alone on as many rows."""
        found = self.find(row.key.sessions, FORWARD, policy=row.key.policy)
        return found.steps_per_s if found and found is not row else None

    def of_best_peer(self, row: Row) -> float | None:
        """Steps/s by those of the best peer; of the policy that peers have."""
        return ratio(row.steps_per_s, self.best_peer(row))

    def _beside(self, row: Row) -> list[Row]:
        of = row.key
        return [
            r for r in self if (r.key.policy, r.key.sessions, r.key.processes) == (of.policy, of.sessions, of.processes)
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """Describe all turns with plain JSON values."""
        return [{**vars(r.key), "turns": [vars(t) for t in r.turns], "failures": r.failures} for r in self]

    @classmethod
    def from_json(cls, data: Sequence[dict[str, Any]]) -> Rows:
        """Rebuild from :meth:`to_json`."""
        names = [f.name for f in fields(Key)]
        return cls([
            Row(Key(**{n: d[n] for n in names}), [Figures(**t) for t in d["turns"]], d["failures"]) for d in data
        ])  # fmt: skip

    def table(self) -> Table:
        """One line per contender, those of as many sessions together."""
        headers = (
            "policy", "who", "sessions", "processes", "steps/s", "of best peer", "of echo", "of forward", "p50 ms",
            "p99 ms", "server µs", "client µs", "note",
        )  # fmt: skip
        lines: list[list[str]] = []
        for row in sorted(self, key=lambda r: (r.key.policy != "frameconv", r.key.processes, r.key.sessions)):
            key, found = row.key, row.median
            line = [key.policy, key.name, str(key.sessions), str(key.processes)]
            if found is None:
                cells = ["–"] * 8
            else:
                cells = [
                    figure(found.steps_per_s), figure(self.of_best_peer(row), 2),
                    figure(ratio(found.steps_per_s, self.echo(row)), 2),
                    figure(ratio(found.steps_per_s, self.forward(row)), 2) if key.processes == 1 else "–",
                    figure(found.p50_ms, 2), figure(found.p99_ms, 2), figure(found.server_us), figure(found.client_us),
                ]  # fmt: skip
            lines.append([*line, *cells, _note(row)])
        if not any(line[-1] for line in lines):
            headers, lines = headers[:-1], [line[:-1] for line in lines]
        return Table("Closed loops; µs: CPU per step", headers, lines, num_left=2)


def _note(row: Row) -> str:
    turns = len(row.turns) + len(row.failures)
    return "; ".join(f"{count} of {turns} turns: {why}" for why, count in Counter(row.failures).items())
