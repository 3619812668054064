"""What a session is between two of its steps, as one message: taken in groups, checked in full before it is used.

No I/O. Columns are copied on the event loop, messages are made of them on whatever thread writes them.

Legend: n sessions of a group.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from tenuto_proto import WireError, array_from_wire, write_array
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.errors import SnapshotError
from tenuto_server.policies import ServedPolicy
from tenuto_server.sessions import SessionOptions

FORMAT_VERSION = 1
_MANY = 8
"""Messages made in one go; then other threads have their turn."""
_TABLE = ("session_id", "pinned", "seed", "deterministic", "version", "next_index", "num_episodes", "episode_return",
          "has_reward")  # fmt: skip
_REPLY = ("version", "action", "value", "log_prob", "logits", "queue_us", "compute_us", "batch_size")
_MAX_INDEX = 2**62


@dataclass(frozen=True, eq=False)
class SessionGroup:
    """Sessions of one policy at one moment. Nothing changes it."""

    policy_name: str
    state_fingerprint: str
    slots: Slots
    generations: NDArray[np.int64]
    weights: dict[int, str]
    """Version -> SHA-256 of its weights."""
    principals: list[str]
    """[n]"""
    table: dict[str, NDArray[Any]]
    """Columns of the session table, [n]."""
    reply: dict[str, NDArray[Any]]
    """Columns of the stored replies, [n, …]."""
    state: list[NDArray[Any]]
    """By dtype, [n, row]."""

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def session_ids(self) -> list[int]:
        """[n]"""
        return self.table["session_id"].tolist()

    @property
    def num_steps(self) -> NDArray[np.int64]:
        """[n]; of each session so far."""
        return self.table["next_index"].astype(np.int64)


def take_group(
    policy: ServedPolicy, slots: Slots, generations: NDArray[np.int64], state: Sequence[NDArray[Any]]
) -> SessionGroup:
    """Copy what the sessions are beside their state, which was read of the arena after their last step and before the
    next. Those that have left their slots since are left out.
    """
    sessions, stored = policy.sessions, policy.replies
    here = (sessions.pool.generation[slots] == generations) & ~sessions.closing[slots]
    slots = slots[here]
    # Before a session's first step its row holds what another has left there.
    fresh = sessions.next_index[slots] == 0
    rows = [part[here] for part in state]
    for part in rows:
        part[fresh] = 0
    return SessionGroup(
        policy.name,
        policy.state_fingerprint,
        slots,
        generations[here],
        {number: version.weights_sha256 for number, version in policy.versions.items()},
        [sessions.owner_name(slot) for slot in slots.tolist()],
        {name: getattr(sessions, name)[slots] for name in _TABLE},
        {name: getattr(stored, name)[slots] for name in _REPLY},
        rows,
    )


def write_snapshots(group: SessionGroup) -> Iterator[pb.SealedSnapshot]:
    """Make the message of each session, in order. Lets other threads run now and then."""
    columns = {name: column.tolist() for name, column in group.table.items()}
    replies = {name: c if name in ("action", "logits") else c.tolist() for name, c in group.reply.items()}
    for row in range(len(group)):
        if row % _MANY == _MANY - 1:
            os.sched_yield()
        version, num_steps = columns["version"][row], columns["next_index"][row]
        snapshot = pb.SessionSnapshot(
            format_version=FORMAT_VERSION,
            session_id=columns["session_id"][row],
            policy_name=group.policy_name,
            principal=group.principals[row],
            pinned_version=columns["pinned"][row],
            seed=columns["seed"][row],
            deterministic=columns["deterministic"][row],
            version=version,
            weights_sha256=group.weights[version] if version else "",
            state_fingerprint=group.state_fingerprint,
            next_step_index=num_steps,
            num_episodes=columns["num_episodes"][row],
            episode_return=columns["episode_return"][row],
            has_reward=columns["has_reward"][row],
        )
        for part in group.state:
            write_array(snapshot.state.add(), part[row])
        if num_steps:
            reply = snapshot.reply
            reply.step_index, reply.version = num_steps - 1, replies["version"][row]
            write_array(reply.action, replies["action"][row])
            reply.value, reply.log_prob = replies["value"][row], replies["log_prob"][row]
            write_array(reply.logits, replies["logits"][row])
            reply.timings.queue_us, reply.timings.compute_us = replies["queue_us"][row], replies["compute_us"][row]
            reply.timings.batch_size = replies["batch_size"][row]
        yield seal(snapshot)


def seal(snapshot: pb.SessionSnapshot) -> pb.SealedSnapshot:
    """Put a snapshot into bytes."""
    payload = snapshot.SerializeToString()
    return pb.SealedSnapshot(snapshot=payload, sha256=hashlib.sha256(payload).digest())


def unseal(sealed: pb.SealedSnapshot) -> pb.SessionSnapshot:
    """Read a snapshot, whose meaning is still to be checked. Raises SnapshotError."""
    if hashlib.sha256(sealed.snapshot).digest() != sealed.sha256:
        raise SnapshotError(f"snapshot: its {len(sealed.snapshot)} bytes are not those that its sha256 was taken of")
    try:
        snapshot = pb.SessionSnapshot.FromString(sealed.snapshot)
    except DecodeError as error:
        raise SnapshotError("snapshot: not a SessionSnapshot") from error
    if snapshot.format_version != FORMAT_VERSION:
        raise SnapshotError(f"snapshot format_version: got {snapshot.format_version}, expected {FORMAT_VERSION}")
    if not snapshot.session_id:
        raise SnapshotError("snapshot session_id: got 0, expected another number")
    return snapshot


def options_of(snapshot: pb.SessionSnapshot) -> SessionOptions:
    """Return what the session was opened with."""
    return SessionOptions(snapshot.pinned_version, snapshot.seed, snapshot.deterministic)


@dataclass(frozen=True, eq=False)
class SessionState:
    """The arrays of a snapshot that fits its policy."""

    state: list[NDArray[Any]]
    """By dtype, [row]."""
    action: NDArray[Any]
    logits: NDArray[np.float32]


def check_fit(snapshot: pb.SessionSnapshot, policy: ServedPolicy) -> SessionState:
    """Check that a snapshot is one of this policy's. Raises SnapshotError; the versions must be held by then."""
    if snapshot.state_fingerprint != policy.state_fingerprint:
        raise SnapshotError(
            f"snapshot state_fingerprint: got {snapshot.state_fingerprint!r}, expected {policy.state_fingerprint!r}",
            mismatch=True,
        )
    num_steps = snapshot.next_step_index
    if num_steps > _MAX_INDEX or max(snapshot.pinned_version, snapshot.num_episodes) > _MAX_INDEX:
        raise SnapshotError("snapshot: a count or version is larger than any session's")
    if (num_steps > 0) != (snapshot.version > 0 and snapshot.HasField("reply")):
        raise SnapshotError(f"snapshot: got {num_steps} steps, version {snapshot.version}, expected a reply for any")
    if num_steps:
        held = policy.versions.get(snapshot.version)
        if held is None:
            raise SnapshotError(
                f"snapshot version: got {snapshot.version} of policy {policy.name!r}, which is not here", mismatch=True
            )
        if held.weights_sha256 != snapshot.weights_sha256:
            raise SnapshotError(
                f"snapshot weights_sha256: got {snapshot.weights_sha256!r}, expected {held.weights_sha256!r},"
                f" that of version {snapshot.version}",
                mismatch=True,
            )
        if snapshot.reply.step_index != num_steps - 1 or not 0 < snapshot.reply.version < _MAX_INDEX:
            raise SnapshotError(f"snapshot reply: got that to step {snapshot.reply.step_index} of {num_steps}")
    try:
        state = [array_from_wire(tensor) for tensor in snapshot.state]
        reply = snapshot.reply
        action, logits = (array_from_wire(t) if num_steps else None for t in (reply.action, reply.logits))
    except WireError as error:
        raise SnapshotError(f"snapshot {error}") from error
    expected = policy.arena.row_layout
    if [(a.dtype, a.shape) for a in state] != expected:
        got = [(str(a.dtype), a.shape) for a in state]
        raise SnapshotError(f"snapshot state: got {got}, expected {[(str(d), s) for d, s in expected]}")
    blank = policy.replies
    action = np.zeros_like(blank.action[0]) if action is None else action
    logits = np.zeros_like(blank.logits[0]) if logits is None else logits
    for name, array, like in (("action", action, blank.action[0]), ("logits", logits, blank.logits[0])):
        if array.dtype != like.dtype or array.shape != like.shape:
            raise SnapshotError(f"snapshot {name}: got {array.dtype} {array.shape}, expected {like.dtype} {like.shape}")
    if num_steps and not policy.action_space.contains(action):
        raise SnapshotError(f"snapshot action: got one that is not in {policy.action_space}")
    floats = [*(a for a in state if a.dtype.kind == "f"), logits, np.array([reply.value, reply.log_prob])]
    if not all(np.isfinite(a).all() for a in floats) or not np.isfinite(snapshot.episode_return):
        raise SnapshotError("snapshot: got NaN or infinity, expected finite numbers")
    return SessionState(state, action, logits)


