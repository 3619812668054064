"""Keeps the sessions of this process in a store, so that they outlive it. Owned by the event loop.

Steps do not wait for the store. A few times a second the engine copies the rows that have changed, between two batches,
and another thread writes them; ``durable_step`` in the replies says how far that has come. What a crash takes is the
steps since, which the client sends again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import compress
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.engine import Engine
from tenuto_server.errors import Refusal, SnapshotError, StoreError
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.snapshots import (
    SessionGroup,
    as_stored,
    check_fit,
    from_stored,
    install,
    options_of,
    take_group,
    unseal,
    write_snapshots,
)
from tenuto_server.store import SnapshotStore, StoredSession

log = logging.getLogger(__name__)
T = TypeVar("T")
_GROUP = 256
"""Sessions that the engine copies at once: a fraction of a millisecond."""
_MAX_PAUSE_S = 5.0
"""Between two tries of a store that fails."""


class VersionSource(Protocol):
    """Brings versions into service that sessions began with."""

    async def require(self, policy_name: str, version: int) -> bool:
        """Serve a version, if it is in the repository and sound. Returns whether it is served."""
        ...


class Snapshotter:
    """Takes sessions out of the process and into it, as snapshots."""

    def __init__(
        self,
        registry: PolicyRegistry,
        engine: Engine,
        versions: VersionSource,
        clock: Callable[[], float],
        *,
        knows_callers: bool = False,
    ) -> None:
        """``knows_callers``: whether the server asks who calls; else sessions are everybody's, whosever they were."""
        self._registry, self._engine, self._versions, self._clock = registry, engine, versions, clock
        self._knows_callers = knows_callers

    async def take(self, policy: ServedPolicy, slots: Slots) -> SessionGroup:
        """Copy sessions as they are between two batches."""
        generations = policy.sessions.pool.generation[slots]

        def group(state: list[NDArray[Any]]) -> SessionGroup:
            # The event loop has heard of every batch before this job, and of none after it.
            return take_group(policy, slots, generations, state)

        return await self._engine.call_then(lambda: policy.arena.read_rows(slots), group)

    async def adopt(
        self,
        sealed: pb.SealedSnapshot,
        principal: str | None = None,
        *,
        is_stored: bool = False,
        admit: Callable[[], None] = lambda: None,
    ) -> tuple[ServedPolicy, int]:
        """Go on with a session, as that of ``principal`` or of whose it was; return where it is now.

        ``is_stored``: the store has this very snapshot. ``admit`` is called when the snapshot is found to fit, just
        before the session is there, and may raise. Raises SnapshotError, or Refusal where there is no room or the
        session exists; whatever it raises, nothing of the session is here.
        """
        snapshot = unseal(sealed)
        policy = self._registry.get(snapshot.policy_name)
        if policy is None:
            raise SnapshotError(f"snapshot policy: got {snapshot.policy_name!r}, which is not served", mismatch=True)
        for version in {snapshot.version, snapshot.pinned_version} - {0}:
            if version not in policy.versions:
                # Where it is not to be had the check says so.
                await self._versions.require(policy.name, version)
        state = check_fit(snapshot, policy)
        # Nothing is awaited between the last checks and the session that is there.
        admit()
        sessions = policy.sessions
        if sessions.is_older_copy(snapshot.session_id, snapshot.next_step_index):
            sessions.forget(sessions.slot_of(snapshot.session_id))
        sessions.revive(snapshot.session_id)
        owner = principal if principal is not None else snapshot.principal if self._knows_callers else ""
        slot = sessions.open(snapshot.session_id, options_of(snapshot), self._clock(), owner)
        install(snapshot, state, policy, slot)
        if is_stored:
            sessions.durable_index[slot] = snapshot.next_step_index
        if snapshot.next_step_index:
            await self._write_row(policy, slot, state.state)
        return policy, slot

    async def _write_row(self, policy: ServedPolicy, slot: int, state: list[NDArray[Any]]) -> None:
        """Bring a session's state to the device, and let no step in before it is there. Where that fails the session is
        gone again; it is also brought to its end where the caller leaves.
        """
        sessions = policy.sessions
        generation = sessions.pool.generation[slot]
        sessions.arrive(slot)
        writing = asyncio.ensure_future(self._engine.call(lambda: policy.arena.write_row(slot, state)))

        def settle(written: asyncio.Future[None]) -> None:
            if sessions.pool.generation[slot] != generation or not sessions.pool.leased[slot]:
                return  # It was closed meanwhile.
            if written.cancelled() or written.exception() is not None:
                sessions.forget(slot)
            else:
                sessions.arrived(slot)

        writing.add_done_callback(settle)
        await asyncio.shield(writing)


