"""The client processes of one case, from the outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np

from tenuto_bench.cases import Case, Order, Outcome, Recording, Share

_CLOSE_S = 20.0
SAMPLED = 4
"""Sessions of a case that are recorded, in each process."""


class LoadError(Exception):
    """A client process ended before it had reported."""


class Clients:
    """Started with their sessions open, and set off together by :meth:`warm_up`."""

    def __init__(self, address: str, case: Case, warmup_s: float, seconds: float, sampled: int = SAMPLED) -> None:
        self.case, self._processes = case, list[subprocess.Popen[str]]()
        try:
            for numbers in case.shares():
                order = Order(address, case, numbers[0], len(numbers), sampled, warmup_s, seconds)
                self._processes.append(_start(order))
            self._await("ready")
        except BaseException:
            self.close()
            raise

    def warm_up(self) -> None:
        """Begin; returns where the measurement begins. Raises LoadError."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        self._await("measuring")

    def shares(self) -> list[Share]:
        """Wait for the end of the measurement; the sessions stay open. Raises LoadError."""
        shares: list[Share] = []
        for process in self._processes:
            told = _line(process)
            if not told:
                raise LoadError(_last_words(process))
            share = json.loads(told)
            share["recordings"] = [Recording(**recording) for recording in share["recordings"]]
            shares.append(Share(**share))
        return shares

    def close(self) -> None:
        """Have the sessions closed, and end what still runs."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _await(self, word: str) -> None:
        for process in self._processes:
            if _line(process) != word:
                raise LoadError(_last_words(process))


def outcome(case: Case, shares: list[Share], server_s: float | None, batch_rows: float | None) -> Outcome:
    """Put the shares of the processes together. The answers have not been checked yet."""
    steps = sum(share.steps for share in shares)
    latencies = np.concatenate([share.latencies_ms for share in shares])
    p50, p90, p99, longest = np.percentile(latencies, [50, 90, 99, 100])
    errors = sum((Counter(share.errors) for share in shares), Counter[str]())
    return Outcome(
        case,
        steps_per_s=sum(share.steps / share.seconds for share in shares),
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        max_ms=float(longest),
        client_us=1e6 * sum(share.cpu_s for share in shares) / max(steps, 1),
        server_us=None if server_s is None else 1e6 * server_s / max(steps, 1),
        batch_rows=batch_rows,
        errors=dict(errors),
        checked=0,
        wrong=0,
    )


def _start(order: Order) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tenuto_bench.load"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(order)) + "\n")
    process.stdin.flush()
    return process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _last_words(process: subprocess.Popen[str]) -> str:
    process.kill()
    errors = process.communicate()[1].strip()
    return f"a client process ended: {errors.splitlines()[-1] if errors else 'without a word'}"
