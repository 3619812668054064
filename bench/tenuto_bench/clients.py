"""The client processes of one case, from the outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from tenuto_bench.cases import Case, Order, Outcome, Recording, Share

_CLOSE_S = 20.0
_START_S = 60.0
SAMPLED = 4
"""Sessions of a case that are recorded, in each process."""
OWN_CLIENT = (sys.executable, "-W", "ignore", "-m", "tenuto_bench.load")
"""The command of a client process with tenuto's client. Others speak the same lines: see loops.py."""


class LoadError(Exception):
    """A client process ended, or hung, before it had reported."""


class Clients:
    """Started with their sessions open, and set off together by :meth:`warm_up`."""

    def __init__(
        self,
        address: str,
        case: Case,
        warmup_s: float,
        seconds: float,
        sampled: int = SAMPLED,
        command: Sequence[str] = OWN_CLIENT,
        access_files: Mapping[str, str] | None = None,
    ) -> None:
        """``access_files``: paths, by the names of AccessFiles' fields."""
        self.case, self._processes = case, list[subprocess.Popen[str]]()
        self._limit_s, self._hung = _START_S + warmup_s + 2 * seconds, False
        self._watchdog = threading.Timer(self._limit_s, self._give_up)
        self._watchdog.start()
        try:
            for numbers in case.shares():
                order = Order(
                    address, case, numbers[0], len(numbers), sampled, warmup_s, seconds, dict(access_files or {})
                )
                self._processes.append(_start(command, order))
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
                raise self._end_of(process)
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
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
        self._watchdog.cancel()

    def _give_up(self) -> None:
        self._hung = True
        for process in self._processes:
            process.kill()

    def _await(self, word: str) -> None:
        for process in self._processes:
            if _line(process) != word:
                raise self._end_of(process)

    def _end_of(self, process: subprocess.Popen[str]) -> LoadError:
        process.kill()
        said = process.communicate()[1].strip().splitlines()
        if self._hung:
            return LoadError(f"a client process hung: got no report in {self._limit_s:g} s")
        return LoadError(f"a client process ended: {said[-1] if said else 'without a word'}")


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


def _start(command: Sequence[str], order: Order) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(order)) + "\n")
    process.stdin.flush()
    return process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
