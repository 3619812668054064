"""What tenuto-play has seen: returns per version, speed, and the latency of its steps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

RECENT_EPISODES = 100
RECENT_STEPS = 2000
SPEED_WINDOW_S = 5.0


LINE_WIDTH = 80
"""Of the terminals that people have."""


def short(number: float, num_digits: int) -> str:
    """Return a number with so many digits; with more only where they stand before the point."""
    return f"{number:.{max(num_digits - len(str(int(abs(number)))), 0)}f}"


@dataclass
class Returns:
    """Count, mean and spread of episode returns, without keeping them (Welford)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, episode_return: float) -> None:
        """Take one episode in."""
        self.count += 1
        delta = episode_return - self.mean
        self.mean += delta / self.count
        self._squares += delta * (episode_return - self.mean)

    @property
    def spread(self) -> float:
        """Standard deviation of the episodes (n - 1); 0 for fewer than two."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0


@dataclass
class PlayStatistics:
    """Filled by a Player, read by a view. Times are seconds of one clock."""

    by_version: dict[int, Returns] = field(default_factory=dict[int, Returns])
    """Of finished episodes, by the version that played their end."""
    num_steps: int = 0
    num_interrupted: int = 0
    """Episodes that were lost with their session."""
    num_away: int = 0
    """Environments that wait for the server."""
    version: int = 0
    """The newest that answered so far."""
    _recent_returns: deque[float] = field(default_factory=lambda: deque[float](maxlen=RECENT_EPISODES))
    _latencies_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=RECENT_STEPS))
    _marks: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    @property
    def num_episodes(self) -> int:
        """Finished episodes."""
        return sum(returns.count for returns in self.by_version.values())

    def add_step(self, now_s: float, latency_s: float, num_rows: int, version: int) -> None:
        """Count a vector step that ended now."""
        self.num_steps += num_rows
        self.version = max(self.version, version)
        self._latencies_s.append(latency_s)
        self._marks.append((now_s, self.num_steps))
        while len(self._marks) > 2 and self._marks[0][0] < now_s - SPEED_WINDOW_S:
            self._marks.popleft()

    def add_episode(self, version: int, episode_return: float) -> None:
        """Count a finished episode."""
        self.by_version.setdefault(version, Returns()).add(episode_return)
        self._recent_returns.append(episode_return)

    def steps_per_s(self, now_s: float) -> float:
        """Environment steps per second, lately."""
        if not self._marks:
            return 0.0
        first_s, first = self._marks[0]
        return (self.num_steps - first) / (now_s - first_s) if now_s > first_s else 0.0

    def latency_ms(self, percent: float) -> float:
        """A percentile of the recent steps' round trips; 0 before the first."""
        return float(np.percentile(self._latencies_s, percent)) * 1000 if self._latencies_s else 0.0

    def line(self, now_s: float) -> str:
        """Return one line for people, of at most LINE_WIDTH characters; the return is of the recent episodes."""
        recent = self._recent_returns
        mean = short(sum(recent) / len(recent), 4) if recent else "-"
        latency = f"p50 {short(self.latency_ms(50), 3)} p99 {short(self.latency_ms(99), 3)} ms"
        # Who waits does not ask how fast it was before.
        end = f"{self.num_away} waiting" if self.num_away else latency
        return (
            f"episodes {self.num_episodes}  return {mean}  {self.steps_per_s(now_s):.0f} steps/s  "
            f"version {self.version or '-'}  {end}"
        )[:LINE_WIDTH]

    def summary(self) -> list[str]:
        """Return the lines that end a run."""
        lines = [f"{'version':>10}  {'episodes':>8}  {'mean return':>11}  {'spread':>8}"]
        for version, returns in sorted(self.by_version.items()):
            lines.append(f"{version:>10}  {returns.count:>8}  {returns.mean:>11.3f}  {returns.spread:>8.3f}")
        lost = f", {self.num_interrupted} episodes lost with their session" if self.num_interrupted else ""
        lines.append(
            f"{self.num_episodes} episodes, {self.num_steps} steps{lost}; "
            f"step p50 {self.latency_ms(50):.2f} ms, p99 {self.latency_ms(99):.2f} ms"
        )
        return lines
