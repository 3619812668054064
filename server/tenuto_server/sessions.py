"""The sessions of one policy: who they are, which step comes next, what the last reply was.

Pure bookkeeping without I/O: the clock's reading is handed in, the event loop is the only caller. Columns are numpy
arrays indexed by slot, so that a batch is admitted and committed by a handful of array operations.

Legend: C capacity, n rows of a request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import SlotPool, Slots
from tenuto_server.errors import Refusal, session_arriving, session_exists, unknown_session

if TYPE_CHECKING:
    from tenuto_server.batch_queue import Ticket

_ONE = np.uint64(1)
_NOTHING: Mapping[int, int] = MappingProxyType({})


class Door(Enum):
    """Which steps are let in."""

    OPEN = "all"
    NO_EPISODES = "those of running episodes"
    SHUT = "none"


_CAPACITY_RETRY_S = 1.0
"""Seconds after which somebody may have closed a session."""
MAX_REMEMBERED = 65_536
"""Ended sessions whose fate is remembered, so that a late call learns why."""


@dataclass(frozen=True)
class SessionOptions:
    """What a client chose when it opened a session."""

    pinned_version: int
    """0: each episode begins with the newest version."""
    seed: int
    deterministic: bool


@dataclass(frozen=True)
class Ended:
    """What is remembered of a session that is gone."""

    reason: int
    """SESSION_CLOSED or SESSION_EXPIRED."""
    num_steps: int
    num_episodes: int
    owner: str = ""
    """Name of the principal that had it."""


@dataclass(eq=False, slots=True)
class Admission:
    """What :meth:`SessionTable.admit` decided about each of n rows."""

    slots: Slots
    """[n]; the spare slot where the row was refused."""
    episode_starts: NDArray[np.bool_]
    """[n]; true also for the first step of a session."""
    versions: NDArray[np.int64]
    """[n]; the version that computes the step."""
    run: NDArray[np.int64]
    """Rows that advance now. Their sessions are busy until commit or release."""
    joined: dict[int, Ticket] = field(default_factory=lambda: {})
    """Rows whose very step is already under way: row -> its ticket."""
    refused: dict[int, Refusal] = field(default_factory=lambda: {})
    """Rows that cannot be carried out. Rows in none of the three are answered from the stored reply."""


class SessionTable:
    """Owns the slots of one policy's sessions."""

    def __init__(self, capacity: int, server_epoch: int) -> None:
        self.pool = SlotPool(capacity)
        self._server_epoch = server_epoch
        self._slots: dict[int, int] = {}
        self._ended: OrderedDict[int, Ended] = OrderedDict()
        self._arriving: set[int] = set()
        self._owner_numbers: dict[str, int] = {"": 0}
        self._owner_names: list[str] = [""]
        rows = capacity + 1
        self.session_id = np.zeros(rows, np.uint64)
        self.owner = np.zeros(rows, np.int32)
        """Number of the principal that the session belongs to."""
        self.next_index = np.zeros(rows, np.uint64)
        self.seed = np.zeros(rows, np.uint64)
        self.deterministic = np.zeros(rows, np.bool_)
        self.pinned = np.zeros(rows, np.int64)
        self.version = np.zeros(rows, np.int64)
        self.next_version = np.zeros(rows, np.int64)
        self.busy = np.zeros(rows, np.bool_)
        self.closing = np.zeros(rows, np.bool_)
        self.last_active_s = np.zeros(rows, np.float64)
        self.num_episodes = np.zeros(rows, np.int64)
        self.episode_return = np.zeros(rows, np.float64)
        self.has_reward = np.zeros(rows, np.bool_)
        self.last_reward = np.full(rows, np.nan, np.float32)
        self.durable_index = np.full(rows, -1, np.int64)
        """Steps that the store holds; -1: it does not know the session."""
        self.exported = np.zeros(rows, np.bool_)
        """Stopped, since they go on elsewhere."""
        self.ticket = np.empty(rows, object)
        # The spare slot is no session's: nothing that finds it is the usual case.
        self.busy[capacity] = True

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, session_id: int) -> bool:
        return session_id in self._slots

    def has(self, session_id: int, owner: str | None = "") -> bool:
        """Whether it is an open session of this principal; None: of anybody."""
        slot = self._slots.get(session_id)
        return slot is not None and (owner is None or self._owner_names[self.owner[slot]] == owner)

    def owner_number(self, name: str) -> int:
        """Return what stands in the column of owners for a principal; -1 where it never had a session here."""
        return self._owner_numbers.get(name, -1)

    def owner_name(self, slot: int) -> str:
        """Name of the principal that the session in this slot belongs to."""
        return self._owner_names[self.owner[slot]]

    def num_of(self, owner: str) -> int:
        """Open sessions of a principal."""
        mine = self.pool.leased & ~self.closing & (self.owner == self.owner_number(owner))
        return int(np.count_nonzero(mine))

    def without(self, session_ids: Iterable[int]) -> set[int]:
        """Return those that are no open session's."""
        return set(session_ids) - self._slots.keys()

    @property
    def num_begun(self) -> int:
        """Open sessions that have taken a step, or are taking their first."""
        begun = self.pool.leased & ~self.closing & ((self.next_index > 0) | self.busy)
        return int(begun.sum())

    def num_active_since(self, since_s: float) -> int:
        """Sessions that were opened or took a step after a time."""
        return int(np.count_nonzero(self.last_active_s[: self.pool.num_touched] > since_s))

    def by_state(self) -> dict[str, int]:
        """Slots in use: ``opened`` (no step yet), ``waiting`` (for a next step), ``stepping``, ``ending`` (after the
        step that is under way).
        """
        leased = self.pool.leased
        ending, stepping = leased & self.closing, leased & self.busy & ~self.closing
        opened = leased & ~self.busy & (self.next_index == 0)
        counts = {"opened": opened, "stepping": stepping, "ending": ending, "waiting": leased & ~self.busy & ~opened}
        return {state: int(slots.sum()) for state, slots in counts.items()}

    def by_version(self) -> dict[int, int]:
        """Sessions by the version of their running episode; those that have not begun one are in none."""
        versions, counts = np.unique(self.version[self.pool.leased], return_counts=True)
        return {int(v): int(n) for v, n in zip(versions, counts, strict=True) if v > 0}

    def session_ids(self, owner: str | None = "") -> list[int]:
        """Ids of a principal's open sessions, ascending; None: of everybody's."""
        if owner is None:
            return sorted(self._slots)
        number = self.owner_number(owner)
        return sorted(session_id for session_id, slot in self._slots.items() if self.owner[slot] == number)

    # ------------------------------------------------------------------ open and end

    def open(self, session_id: int, options: SessionOptions, now_s: float, owner: str = "") -> int:
        """Lease a slot for a principal and return it. The same open again, before any step, returns the same slot.

        Raises Refusal: SESSION_EXISTS, SESSION_CLOSED or SESSION_EXPIRED (an id is not used twice), CAPACITY_REACHED.
        """
        slot = self._slots.get(session_id)
        if slot is not None:
            is_unused = self.next_index[slot] == 0 and not self.busy[slot]
            if is_unused and self.options(slot) == options and self.owner_name(slot) == owner:
                self.last_active_s[slot] = now_s
                return slot
            raise session_exists(session_id)
        if (ended := self._ended.get(session_id)) is not None:
            # What became of a session is told to its owner alone.
            raise self._refuse_unknown(session_id, owner) if ended.owner == owner else session_exists(session_id)
        slot = self.pool.lease()
        if slot is None:
            message = f"sessions: got one more, expected at most {self.pool.capacity} at once"
            raise Refusal(pb.CAPACITY_REACHED, message, retry_after_s=_CAPACITY_RETRY_S)
        self._slots[session_id] = slot
        self.session_id[slot] = session_id
        self.owner[slot] = self._number_owner(owner)
        self.seed[slot], self.deterministic[slot] = options.seed, options.deterministic
        self.pinned[slot], self.version[slot], self.next_version[slot] = options.pinned_version, 0, 0
        self.next_index[slot] = self.num_episodes[slot] = 0
        self.busy[slot] = self.closing[slot] = self.has_reward[slot] = False
        self.episode_return[slot] = 0.0
        self.durable_index[slot], self.exported[slot] = -1, False
        self.last_active_s[slot] = now_s
        return slot

    def options(self, slot: int) -> SessionOptions:
        """What the session in this slot was opened with."""
        return SessionOptions(int(self.pinned[slot]), int(self.seed[slot]), bool(self.deterministic[slot]))

    def find(self, session_id: int, owner: str | None = "") -> int:
        """Return the slot of a principal's open session; None: of anybody's.

        Raises Refusal (SESSION_UNKNOWN, _CLOSED, _EXPIRED). One of somebody else is as unknown as one of nobody.
        """
        if not self.has(session_id, owner):
            raise self._refuse_unknown(session_id, owner)
        return self._slots[session_id]

    def slot_of(self, session_id: int) -> int:
        """Return the slot of a session that is open."""
        return self._slots[session_id]

    def revive(self, session_id: int) -> None:
        """Remember no longer how a session ended: it comes back from elsewhere."""
        self._ended.pop(session_id, None)

    def arrive(self, slot: int) -> None:
        """Let no step in: the session is here, its state is still on its way to the device."""
        self._arriving.add(int(self.session_id[slot]))
        self.exported[slot] = True

    def arrived(self, slot: int) -> None:
        """Let steps in."""
        self._arriving.discard(int(self.session_id[slot]))
        self.exported[slot] = False

    def is_arriving(self, session_id: int) -> bool:
        """Whether a session's state is still on its way to the device."""
        return session_id in self._arriving

    def forget(self, slot: int) -> None:
        """Drop a session that is not busy, as if it had never been here."""
        assert not self.busy[slot], "a session with a step under way cannot be forgotten"
        session_id = int(self.session_id[slot])
        del self._slots[session_id]
        self._arriving.discard(session_id)
        self.last_reward[slot] = np.nan
        self._free(np.array([slot]))

    def is_older_copy(self, session_id: int, num_steps: int) -> bool:
        """Whether a session is here as it was when it was exported, and has taken steps elsewhere since."""
        slot = self._slots.get(session_id)
        if slot is None or self.busy[slot] or session_id in self._arriving:
            return False
        return bool(self.exported[slot]) and int(self.next_index[slot]) < num_steps

    def ended(self, session_id: int, owner: str | None = "") -> Ended | None:
        """What is remembered of a principal's ended session; None: of anybody's."""
        ended = self._ended.get(session_id)
        return ended if ended is not None and owner in (None, ended.owner) else None

    def expired(self, session_id: int) -> Ended | None:
        """What is remembered of a session that was idle for too long: perhaps since it goes on at another server."""
        ended = self._ended.get(session_id)
        return ended if ended is not None and ended.reason == pb.SESSION_EXPIRED else None

    def end(self, slot: int, reason: int, last_reward: float = np.nan) -> tuple[Ended, list[tuple[int, float]]]:
        """End a session. Its slot is free at once, or, while a step of it is under way, after that step.

        ``last_reward`` belongs to the session's last action; NaN is not known. Returns how it ended and, as
        :meth:`commit` does, the episode that this finished; after a step under way :meth:`commit` returns it.
        """
        del self._slots[int(self.session_id[slot])]
        self._arriving.discard(int(self.session_id[slot]))
        ended = self._remember(slot, reason)
        self.last_reward[slot] = last_reward
        if self.busy[slot]:
            self.closing[slot] = True
            return ended, []
        return ended, self._free(np.array([slot]))

    def idle_slots(self, now_s: float, idle_timeout_s: float) -> list[int]:
        """Slots of the sessions without a step for longer than the timeout. A busy session is never idle."""
        idle = self.pool.leased & ~self.busy & (now_s - self.last_active_s > idle_timeout_s)
        return np.flatnonzero(idle).tolist()

    def changed_slots(self, among: Slots | None = None) -> Slots:
        """Slots of sessions with steps that the store does not hold yet, all or those among some."""
        slots = np.arange(self.pool.num_touched) if among is None else among
        changed = self.next_index[slots].astype(np.int64) > self.durable_index[slots]
        changed &= self.pool.leased[slots] & ~self.closing[slots]
        if self._arriving:
            # Their state may never come.
            changed &= ~np.isin(self.session_id[slots], np.array(list(self._arriving), np.uint64))
        return slots[changed]

    def num_changed(self) -> int:
        """Sessions with steps that the store does not hold yet."""
        return len(self.changed_slots())

    def versions_in_use(self) -> set[int]:
        """Versions that a running episode, a running step or a pin holds."""
        leased = self.pool.leased
        held = (column[leased] for column in (self.version, self.next_version, self.pinned))
        return set(np.unique(np.concatenate(list(held))).tolist()) - {0}

    # ------------------------------------------------------------------ admit, then commit or release

    def admit(
        self,
        session_ids: NDArray[np.uint64],
        step_indices: NDArray[np.uint64],
        episode_starts: NDArray[np.bool_],
        refused: dict[int, Refusal],
        newest_version: int,
        door: Door = Door.OPEN,
        owners: NDArray[np.int32] | None = None,
        replayed: Mapping[int, int] = _NOTHING,
        held: Container[int] = (),
    ) -> Admission:
        """Decide about n rows: run, join, answer from the stored reply, or refuse. Rows to run become busy.

        ``refused`` are rows that an earlier station turned down; they touch no session. ``owners``: [n], the
        :meth:`owner_number` of who sends each row; None: all 0. ``replayed``: row -> the version that answered it
        before, which must be among the ``held``.
        """
        n = len(session_ids)
        owners = np.zeros(n, np.int32) if owners is None else owners
        spare = self.pool.capacity
        ids: list[int] = session_ids.tolist()
        slots = np.array([self._slots.get(i, spare) for i in ids], np.int64)
        others = self.owner[slots] != owners
        if np.count_nonzero(others):
            # From here on a session of somebody else is one that does not exist.
            slots[others] = spare
        starts = episode_starts | (step_indices == 0)
        # The usual case, decided at once: every row is the next step of another idle session.
        usual = (step_indices == self.next_index[slots]) & ~(self.busy[slots] | self.exported[slots])
        if door is not Door.OPEN:
            usual &= ~starts if door is Door.NO_EPISODES else False
        if replayed:
            refused = refused | self._misfits(replayed, slots, usual, starts, held)
        joined: dict[int, Ticket] = {}
        run = np.arange(n)
        if refused or np.count_nonzero(usual) != n or len(set(ids)) != n:
            refused = dict(refused)
            counts: dict[int, int] = {}
            for session_id in ids:
                counts[session_id] = counts.get(session_id, 0) + 1
            for row in range(n):
                if row in refused:
                    usual[row] = False
                elif counts[ids[row]] > 1:
                    usual[row] = False
                    refused[row] = Refusal(
                        pb.SESSION_REPEATED, f"session {ids[row]}: got {counts[ids[row]]} rows, expected one"
                    )
                elif not usual[row]:
                    owner = int(owners[row])
                    verdict = self._unusual(ids[row], int(slots[row]), int(step_indices[row]), owner)
                    if isinstance(verdict, Refusal):
                        refused[row] = verdict
                    elif verdict is not None:
                        joined[row] = verdict
            for row in refused:
                slots[row] = spare
            run = np.flatnonzero(usual)
        versions = self.version[slots]
        if np.count_nonzero(starts):
            pinned = self.pinned[slots]
            versions = np.where(starts, np.where(pinned > 0, pinned, newest_version), versions)
        for row, version in replayed.items():
            versions[row] = version
        running = slots[run]
        self.busy[running] = True
        self.next_version[running] = versions[run]
        return Admission(slots, starts, versions, run, joined, refused)

    def _misfits(
        self,
        replayed: Mapping[int, int],
        slots: Slots,
        usual: NDArray[np.bool_],
        starts: NDArray[np.bool_],
        held: Container[int],
    ) -> dict[int, Refusal]:
        """Refuse the rows whose version of before cannot compute them again."""
        refused: dict[int, Refusal] = {}
        for row, version in replayed.items():
            if not usual[row]:
                continue
            if version not in held:
                message = f"replayed_version: got {version}, which the server does not hold; it looks for it"
                refused[row] = Refusal(pb.VERSION_UNKNOWN, message)
            elif not starts[row] and version != self.version[slots[row]]:
                message = f"replayed_version: got {version}, expected {self.version[slots[row]]}, the episode's"
                refused[row] = Refusal(pb.VERSION_UNKNOWN, message)
        return refused

    def _unusual(self, session_id: int, slot: int, step_index: int, owner: int) -> Refusal | Ticket | None:
        """Decide about a row that is not simply the next step: a refusal, the ticket to join, or None for a replay."""
        if slot == self.pool.capacity:
            # Who has no number has no session that could have ended.
            if owner < 0:
                return unknown_session(session_id, self._server_epoch)
            return self._refuse_unknown(session_id, self._owner_names[owner])
        expected = int(self.next_index[slot])
        if session_id in self._arriving:
            return session_arriving(session_id)
        if self.exported[slot]:
            return Refusal(pb.SESSION_EXPORTED, f"session {session_id}: was exported after {expected} steps")
        if self.busy[slot]:
            if step_index == expected:
                return self.ticket[slot]
            return Refusal(
                pb.STEP_IN_FLIGHT, f"session {session_id}: step {expected} is under way, got step {step_index}"
            )
        if step_index == expected:
            return Refusal(pb.DRAINING, "the server is shutting down")
        if step_index + 1 == expected:
            return None
        return Refusal(
            pb.STEP_INDEX_MISMATCH,
            f"session {session_id} step_index: got {step_index}, expected {expected}",
            {"expected": str(expected)},
        )

    def commit(
        self, slots: Slots, episode_starts: NDArray[np.bool_], rewards: NDArray[np.float32], now_s: float
    ) -> list[tuple[int, float]]:
        """Record that each slot's step was applied; the sessions are no longer busy.

        ``rewards`` belong to the actions before this step; NaN is not known. Returns the episodes that this step
        found finished and whose rewards are known: (version, return).
        """
        finished = self._credit(slots, episode_starts, rewards)
        if np.count_nonzero(episode_starts):
            self.num_episodes[slots] += episode_starts
            # Within an episode it stays the same.
            self.version[slots] = self.next_version[slots]
        self.next_index[slots] += _ONE
        return finished + self._settle(slots, now_s)

    def release(self, slots: Slots, now_s: float) -> list[tuple[int, float]]:
        """Record that the slots' steps were not applied: the sessions are where they were, and no longer busy.

        Returns the episodes that end with sessions that were closed meanwhile, as :meth:`commit` does.
        """
        self.next_version[slots] = self.version[slots]
        return self._settle(slots, now_s)

    def _credit(
        self, slots: Slots, episode_starts: NDArray[np.bool_], rewards: NDArray[np.float32]
    ) -> list[tuple[int, float]]:
        known = np.isfinite(rewards) & (self.version[slots] > 0)
        if num_known := np.count_nonzero(known):
            of = slots if num_known == len(slots) else slots[known]
            self.episode_return[of] += rewards if of is slots else rewards[known]
            self.has_reward[of] = True
        if not np.count_nonzero(episode_starts):
            return []
        begun = slots[episode_starts]
        ended = begun[self.has_reward[begun]]
        finished = list(zip(self.version[ended].tolist(), self.episode_return[ended].tolist(), strict=True))
        self.episode_return[begun] = 0.0
        self.has_reward[begun] = False
        return finished

    def _settle(self, slots: Slots, now_s: float) -> list[tuple[int, float]]:
        assert np.count_nonzero(self.busy[slots]) == len(slots), "a step was settled twice"
        self.busy[slots] = False
        self.ticket[slots] = None
        self.last_active_s[slots] = now_s
        closing = self.closing[slots]
        if not np.count_nonzero(closing):
            return []
        closing = slots[closing]
        self.closing[closing] = False
        for slot in closing.tolist():
            self._remember(slot, pb.SESSION_CLOSED)
        return self._free(closing)

    def _free(self, slots: Slots) -> list[tuple[int, float]]:
        """Give the slots of ended sessions back; an episode whose last reward is known is finished."""
        last = slots[np.isfinite(self.last_reward[slots])]
        finished = self._credit(last, np.ones(len(last), np.bool_), self.last_reward[last])
        for slot in slots.tolist():
            self.pool.release(slot)
        return finished

    def _remember(self, slot: int, reason: int) -> Ended:
        """Note how a session ended, with its counts as they are now."""
        ended = Ended(reason, int(self.next_index[slot]), int(self.num_episodes[slot]), self.owner_name(slot))
        self._ended[int(self.session_id[slot])] = ended
        if len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)
        return ended

    def _number_owner(self, name: str) -> int:
        number = self._owner_numbers.setdefault(name, len(self._owner_names))
        if number == len(self._owner_names):
            self._owner_names.append(name)
        return number

    def _refuse_unknown(self, session_id: int, owner: str | None) -> Refusal:
        ended = self.ended(session_id, owner)
        if ended is None:
            return unknown_session(session_id, self._server_epoch)
        how = "closed" if ended.reason == pb.SESSION_CLOSED else "idle for too long"
        return Refusal(ended.reason, f"session {session_id}: was {how} after {ended.num_steps} steps")


