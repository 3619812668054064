"""What tenuto wants to reach beside its peers, judged from a run's rows."""

from __future__ import annotations

from peers.contenders import PEERS
from peers.rows import Row, Rows
from report import Goal, ratio


def goals_of(rows: Rows) -> list[Goal]:
    """Return all goals; those whose rows are missing are not judged."""

    def of_best_peer(sessions: int, mode: str, processes: int = 1, policy: str = "frameconv") -> float | None:
        row = rows.find(sessions, f"tenuto, {mode}", processes, policy)
        # The peers serve Frameconv alone, the cheaper of the two.
        peers = rows.find(sessions, f"tenuto, {mode}", processes)
        return ratio(row.steps_per_s, rows.best_peer(peers)) if row and peers else None

    def of_triton(sessions: int) -> float | None:
        ours, tritons = rows.find(sessions, "tenuto, unary"), rows.find(sessions, PEERS["triton"])
        return ratio(ours.steps_per_s, tritons.steps_per_s) if ours and tritons else None

    def batch(policy: str) -> Row | None:
        return rows.find(256, "tenuto, batch", policy=policy)

    def of_forward(policy: str) -> float | None:
        row = batch(policy)
        return ratio(row.steps_per_s, rows.forward(row)) if row else None

    def own_us(policy: str) -> float | None:
        row = batch(policy)
        return row.median.own_us if row and row.median else None

    def beside(what: str, got: float | None, wanted: float) -> Goal:
        return Goal(f"{what}: steps/s, of the best peer's", got, wanted, at_least=True)

    ours, tritons = _server_us(rows.find(16, "tenuto, stream", 16)), _server_us(rows.find(16, PEERS["triton"], 16))
    return [
        Goal("one session on a stream: p50, of the best peer's", _lone_p50(rows), 1),
        beside("16 sessions on a stream", of_best_peer(16, "stream"), 2),
        beside("256 sessions on a stream", of_best_peer(256, "stream"), 5),
        beside("16 processes, one session on a stream each", of_best_peer(16, "stream", 16), 1.5),
        Goal("16 processes, one session on a stream each: server CPU per step, of Triton's", ratio(ours, tritons), 0.5),
        *(Goal(f"{n} sessions, unary: steps/s, of Triton's", of_triton(n), 1, at_least=True) for n in (64, 256)),
        beside("StepBatch of 256, frameconv", of_best_peer(256, "batch"), 20),
        beside("StepBatch of 256, dnc", of_best_peer(256, "batch", policy="dnc"), 8),
        *(
            Goal(
                f"StepBatch of 256, {policy}: steps/s, of the bare forward pass's",
                of_forward(policy),
                0.75,
                at_least=True,
            )
            for policy in ("frameconv", "dnc")
        ),
        *(
            Goal(f"StepBatch of 256, {policy}: server µs per session, all but the forward pass", own_us(policy), 2)
            for policy in ("frameconv", "dnc")
        ),
        _longest_tail(rows),
    ]


def _lone_p50(rows: Rows) -> float | None:
    ours = rows.find(1, "tenuto, stream")
    peers = [found.p50_ms for name in PEERS.values() if (row := rows.find(1, name)) and (found := row.median)]
    return ratio(ours.median.p50_ms, min(peers)) if ours and ours.median and peers else None


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
