"""What tenuto wants to reach beside its peers, judged from a run's rows."""

from __future__ import annotations

from peers.contenders import PEERS
from peers.rows import Row, Rows
from report import Goal, ratio


def goals_of(rows: Rows) -> list[Goal]:
    """Return all goals; those whose rows are missing are not judged."""

    def of_best_peer(sessions: int, mode: str, processes: int = 1) -> float | None:
        row = rows.find(sessions, f"tenuto, {mode}", processes)
        return rows.of_best_peer(row) if row else None

    def own_us(policy: str) -> float | None:
        found = rows.find(256, "tenuto, batch", policy=policy)
        return found.median.own_us if found and found.median else None

    ours, tritons = _server_us(rows.find(16, "tenuto, stream", 16)), _server_us(rows.find(16, PEERS["triton"], 16))

    def beside(what: str, got: float | None) -> Goal:
        return Goal(f"{what}: steps/s, of the best peer's", got, 1, at_least=True)

    return [
        *(beside(f"sessions on a stream, {n}", of_best_peer(n, "stream")) for n in (1, 16, 64, 256)),
        beside("16 processes, one on a stream each", of_best_peer(16, "stream", 16)),
        Goal("16 processes, one on a stream each: server CPU per step, of Triton's", ratio(ours, tritons), 0.5),
        *(beside(f"sessions, unary, {n}", of_best_peer(n, "unary")) for n in (64, 256)),
        *(
            Goal(f"StepBatch of 256, {policy}: server µs per session, all but the forward pass", own_us(policy), 2)
            for policy in ("frameconv", "dnc")
        ),
        _longest_tail(rows),
    ]


def _server_us(row: Row | None) -> float | None:
    return row.median.server_us if row and row.median else None


def _longest_tail(rows: Rows) -> Goal:
    """p99 by p50, in the row where that is largest."""
    tails = [
        (found.p99_ms / found.p50_ms, f"{row.key.policy}, {row.key.name}, {row.key.sessions} in {row.key.processes}")
        for row in rows
        if row.key.kind == "tenuto" and (found := row.median)
    ]
    got, where = max(tails, default=(None, "no row"))
    return Goal(f"p99 by p50, where it is longest ({where})", got, 3)
