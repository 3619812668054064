"""The policies that this server serves: for each its versions, sessions, state and stored replies.

Owned by the event loop. The reloader adds versions; a version leaves when no session needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenuto_models import Checkpoint, StateSpec
from tenuto_proto import ObservationCodec, space_to_wire
from tenuto_proto.tensors import WIRE_DTYPES
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import StateArena
from tenuto_server.engine import Engine, ServedVersion
from tenuto_server.errors import CapacityError, Refusal
from tenuto_server.refused import RefusedVersions
from tenuto_server.sessions import ReplyStore, SessionTable


class MismatchError(Exception):
    """A checkpoint is sound but does not fit the policy that is being served."""


class ServedPolicy:
    """One policy: everything that all its versions share. Raises CapacityError where memory is short."""

    def __init__(self, first: Checkpoint, engine: Engine, capacity: int, server_epoch: int) -> None:
        policy = first.policy
        self.name = first.policy_name
        self.observation_space, self.action_space = policy.observation_space, policy.action_space
        self.state_spec, self.state_fingerprint = policy.state_spec, policy.state_fingerprint
        self.wire_observation_space = space_to_wire(policy.observation_space)
        self.wire_action_space = space_to_wire(policy.action_space)
        self.codec = ObservationCodec(self.wire_observation_space)
        self.arena = StateArena(policy.state_spec, capacity, engine.device)
        try:
            self.sessions = SessionTable(capacity, server_epoch)
            action_shape: Any = policy.action_space.shape
            self.replies = ReplyStore(
                capacity, tuple(action_shape), np.dtype(policy.action_space.dtype), policy.distribution.num_logits
            )
        except MemoryError as error:
            raise CapacityError(f"capacity: got {capacity}, for which the host has too little memory") from error
        self.versions: dict[int, ServedVersion] = {}
        self._held_until_s: dict[int, float] = {}
        self.is_batch_invariant = False
        """Whether the self-test found that a session's results do not depend on who shares its batches."""

    @property
    def newest(self) -> ServedVersion:
        """The version that new episodes begin with."""
        return self.versions[max(self.versions)]

    def prepare(self, checkpoint: Checkpoint, engine: Engine) -> ServedVersion:
        """Move a checkpoint to the device. Raises MismatchError where spaces or state differ from those served."""
        policy = checkpoint.policy
        for what, got, expected in (
            ("observation space", policy.observation_space, self.observation_space),
            ("action space", policy.action_space, self.action_space),
            ("state", _as_text(policy.state_spec), _as_text(self.state_spec)),
        ):
            if got != expected:
                raise MismatchError(f"{what}: got {got}, expected {expected}, as in the versions being served")
        step = engine.make_step(policy, self.arena)
        return ServedVersion(
            self.name, checkpoint.version, checkpoint.training, checkpoint.weights_sha256, policy.observation_size,
            step, self.arena, self.sessions.pool,
        )  # fmt: skip

    def find_version(self, version: int) -> ServedVersion:
        """Return a held version; 0 is the newest. Raises Refusal (VERSION_UNKNOWN)."""
        if version == 0:
            return self.newest
        found = self.versions.get(version)
        if found is None:
            raise Refusal(
                pb.VERSION_UNKNOWN,
                f"policy {self.name!r} version: got {version}, expected one of {sorted(self.versions)}",
                {"versions": ",".join(map(str, sorted(self.versions)))},
            )
        return found

    def hold(self, version: int, until_s: float) -> None:
        """Keep a version at least until then, whoever needs it."""
        self._held_until_s[version] = until_s

    def drop_unused_versions(self, now_s: float) -> list[int]:
        """Forget the versions that are not the newest and that no session needs; returns their numbers."""
        self._held_until_s = {v: until_s for v, until_s in self._held_until_s.items() if until_s > now_s}
        needed = self.sessions.versions_in_use() | self._held_until_s.keys() | {self.newest.version}
        unused = self.versions.keys() - needed
        for version in unused:
            del self.versions[version]
        return sorted(unused)

    def describe(self, version: ServedVersion, limits: pb.Limits, server_epoch: int) -> pb.GetPolicyResponse:
        """Fill in GetPolicyResponse."""
        training = version.training
        return pb.GetPolicyResponse(
            policy_name=self.name,
            version=version.version,
            versions=sorted(self.versions),
            observation_space=self.wire_observation_space,
            action_space=self.wire_action_space,
            observation=self.codec.specs(),
            state=[
                pb.TensorSpec(
                    name=t.name, dtype=WIRE_DTYPES[np.dtype(str(t.dtype).removeprefix("torch."))], shape=t.shape
                )
                for t in self.state_spec
            ],
            state_fingerprint=self.state_fingerprint,
            training=pb.TrainingProgress(
                env_steps=training.env_steps, iteration=training.iteration, return_mean=training.return_mean
            ),
            limits=limits,
            server_epoch=server_epoch,
            batch_invariant=self.is_batch_invariant,
        )


def _as_text(spec: StateSpec) -> str:
    """``h float32 [1, 16], t int64 [1]``."""
    return ", ".join(f"{t.name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in spec)


class PolicyRegistry:
    """The served policies by name."""

    def __init__(self) -> None:
        self._policies: dict[str, ServedPolicy] = {}
        self.refused = RefusedVersions()
        """Versions in the repository that are not served, also of policies that are not."""

    def __iter__(self):
        return iter(self._policies.values())

    def __len__(self) -> int:
        return len(self._policies)

    def get(self, name: str) -> ServedPolicy | None:
        """Return the policy of exactly this name."""
        return self._policies.get(name)

    def add(self, policy: ServedPolicy) -> None:
        """Serve a policy from now on; it has at least one version."""
        assert policy.versions and policy.name not in self._policies
        self._policies[policy.name] = policy

    def find(self, name: str) -> ServedPolicy:
        """Resolve a name; empty is the only policy. Raises Refusal (POLICY_UNKNOWN)."""
        if not name and len(self._policies) == 1:
            return next(iter(self))
        found = self._policies.get(name)
        if found is None:
            metadata: dict[str, str] = {}
            for refused in self.refused.to_wire(name)[-1:]:
                metadata = {"refused_version": str(refused.version), "refused_message": refused.message}
            message = f"policy: got {name!r}, expected one of {sorted(self._policies)}"
            if not self._policies:
                message = f"policy: got {name!r}, and none is served yet: the server loads, or its repository is empty"
            raise Refusal(pb.POLICY_UNKNOWN, message, metadata)
        return found

    def has_reached(self, session_id: int, step_index: int) -> bool:
        """Whether a session is here, or was, and its next step is this one or a later one."""
        policy = self.of_session(session_id, None)
        if policy is None:
            return False
        if session_id not in policy.sessions:
            expired = policy.sessions.expired(session_id)
            return expired is None or expired.num_steps >= step_index
        return int(policy.sessions.next_index[policy.sessions.slot_of(session_id)]) >= step_index

    def of_session(self, session_id: int, owner: str | None = "") -> ServedPolicy | None:
        """Return the policy of a session that this principal has, or had; None as owner: whoever has it."""
        for policy in self._policies.values():
            if policy.sessions.has(session_id, owner):
                return policy
        return next((p for p in self if p.sessions.ended(session_id, owner) is not None), None)
