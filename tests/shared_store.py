"""A store which other servers use too, and a server's half of it, without an engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from serving import small_policy
from tenuto_models import Checkpoint, TrainingProgress
from tenuto_proto import write_array
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.durability import Durability, Snapshotter
from tenuto_server.engine import Engine
from tenuto_server.errors import StoreError
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.snapshots import as_stored, seal
from tenuto_server.store import StoredSession


class Engineless(Engine):
    """The engine without a thread: every job is over at once."""

    def __init__(self) -> None:
        self.device, self._buckets, self._threads, self._deterministic = torch.device("cpu"), (4,), 1, False

    def submit(self, job: Callable[[], Any], done: Callable[[Any, Any], None], *, brief: bool = False) -> None:
        done(job(), None)


class Shelf:
    """A shared store that counts how often it is read."""

    is_shared = True

    def __init__(self) -> None:
        self.kept: dict[int, StoredSession] = {}
        self.ended: list[tuple[int, int]] = []
        self.overtakes: set[int] = set()
        """Sessions of which another server has stored more steps."""
        self.num_reads = 0
        self.fails = False

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        self.ended += ended
        return self.overtakes & {session.session_id for session in sessions}

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        self.num_reads += 1
        if self.fails:
            raise StoreError("away")
        return [self.kept[i] for i in session_ids if i in self.kept]

    def session_ids(self) -> list[int]:
        return sorted(self.kept)

    def close(self) -> None:
        pass


class Library:
    """A server's sessions, and a store that answers when the test says so."""

    def __init__(self, *, is_served: bool = True, capacity: int = 10) -> None:
        self.engine, self.registry, self.shelf = Engineless(), PolicyRegistry(), Shelf()
        checkpoint = Checkpoint("a", 1, small_policy("frameconv"), TrainingProgress(), 0.0, "")
        self.policy = ServedPolicy(checkpoint, self.engine, capacity, server_epoch=1)
        self.policy.versions[1] = self.policy.prepare(checkpoint, self.engine)
        if is_served:
            self.registry.add(self.policy)
        self.gate = asyncio.Event()
        self.gate.set()
        versions: Any = None
        snapshotter = Snapshotter(self.registry, self.engine, versions, lambda: 1.0)
        self.durability = Durability(
            self.shelf, snapshotter, self.registry, Metrics(torch.device("cpu")), lambda: 1.0, 1.0, self._io
        )

    async def _io(self, work: Callable[[], Any]) -> Any:
        await self.gate.wait()
        return work()

    def put(self, session_id: int, num_steps: int = 0) -> None:
        """Keep a session as another server would have written it."""
        snapshot = pb.SessionSnapshot(
            format_version=1, session_id=session_id, policy_name="a", state_fingerprint=self.policy.state_fingerprint
        )
        for dtype, shape in self.policy.arena.row_layout:
            write_array(snapshot.state.add(), np.zeros(shape, dtype))
        if num_steps:
            snapshot.next_step_index, snapshot.version, snapshot.reply.version = num_steps, 1, 1
            snapshot.reply.step_index = num_steps - 1
            write_array(snapshot.reply.action, self.policy.replies.action[0])
            write_array(snapshot.reply.logits, self.policy.replies.logits[0])
        self.shelf.kept[session_id] = StoredSession(session_id, num_steps, as_stored(seal(snapshot)))
