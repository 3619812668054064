"""Errors of the server.

ServerError
├── ConfigurationError  a setting that the server cannot run with; ends the process before it serves
├── FatalError          the device is lost, or a step was taken that could not be recorded; ends the process
├── CapacityError       memory for the sessions of a policy is not to be had
├── StoreError          the store of snapshots does not answer, or cannot write; it is tried again
├── SnapshotError       a snapshot that no session can go on from
└── Refusal             a request, or one row of it, that the server will not carry out; its text leaves the server

Anything else that escapes is a fault of ours: it is logged with its traceback and leaves as INTERNAL without details.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from tenuto_proto import WireError
from tenuto_proto.v1 import policy_pb2 as pb

_CODES: dict[int, grpc.StatusCode] = {
    pb.POLICY_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    pb.VERSION_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    pb.SESSION_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    pb.SESSION_CLOSED: grpc.StatusCode.FAILED_PRECONDITION,
    pb.SESSION_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    pb.SESSION_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    pb.STEP_INDEX_MISMATCH: grpc.StatusCode.ABORTED,
    pb.STEP_IN_FLIGHT: grpc.StatusCode.ABORTED,
    pb.CAPACITY_REACHED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.QUEUE_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    pb.DRAINING: grpc.StatusCode.UNAVAILABLE,
    pb.COMPUTE_FAILED: grpc.StatusCode.INTERNAL,
    pb.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    pb.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    pb.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.SESSION_EXPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    pb.SNAPSHOT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    pb.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
"""Reasons that are not here are faults of the request: INVALID_ARGUMENT."""


_MAX_RETRY_AFTER_MS = 24 * 3600 * 1000
MAX_TEXT = 500
"""Characters of a text that leaves the server."""


def shortened(text: str) -> str:
    """Cut a text that is to leave the server."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


class ServerError(Exception):
    """Base of every error that the server raises on purpose."""


class ConfigurationError(ServerError):
    """A setting that the server cannot run with."""


class FatalError(ServerError):
    """What would be served from now on could not be relied upon: the process ends, to be started again."""


class CapacityError(ServerError):
    """The state of as many sessions as were asked for does not fit into memory."""


class StoreError(ServerError):
    """The store of snapshots does not answer, or cannot write."""


class SnapshotError(ServerError):
    """A snapshot that no session can go on from. Its text leaves the server."""

    def __init__(self, message: str, *, mismatch: bool = False) -> None:
        super().__init__(message)
        self.reason = pb.SNAPSHOT_MISMATCH if mismatch else pb.SNAPSHOT_INVALID
        """Sound, but of something that this server does not have; or not a snapshot."""


class Refusal(ServerError):
    """A request, or a row, that is not carried out. Nothing changed."""

    def __init__(
        self,
        reason: int,
        message: str,
        metadata: Mapping[str, str] | None = None,
        num_rows: int = 1,
        retry_after_s: float | None = None,
    ) -> None:
        # Some texts quote the request; gRPC refuses to send long ones.
        super().__init__(shortened(message))
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.num_rows = num_rows
        """How many steps it concerns, for the metrics."""
        self.retry_after_s = retry_after_s
        """Seconds after which another try makes sense; None: not said."""

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code that goes with the reason."""
        return _CODES.get(self.reason, grpc.StatusCode.INVALID_ARGUMENT)

    @property
    def reason_name(self) -> str:
        """The reason as it stands in ErrorInfo and in the metrics."""
        return pb.ErrorReason.Name(self.reason)

    def to_wire(self) -> pb.Error:
        """Describe the refusal of one row."""
        error = pb.Error(code=self.code.value[0], reason=self.reason_name, message=str(self), metadata=self.metadata)
        if self.retry_after_s is not None:
            error.retry_after_ms = max(1, min(round(1e3 * self.retry_after_s), _MAX_RETRY_AFTER_MS))
        return error


def as_refusal(error: Refusal | WireError | SnapshotError) -> Refusal:
    """Turn what may leave the server into a refusal."""
    return error if isinstance(error, Refusal) else Refusal(error.reason, str(error))


def unknown_session(session_id: int, server_epoch: int) -> Refusal:
    """Refuse a session that nobody remembers."""
    message = f"session {session_id}: never opened here, or ended long ago"
    return Refusal(pb.SESSION_UNKNOWN, message, {"server_epoch": str(server_epoch)})


def session_arriving(session_id: int) -> Refusal:
    """Refuse what a session's state is needed for while that is on its way to the device."""
    return Refusal(pb.STORE_UNAVAILABLE, f"session {session_id}: is just being restored")


def session_exists(session_id: int) -> Refusal:
    """Refuse to open a session whose id is in use; the text is the same whosever it is."""
    return Refusal(pb.SESSION_EXISTS, f"session {session_id}: exists with other options or steps taken")
