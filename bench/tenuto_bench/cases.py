"""What is measured, and what came of it. Plain data, since most of it crosses a process boundary as JSON."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["unary", "stream", "batch"]
MODES: tuple[Mode, ...] = ("unary", "stream", "batch")
EPISODE_STEPS = 100
"""Steps of an episode in the load; then the session begins another."""
RECORDED_STEPS = 3 * EPISODE_STEPS
"""Steps of a sampled session that are replayed."""
NUM_OBSERVATIONS = 16
"""Different observations of the load."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    mode: Mode
    """``unary``: a call per step; ``stream``: the sessions of a process share one stream; ``batch``: vector policies of
    ``rows`` sessions on a stream of their own."""
    policy: str
    sessions: int
    processes: int = 1
    rows: int = 1
    """Sessions per call, in mode ``batch``."""

    def shares(self) -> list[range]:
        """The numbers of the sessions that each process drives, as even as whole calls allow."""
        calls = -(-self.sessions // self.rows)
        bounds = [min(self.sessions, self.rows * (calls * i // self.processes)) for i in range(self.processes + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds) if b > a]


@dataclass(frozen=True)
class Order:
    """What one client process is told."""

    address: str
    case: Case
    first: int
    """Number of its first session."""
    count: int
    sampled: int
    """Of its sessions, how many are recorded."""
    warmup_s: float
    seconds: float
    access_files: dict[str, str] = field(default_factory=dict[str, str])
    """By which it says who it is: paths, by the names of AccessFiles' fields."""


@dataclass
class Recording:
    """The first steps of one session as its client saw them."""

    number: int
    """Of the session; says which observations it sent."""
    seed: int
    versions: list[int] = field(default_factory=list[int])
    actions: list[Any] = field(default_factory=list[Any])
    values: list[float] = field(default_factory=list[float])


@dataclass
class Share:
    """What one client process reports."""

    steps: int
    seconds: float
    latencies_ms: list[float]
    """Of the calls, each with ``rows`` steps."""
    cpu_s: float
    errors: dict[str, int]
    recordings: list[Recording]


@dataclass
class Outcome:
    """A case with its figures; None where they could not be had."""

    case: Case
    steps_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    client_us: float
    """CPU of the client processes per step."""
    server_us: float | None
    """CPU of the server process per step."""
    batch_rows: float | None
    """Mean sessions per forward pass."""
    errors: dict[str, int]
    checked: int
    """Steps that were computed again."""
    wrong: int
    """Those of them that differed."""


def is_start(step: int) -> bool:
    """Whether a session's step begins an episode."""
    return step % EPISODE_STEPS == 0


def observation_number(session: int, step: int) -> int:
    """Which of the load's observations a session sends."""
    return (7 * session + step) % NUM_OBSERVATIONS