class ReplyStore:
    """The reply to the last step of every session, so that a repeated step is answered bit for bit.

    Columns indexed by slot; every reply, new or repeated, is read from here.
    """

    def __init__(self, capacity: int, action_shape: tuple[int, ...], action_dtype: np.dtype[Any], num_logits: int):
        rows = capacity + 1
        self.session_id = np.zeros(rows, np.uint64)
        self.step_index = np.zeros(rows, np.uint64)
        self.version = np.zeros(rows, np.int64)
        self.action = np.zeros((rows, *action_shape), action_dtype)
        self.value = np.zeros(rows, np.float32)
        self.log_prob = np.zeros(rows, np.float32)
        self.logits = np.zeros((rows, num_logits), np.float32)
        self.queue_us = np.zeros(rows, np.uint32)
        self.compute_us = np.zeros(rows, np.uint32)
        self.batch_size = np.zeros(rows, np.uint32)

    def overtaken(self, session_ids: NDArray[np.uint64], step_indices: NDArray[np.uint64], slots: Slots) -> list[int]:
        """Rows whose stored reply is no longer that of the step asked for: someone took a further step, or the
        session ended and its slot serves another.
        """
        same = (self.session_id[slots] == session_ids) & (self.step_index[slots] == step_indices)
        return np.flatnonzero(~same).tolist()