def install(snapshot: pb.SessionSnapshot, state: SessionState, policy: ServedPolicy, slot: int) -> None:
    """Make the session of a slot, which was just opened, what the snapshot says, but for its state in the arena."""
    sessions, stored, reply = policy.sessions, policy.replies, snapshot.reply
    sessions.version[slot] = sessions.next_version[slot] = snapshot.version
    sessions.next_index[slot], sessions.num_episodes[slot] = snapshot.next_step_index, snapshot.num_episodes
    sessions.episode_return[slot], sessions.has_reward[slot] = snapshot.episode_return, snapshot.has_reward
    if snapshot.next_step_index:
        stored.session_id[slot], stored.step_index[slot] = snapshot.session_id, reply.step_index
        stored.version[slot], stored.action[slot], stored.logits[slot] = reply.version, state.action, state.logits
        stored.value[slot], stored.log_prob[slot] = reply.value, reply.log_prob
        timings = reply.timings
        stored.queue_us[slot], stored.compute_us[slot] = timings.queue_us, timings.compute_us
        stored.batch_size[slot] = timings.batch_size


def as_stored(sealed: pb.SealedSnapshot) -> bytes:
    """Return the bytes that a store keeps."""
    return sealed.SerializeToString()


def from_stored(data: bytes) -> pb.SealedSnapshot:
    """Read what a store has kept. Raises SnapshotError."""
    try:
        return pb.SealedSnapshot.FromString(data)
    except DecodeError as error:
        raise SnapshotError(f"snapshot: its {len(data)} bytes are not a SealedSnapshot") from error