class Durability:
    """Writes what changes and brings it back. Where it is used, ``durable_step`` counts."""

    def __init__(
        self,
        store: SnapshotStore,
        snapshotter: Snapshotter,
        registry: PolicyRegistry,
        metrics: Metrics,
        clock: Callable[[], float],
        interval_s: float,
        io: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        """``io`` runs a function of the store, one at a time and not on the event loop."""
        self._store, self._snapshotter, self._registry, self._metrics = store, snapshotter, registry, metrics
        self._clock, self._interval_s, self._io = clock, interval_s, io
        self._ended: dict[int, int] = {}
        """Sessions to drop from the store, and how many steps they had."""
        self._waiting: set[int] = set()
        """Sessions in a store of this server's own that are still to be restored."""
        self._refused: dict[int, int] = {}
        """Sessions in the store that this server cannot go on with, and how many steps they have there."""
        self._one_at_a_time = asyncio.Lock()
        self._fetching: dict[int, asyncio.Future[bool]] = {}
        """Sessions that are looked for in a shared store; whether that came to an end."""
        self._num_failures = 0
        self._cannot_look = False
        self.saved_s = clock()
        """When the store last held all that there was."""
        metrics.unsaved_seconds.set_function(lambda: self._clock() - self.saved_s)

    @property
    def is_shared(self) -> bool:
        """Whether other servers use the store too."""
        return self._store.is_shared

    @property
    def has_more(self) -> bool:
        """Whether a session that nobody here knows may be in the store."""
        return self.is_shared or len(self._waiting) > 0

    def begin(self, session_id: int) -> None:
        """A session begins from its first step on: what the store has of it and nobody could go on from is dropped."""
        if session_id in self._refused:
            self._ended[session_id] = self._refused.pop(session_id)

    def end(self, session_id: int, num_steps: int) -> None:
        """Drop a session from the store with the next group."""
        self._ended[session_id] = num_steps

    # ------------------------------------------------------------------ out of the process

    async def run(self, stop: asyncio.Event) -> None:
        """Write what has changed, every ``interval_s`` seconds, until ``stop``."""
        while not stop.is_set():
            pause_s = min(self._interval_s * 2 ** min(self._num_failures, 16), max(_MAX_PAUSE_S, self._interval_s))
            try:
                await asyncio.wait_for(stop.wait(), pause_s)
            except asyncio.TimeoutError:
                await self.flush()

    async def flush(self) -> bool:
        """Write what has changed, each session once. Returns whether the store holds everything as it was when this
        began; what keeps it from that is told, counted, and tried again by the next.
        """
        async with self._one_at_a_time:
            began_s = self._clock()
            error: Exception | None = None
            # One policy whose sessions cannot be read is not to keep those of the others from the store.
            for save in (*(partial(self._save_changed, policy) for policy in self._registry), self._drop_ended):
                try:
                    await save()
                except Exception as caught:  # noqa: BLE001 (whatever it was, it is told and tried again)
                    error = caught
            if error is not None:
                self._metrics.snapshot_failures.inc()
                # Once for each outage.
                level = logging.DEBUG if self._num_failures else logging.ERROR
                unforeseen = None if isinstance(error, StoreError) else error
                log.log(level, "sessions are not saved: %s", error, exc_info=unforeseen)
                self._num_failures += 1
                return False
            if self._num_failures:
                log.warning("sessions are saved again, after %d tries", self._num_failures)
            self._num_failures, self.saved_s = 0, began_s
            self._metrics.snapshot_seconds.series[""].observe(self._clock() - began_s)
            return True

    async def _save_changed(self, policy: ServedPolicy) -> None:
        changed = policy.sessions.changed_slots()
        for first in range(0, len(changed), _GROUP):
            # Some have ended since.
            slots = policy.sessions.changed_slots(changed[first : first + _GROUP])
            if len(slots):
                await self._save(policy, slots)

    async def _drop_ended(self) -> None:
        if self._ended:
            await self._write(None, None)

    async def _save(self, policy: ServedPolicy, slots: Slots) -> None:
        group = await self._snapshotter.take(policy, slots)
        overtaken = await self._write(policy, group)
        sessions = policy.sessions
        same = sessions.pool.generation[group.slots] == group.generations
        if overtaken:
            newer = np.isin(group.table["session_id"], np.array(list(overtaken), np.uint64))
            # Another server goes on with them; what is here is old, and read again when it is asked for. Unless it has
            # moved on since: then the next write tells.
            rests = ~sessions.busy[group.slots] & (sessions.next_index[group.slots] == group.num_steps)
            for slot in group.slots[same & newer & rests].tolist():
                sessions.forget(slot)
            same &= ~newer
        sessions.durable_index[group.slots[same]] = group.num_steps[same]
        self._metrics.snapshots.labels(policy.name).inc(len(group))

    async def _write(self, policy: ServedPolicy | None, group: SessionGroup | None) -> set[int]:
        ended, self._ended = self._ended, {}
        is_open: list[bool] = []
        if policy is not None and group is not None:
            # What has ended since the group was taken is among the ended, or has been: it must not come back.
            pool, slots = policy.sessions.pool, group.slots
            here = (pool.generation[slots] == group.generations) & pool.leased[slots] & ~policy.sessions.closing[slots]
            is_open = here.tolist()

        def write() -> set[int]:
            stored: list[StoredSession] = []
            if group is not None:
                sealed = map(as_stored, write_snapshots(group))
                found = map(StoredSession, group.session_ids, group.num_steps.tolist(), sealed)
                stored = list(compress(found, is_open))
            return self._store.write(stored, ended.items())

        try:
            return await self._io(write)
        except BaseException:
            self._ended = ended | self._ended
            raise

    # ------------------------------------------------------------------ into the process

    async def prepare(self) -> None:
        """Find out which sessions a store that is this server's own holds. Raises StoreError."""
        if not self.is_shared:
            self._waiting = set(await self._io(self._store.session_ids))

    async def restore(self) -> None:
        """Go on with the sessions that wait for it and whose policy is served by now."""
        if not self._waiting:
            return
        began_s, num_restored, ids = self._clock(), 0, sorted(self._waiting)
        for first in range(0, len(ids), _GROUP):
            chunk = ids[first : first + _GROUP]
            try:
                found: list[StoredSession] = await self._io(lambda chunk=chunk: self._store.read(chunk))
            except StoreError as error:
                # They go on waiting.
                log.error("sessions cannot be restored: %s", error)
                return
            for stored in found:
                if self._is_served(stored):
                    try:
                        num_restored += await self._restore(stored)
                    except Refusal:
                        # There is no room: it goes on waiting, too.
                        continue
                    self._waiting.discard(stored.session_id)
        took_s = self._clock() - began_s
        log.info("restored %d of %d sessions in %.2f s", num_restored, len(ids), took_s)
        if self._waiting:
            log.warning("%d sessions wait for room, or for their policy to be served", len(self._waiting))

    def _is_served(self, stored: StoredSession) -> bool:
        """Whether the session's policy is served; also where there is no policy to wait for."""
        try:
            return self._registry.get(unseal(from_stored(stored.snapshot)).policy_name) is not None
        except SnapshotError:
            return True

    async def fetch(self, session_ids: Iterable[int]) -> None:
        """Go on with those of some sessions that are in a shared store, and further there than here.

        Raises Refusal: STORE_UNAVAILABLE where the store does not answer, or one of them cannot be restored yet;
        CAPACITY_REACHED where there is no room for one.
        """
        if not self.is_shared:
            if not self._waiting.isdisjoint(session_ids):
                raise Refusal(pb.STORE_UNAVAILABLE, "the session is about to be restored")
            return
        wanted = dict.fromkeys(session_ids)
        mine = [i for i in wanted if i not in self._fetching]
        others = {i: self._fetching[i] for i in wanted if i in self._fetching}
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._fetching.update(dict.fromkeys(mine, done))
        is_looked_for = False
        try:
            if mine:
                try:
                    found: list[StoredSession] = await self._io(lambda: self._store.read(mine))
                except StoreError as error:
                    # Once for each outage.
                    level = logging.DEBUG if self._cannot_look else logging.ERROR
                    log.log(level, "sessions cannot be looked for: %s", error)
                    self._cannot_look = True
                    raise Refusal(pb.STORE_UNAVAILABLE, "the store of sessions does not answer") from error
                self._cannot_look = False
                for stored in found:
                    if not self._is_served(stored):
                        # It has just started: who waits a moment goes on.
                        raise Refusal(pb.STORE_UNAVAILABLE, "the policy of the session is not served yet")
                    if self._is_news(stored):
                        await self._restore(stored)
            is_looked_for = True
        finally:
            for session_id in mine:
                del self._fetching[session_id]
            done.set_result(is_looked_for)
        if others:
            await asyncio.wait(others.values())
            # Whoever looked for them has perhaps failed, or left.
            if left := [i for i, looked_for in others.items() if not looked_for.result()]:
                await self.fetch(left)

    def _is_news(self, stored: StoredSession) -> bool:
        """Whether the store is further than this server, whose copy is then dropped."""
        policy = self._registry.of_session(stored.session_id, None)
        if policy is None:
            return True
        if stored.session_id not in policy.sessions:
            # Where it was idle here only, another server went on with it.
            expired = policy.sessions.expired(stored.session_id)
            return expired is not None and expired.num_steps < stored.num_steps
        slot = policy.sessions.slot_of(stored.session_id)
        if policy.sessions.busy[slot] or policy.sessions.is_arriving(stored.session_id):
            return False
        if policy.sessions.next_index[slot] >= stored.num_steps:
            return False
        policy.sessions.forget(slot)
        return True

    async def _restore(self, stored: StoredSession) -> bool:
        """Go on with a session; returns whether it can. Raises Refusal where it cannot just now: there is no room, or
        the device does not take it.
        """
        try:
            policy, _ = await self._snapshotter.adopt(from_stored(stored.snapshot), is_stored=True)
        except (SnapshotError, Refusal) as error:
            if error.reason == pb.CAPACITY_REACHED:
                raise
            reason = pb.ErrorReason.Name(error.reason).lower()
            self._metrics.snapshots_refused.labels(reason).inc()
            log.error("session %d is not restored: %s", stored.session_id, error)
            self._refused[stored.session_id] = stored.num_steps
            return False
        except Exception as error:
            log.exception("session %d is not restored yet", stored.session_id)
            raise Refusal(pb.STORE_UNAVAILABLE, "the session could not be restored; try again") from error
        self._metrics.sessions_restored.labels(policy.name).inc()
        return True

    def close(self) -> None:
        """Give the store up."""
        self._store.close()
