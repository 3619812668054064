"""The policy as the server describes it: spaces, versions, limits; and how a client finds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from tenuto_client.effects import Call, Program
from tenuto_client.errors import (
    GYM_ADVICE,
    MessageTooLargeError,
    MissingExtraError,
    PolicyUnknownError,
    ServerUnavailableError,
    SpaceMismatchError,
    TenutoError,
    UnexpectedReplyError,
    error_from_wire,
)
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.retry import Deadline, attempt, is_transient, noticing
from tenuto_proto import ObservationCodec, WireError, array_from_wire
from tenuto_proto.spaces import space_from_wire
from tenuto_proto.tensors import DTYPES
from tenuto_proto.v1 import policy_pb2 as pb

if TYPE_CHECKING:
    from gymnasium import Space

_ROW_OVERHEAD_BYTES = 8 + 10 + 1 + 4
"""Id, index, flag and reward."""
_REQUEST_OVERHEAD_BYTES = 1024


@dataclass(frozen=True)
class ServedPolicy:
    """One policy of one server process, as of when it was asked."""

    policy_name: str
    version: int
    """The version that was asked for: the pinned one, else the newest."""
    versions: tuple[int, ...]
    """All versions that the server holds, ascending."""
    training_return_mean: float | None
    """Mean episode return in training when ``version`` was published."""
    max_batch_rows: int
    max_message_bytes: int
    idle_timeout_s: float
    """Seconds without a step after which the server ends a session."""
    server_epoch: int
    """Another one means another server process."""
    wire: pb.GetPolicyResponse = field(repr=False)
    codec: ObservationCodec = field(repr=False)

    @classmethod
    def from_wire(cls, reply: pb.GetPolicyResponse) -> ServedPolicy:
        """Read the message. Raises UnexpectedReplyError where a space in it is not valid."""
        try:
            codec = ObservationCodec(reply.observation_space)
            action_dtype_and_shape(reply.action_space)
        except (WireError, KeyError) as error:
            raise UnexpectedReplyError(f"GetPolicy: {error}") from error
        training, limits = reply.training, reply.limits
        return cls(
            policy_name=reply.policy_name,
            version=reply.version,
            versions=tuple(reply.versions),
            training_return_mean=training.return_mean if training.HasField("return_mean") else None,
            max_batch_rows=limits.max_batch_rows,
            max_message_bytes=limits.max_message_bytes,
            idle_timeout_s=limits.idle_timeout_s,
            server_epoch=reply.server_epoch,
            wire=reply,
            codec=codec,
        )

    def observation_space(self) -> Space[Any]:
        """Return the gymnasium space. Raises MissingExtraError without gymnasium."""
        return gymnasium_space(self.wire.observation_space)

    def action_space(self) -> Space[Any]:
        """Return the gymnasium space. Raises MissingExtraError without gymnasium."""
        return gymnasium_space(self.wire.action_space)

    def has_spaces_of(self, other: ServedPolicy) -> bool:
        """Whether both take the same observations and give the same actions."""
        return (
            self.wire.observation_space == other.wire.observation_space
            and self.wire.action_space == other.wire.action_space
        )

    def pack(self, observations: Any, num_rows: int) -> list[pb.NamedTensor]:
        """Pack a batch of observations. Raises ObservationError."""
        try:
            return self.codec.pack(observations, num_rows)
        except WireError as error:
            # The first error says the same, one level down.
            raise error_from_wire(error, self._hint(observations)) from None

    def pack_row(self, observation: Any) -> tuple[bytes, ...]:
        """Pack one observation, see ObservationCodec.pack_row. Raises ObservationError."""
        try:
            return self.codec.pack_row(observation)
        except WireError as error:
            raise error_from_wire(error, self._hint(observation)) from None

    def _hint(self, observation: Any) -> str:
        """What a user has probably overlooked who gives this observation, which was refused."""
        if self.wire.observation_space.WhichOneof("kind") == "tuple" and isinstance(
            observation, (int, np.integer, np.ndarray)
        ):
            return "; POPGym environments must be made with tenuto_envs.make, which adds the previous action"
        return ""

    def actions(self, tensor: pb.Tensor, num_rows: int) -> list[Any]:
        """Read actions, ``[num_rows, *shape]``: ints for Discrete, else an array of its own each.

        Raises UnexpectedReplyError.
        """
        array = self.array(tensor, (num_rows, *self.action_dtype_and_shape[1]))
        return array.tolist() if self._is_discrete else [row.copy() for row in array]

    def action(self, tensor: pb.Tensor) -> Any:
        """Read one action: an int for Discrete, else an array of its own. Raises UnexpectedReplyError."""
        array = self.array(tensor, self.action_dtype_and_shape[1])
        return int(array) if self._is_discrete else array.copy()

    def array(self, tensor: pb.Tensor, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Read a tensor of a reply (read-only). Raises UnexpectedReplyError where it is not of ``shape``."""
        try:
            array = array_from_wire(tensor)
        except WireError as error:
            raise UnexpectedReplyError(f"reply: {error}") from error
        if shape is not None and array.shape != shape:
            raise UnexpectedReplyError(f"reply: got a tensor of shape {array.shape}, expected {shape}")
        return array

    @cached_property
    def action_dtype_and_shape(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Of one element of the action space."""
        return action_dtype_and_shape(self.wire.action_space)

    @cached_property
    def _is_discrete(self) -> bool:
        return self.wire.action_space.WhichOneof("kind") == "discrete"

    @cached_property
    def observation_bytes(self) -> int:
        """Of one observation."""
        return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.codec.leaves)

    @cached_property
    def max_rows(self) -> int:
        """Steps that surely fit the server's limits on rows and bytes of a request; 0: perhaps not even one."""
        most = self.max_batch_rows or 2**31
        if not self.max_message_bytes:
            return most
        row_bytes = self.observation_bytes + _ROW_OVERHEAD_BYTES
        return min(most, max(self.max_message_bytes - _REQUEST_OVERHEAD_BYTES, 0) // row_bytes)

    def refuse_too_large(self, request: Message) -> None:
        """Raise MessageTooLargeError where the server would refuse the request for its size."""
        size = request.ByteSize()
        if self.max_message_bytes and size > self.max_message_bytes:
            raise MessageTooLargeError(f"message: got {size} bytes, expected at most {self.max_message_bytes}")


def gymnasium_space(space: pb.Space) -> Space[Any]:
    """Return a space as gymnasium's. Raises MissingExtraError."""
    try:
        return space_from_wire(space)
    except ImportError as error:
        raise MissingExtraError(f"spaces need gymnasium, which cannot be imported ({error}): {GYM_ADVICE}") from None


def action_dtype_and_shape(space: pb.Space) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape of one action. Raises KeyError for a dtype and WireError for a kind that has none."""
    kind = space.WhichOneof("kind")
    if kind == "discrete":
        return DTYPES[space.discrete.dtype], ()
    if kind == "multi_discrete":
        return DTYPES[space.multi_discrete.dtype], tuple(space.multi_discrete.nvec.shape)
    if kind == "multi_binary":
        return np.dtype(np.int8), tuple(space.multi_binary.shape)
    if kind == "box":
        return DTYPES[space.box.low.dtype], tuple(space.box.low.shape)
    raise WireError(
        pb.OBSERVATION_FIELDS, f"action space: got {kind}, expected Box, Discrete, MultiDiscrete or MultiBinary"
    )


def find_policy(
    options: PolicyOptions, deadline: Deadline, *, wait: bool, on_wait: OnWait = None
) -> Program[ServedPolicy]:
    """Ask the server for a policy; with ``wait`` until it serves it, else only until the server answers."""

    def should_retry(error: TenutoError) -> bool:
        return is_transient(error) or (wait and isinstance(error, (PolicyUnknownError, ServerUnavailableError)))

    def make_call(timeout_s: float) -> Call:
        # Who waits for minutes should not wait half of them for one answer.
        return Call("GetPolicy", request, min(timeout_s, options.timeout_s))

    request = pb.GetPolicyRequest(policy_name=options.policy_name, version=options.version)
    reply = yield from attempt(make_call, deadline, noticing(should_retry, on_wait))
    return ServedPolicy.from_wire(reply)


def refresh_policy(
    options: PolicyOptions, known: ServedPolicy | None, deadline: Deadline, *, wait: bool, on_wait: OnWait = None
) -> Program[ServedPolicy]:
    """Find the policy (again). Raises SpaceMismatchError where it is no longer the known one."""
    found = yield from find_policy(options, deadline, wait=wait, on_wait=on_wait)
    if known is not None and not found.has_spaces_of(known):
        raise SpaceMismatchError(f"policy {found.policy_name!r}: its spaces have changed since it was first used")
    return found
