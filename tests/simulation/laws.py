"""The laws of a session, checked against everything that happens. Knows nothing of how tenuto keeps them.

Two views: what a server answers, also where the answer is lost on its way, and what a client is told, which must be
what an undisturbed run would have told it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulation.rolling import Weights, action_of, advance, value_of
from tenuto_proto.v1 import policy_pb2 as pb

ORDER = "each step once, in order"
SAME = "actions are those of an undisturbed run"
REPEAT = "a repeated step gets the stored reply"
SLOT = "a slot is at most once in a batch"
CAPACITY = "free and leased slots add up to the capacity"
VERSION = "an episode stays on its version"
DURABLE = "durable_step is in the store"
LOST = "nothing is lost that was promised to last"
SAVED = "when all is quiet everything is in the store"
ANSWERED = "every waiter is answered"
PRIVATE = "a session of another principal does not exist"
LIVE = "when the faults stop everybody gets on"
ERROR = "no unexpected error"
REFUSED = "what breaks the rules is refused"


class BrokenLawError(Exception):
    """A history that must not be."""

    def __init__(self, law: str, text: str) -> None:
        super().__init__(law, text)
        self.law, self.text = law, text

    def __str__(self) -> str:
        return f"{self.law}: {self.text}"


@dataclass
class Chain:
    """What a session must be, as its client knows it."""

    session_id: int
    seed: int
    greedy: bool = False
    pinned: int = 0
    born_s: float = 0.0
    """When its first step was sent."""
    last_s: float = 0.0
    """When a step of it was last answered."""
    num_downs: int = 0
    """Of servers, when it was opened."""
    index: int = 0
    version: int = 0
    num_episodes: int = 0
    memories: dict[Weights, int] = field(default_factory=lambda: {})
    """By the weights that may have computed it: mostly one."""
    durable: int = 0

    def apply(self, seen: tuple[int, int], begins: bool, candidates: list[Weights]) -> None:
        """Take a step. ``candidates``: of the version, where an episode begins."""
        if begins or not self.index:
            self.memories = dict.fromkeys(candidates, 0)
            self.num_episodes += 1
        for weights, memory in self.memories.items():
            self.memories[weights] = advance(memory, seen, self.seed, self.index, weights, self.greedy)
        self.index += 1


class Laws:
    """Notes the first law that is broken and stops the run."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.error: BrokenLawError | None = None

    def broken(self, law: str, text: str) -> None:
        """Say so. Production code may catch what is raised, so nothing is."""
        if self.error is None:
            self.world.trace("BROKEN", law, text)
            self.error = BrokenLawError(law, text)
            self.world.loop.stop()

    def require(self, condition: Any, law: str, text: str) -> None:
        if not condition:
            self.broken(law, text)

    # ------------------------------------------------------------------ what servers do

    def batch(self, process: Any, rows: Any) -> None:
        """Each batch, before it runs."""
        slots = rows.slots.tolist()
        if len(set(slots)) != len(slots):
            self.broken(SLOT, f"slots {slots}")
        columns = _leases(rows), rows.step_indices.tolist(), rows.session_ids.tolist()
        for lease, index, session_id in zip(*columns, strict=True):
            before = process.applied.get(lease)
            if before is not None and index != before + 1:
                what = f"session {session_id} at {process.name}"
                self.broken(ORDER, f"{what}: step {index} runs after step {before} was applied")

    def applied(self, process: Any, rows: Any, finite: Any) -> None:
        """Each batch, after its state is in the arena."""
        for lease, index, is_applied in zip(_leases(rows), rows.step_indices.tolist(), finite.tolist(), strict=True):
            if is_applied:
                process.applied[lease] = index

    def replied(self, process: Any, method: str, request: Any, response: Any) -> None:
        """Each answer that a server gives."""
        if method == "Step":
            self._answered(
                process, request.session_id, request.step_index, response.version, response.action.data,
                response.durable_step, (response.timings.queue_us, response.timings.batch_size),
            )  # fmt: skip
            self.require(response.step_index == request.step_index, ORDER, f"asked {request}, got {response}")
        elif method in ("StepBatch", "StepStream"):
            failed = {error.row for error in response.errors}
            for error in response.errors:
                self._failed(process, method, pb.ErrorReason.Name(error.error.reason))
            n = len(request.session_ids)
            size = len(response.actions.data) // n if n else 0
            durable_steps = response.durable_steps or [0] * n
            for row, (session_id, index) in enumerate(zip(request.session_ids, request.step_indices, strict=True)):
                if row not in failed:
                    action = response.actions.data[row * size : (row + 1) * size]
                    self._answered(process, session_id, index, response.versions[row], action, durable_steps[row], None)

    def _answered(
        self, process: Any, session_id: int, index: int, version: int, action: bytes, durable: int, times: Any
    ) -> None:
        world = self.world
        world.num_answers += 1
        world.trace("answer", process.name, session_id % 10000, index, version, action.hex(), durable)
        known = process.replies.setdefault(session_id, {})
        what = f"session {session_id}, step {index} at {process.name}"
        if index in known:
            before_version, before_action, before_times = known[index]
            same = (before_version, before_action) == (version, action)
            same = same and (None in (times, before_times) or times == before_times)
            self.require(same, REPEAT, f"{what}: got {version, action, times}, first {known[index]}")
        elif known:
            last = max(known)
            if index < last and world.is_shared:
                # Another server went on with an older copy, stored more of it, and this one has taken that over.
                known.clear()
            else:
                self.require(index > last, ORDER, f"{what} comes after step {last}")
            if len(known) > 3:
                del known[min(known)]
        if world.is_durable and durable:
            there = world.disk.num_steps(session_id)
            is_there = there >= durable or session_id in world.closed_ids or session_id in world.disk.torn
            self.require(is_there, DURABLE, f"{what}: durable_step {durable}, in the store {there}")
        known[index] = version, action, times if times is not None else known.get(index, (0, 0, None))[2]

    def refused(self, process: Any, method: str, request: Any, trailing: Any) -> None:
        """Each refusal of a unary call."""
        if process.is_dead:
            # Nobody hears it.
            return
        reason = reason_of(trailing)
        self.world.trace("refused", process.name, method, reason)
        self._failed(process, method, reason)

    def _failed(self, process: Any, method: str, reason: str) -> None:
        if reason == "COMPUTE_FAILED" and not self.world.may_fail:
            self.broken(ERROR, f"{method} at {process.name}: {reason}, and nothing fails here")

    def stopped(self, process: Any, methods: list[str]) -> None:
        """A server that has stopped has answered everybody."""
        self.require(not methods, ANSWERED, f"{process.name} ended with calls under way: {methods}")

    def tables(self, process: Any) -> None:
        """What must hold of a server at any time."""
        for policy in process.server.registry:
            pool, sessions = policy.sessions.pool, policy.sessions
            leased = np.flatnonzero(pool.leased[: pool.capacity])
            free = pool._free
            is_whole = len(leased) + len(free) + pool.capacity - pool.num_touched == pool.capacity
            is_whole = is_whole and not set(free) & set(leased.tolist()) and len(set(free)) == len(free)
            self.require(is_whole, CAPACITY, f"{process.name}: leased {leased.tolist()}, free {free}")
            open_ids = sessions.session_id[leased[~sessions.closing[leased]]].tolist()
            self.require(
                sorted(open_ids) == sessions.session_ids(None), CAPACITY, f"{process.name}: slots without their session"
            )

    # ------------------------------------------------------------------ what clients see

    def stepped(
        self, chain: Chain, seen: tuple[int, int], begins: bool, since_s: float, *, index: int, version: int,
        action: int, value: float | None, durable: int | None,
    ) -> None:  # fmt: skip
        """A client's step has succeeded."""
        world = self.world
        what = f"session {chain.session_id}, step {index}"
        world.trace("stepped", chain.session_id % 10000, index, version, action)
        world.num_steps += 1
        self.require(index == chain.index, ORDER, f"{what}: expected step {chain.index}")
        begins = begins or not chain.index
        if not begins:
            self.require(version == chain.version, VERSION, f"{what}: version {version}, began with {chain.version}")
        elif chain.pinned:
            self.require(version == chain.pinned, VERSION, f"{what}: version {version}, pinned {chain.pinned}")
        candidates = world.repository.weights_between(version, since_s - 10) if begins else []
        if begins:
            self.require(candidates, VERSION, f"{what}: version {version} was never published")
        chain.apply(seen, begins, candidates)
        chain.version = version
        left = {w: m for w, m in chain.memories.items() if action_of(m) == action}
        if not left:
            expected = [action_of(m) for m in chain.memories.values()]
            self.broken(SAME, f"{what}: action {action}, expected {expected}")
        chain.memories, chain.last_s = left, world.loop.now_s
        if value is not None and left:
            self.require(value in {value_of(m) for m in left.values()}, SAME, f"{what}: value {value}")
        if durable is not None:
            self.require(durable <= index + 1, DURABLE, f"{what}: durable_step {durable}")
            chain.durable = max(chain.durable, durable)

    def lost(self, chain: Chain | None, error: Any, why_not: str = "") -> None:
        """A client is told that its session is gone."""
        if chain is None or self.world.may_lose(chain, error):
            self.world.count("episode lost")
            return
        self.broken(LOST, f"session {chain.session_id} at step {chain.index}: {error!r} {why_not}")


def _leases(rows: Any) -> list[tuple[int, int]]:
    """What is one session's for as long as it stays in its slot."""
    return list(zip(rows.slots.tolist(), rows.generations.tolist(), strict=True))


def reason_of(trailing: Any) -> str:
    """Name of the reason in a refusal's trailing metadata."""
    from tenuto_proto.errors import STATUS_DETAILS_KEY, decode_status

    for key, value in trailing:
        if key == STATUS_DETAILS_KEY:
            decoded = decode_status(value)
            return "" if decoded is None else pb.ErrorReason.Name(decoded[0])
    return ""
