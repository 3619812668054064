"""What can go wrong between a robot and its policy, as exceptions; grpc.RpcError never reaches the caller.

TenutoError
├── PolicyUnknownError          the server serves no such policy
│   └── VersionUnknownError     … or does not hold this version of it
├── SpaceMismatchError          the served policy's spaces are not those that were expected
├── SessionError
│   ├── SessionExistsError      the session_id is taken
│   └── SessionGoneError        the episode's state is lost; begin a new episode
│       ├── SessionUnknownError     never opened here, or forgotten
│       │   └── SessionLostError    … because the server restarted
│       ├── SessionClosedError
│       ├── SessionExpiredError     no step came within the idle timeout
│       ├── ReplayMismatchError     the restarted server chose other actions than before
│       └── SessionExportedError    it goes on at another server, to which it was exported
├── StepError
│   ├── StepIndexError          the server expects another step (``.expected``): somebody else steps this session
│   ├── StepInFlightError       another step of the session is under way
│   ├── ObservationError        fields, dtype, shape, bounds or NaN: see ``.reason``
│   └── ComputeError            the forward pass failed
├── BatchError                  a whole batch was refused
├── RowsError                   some rows of a vector step failed; ``.result`` holds the others
├── MessageTooLargeError        over the server's limit
├── ServerUnavailableError      nobody answers at the address
│   └── DrainingError           the server is shutting down
├── AuthenticationError         the server does not know these credentials, or wants some
├── PermissionDeniedError       it takes the role of an admin
├── SnapshotError               an exported session that the server cannot go on with; see ``.reason``
├── OverloadedError             too many steps wait for the device
│   └── QuotaExceededError          the caller has as many sessions, or steps just now, as it may
├── CapacityError               all slots are leased
├── DeadlineError               no answer in time
│   └── QueueTimeoutError       the step waited too long for the device
├── UnexpectedReplyError        the other side does not keep the contract
├── MissingExtraError           needs a package that the base install does not bring
└── ClientClosedError           used after close()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError

from tenuto_proto.errors import STATUS_DETAILS_KEY, WireError, decode_status
from tenuto_proto.v1 import policy_pb2 as pb

if TYPE_CHECKING:
    from tenuto_client.results import VectorStepResult

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class TenutoError(Exception):
    """Base of every error of this package. The text is for people; branch on the class or on ``reason``."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """Name of the contract's ErrorReason; empty where the server gave none."""
        self.code = code
        """The gRPC status code; None where the error arose on this side."""
        self.metadata = dict(metadata or {})
        """As the reason says in the contract."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server thinks another try makes sense; None where it did not say."""
        self.outcome_unknown = False
        """Whether the step may have been applied nevertheless. The next call settles it, see RemotePolicy.step."""


class PolicyUnknownError(TenutoError):
    """The server serves no such policy, or several and none was named."""


class VersionUnknownError(PolicyUnknownError):
    """The server does not hold this version of the policy."""


class SpaceMismatchError(TenutoError):
    """The served policy's spaces are not those that were expected."""


class SessionError(TenutoError):
    """Something about the session."""


class SessionExistsError(SessionError):
    """The session_id is in use by a session with other options or with steps."""


class SessionGoneError(SessionError):
    """The session has ended and the running episode's state with it; an episode's start opens a new one by itself."""


class SessionUnknownError(SessionGoneError):
    """The server does not know the session."""


class SessionLostError(SessionUnknownError):
    """The server restarted, or another one answers, and the session was not carried over."""


class SessionClosedError(SessionGoneError):
    """The session was closed."""


class SessionExpiredError(SessionGoneError):
    """No step came within the server's idle timeout."""


class ReplayMismatchError(SessionGoneError):
    """The server went on from an older state of the session, and what it has computed since is not what it had."""


class SessionExportedError(SessionGoneError):
    """The session was exported; it goes on at the server that imported it."""


class StepError(TenutoError):
    """The step was refused; the session is where it was."""


class StepIndexError(StepError):
    """The server expects another step index: somebody else steps this session."""

    @property
    def expected(self) -> int | None:
        """The index that the server expects."""
        text = self.metadata.get("expected", "")
        return int(text) if text.isdecimal() else None


class StepInFlightError(StepError):
    """Another step of the session is under way."""


class ObservationError(StepError):
    """The observation does not fit the policy; ``reason`` is one of OBSERVATION_*."""


class ComputeError(StepError):
    """The forward pass failed; the step was not applied."""


class BatchError(TenutoError):
    """A batch, or a row of it, breaks the rules of batches; ``reason`` tells which."""


class RowsError(TenutoError):
    """Some rows of a vector step failed: ``errors`` says which and why, ``result`` holds the rows that succeeded."""

    def __init__(self, result: VectorStepResult) -> None:
        first_row, first = next(iter(result.errors.items()))
        super().__init__(
            f"{len(result.errors)} of {len(result.versions)} rows failed, row {first_row} first: {first}",
            reason=first.reason,
            code=first.code,
            metadata=first.metadata,
            retry_after_s=first.retry_after_s,
        )
        self.result = result
        self.errors = result.errors
        self.outcome_unknown = any(error.outcome_unknown for error in result.errors.values())


class MessageTooLargeError(TenutoError):
    """A message is over the server's limit of bytes."""


class ServerUnavailableError(TenutoError):
    """Nobody answers at the address, or the connection broke."""


class DrainingError(ServerUnavailableError):
    """The server is shutting down: it finishes running episodes but begins none."""


class OverloadedError(TenutoError):
    """Too many steps wait for the server's device."""


class QuotaExceededError(OverloadedError):
    """The caller has as many sessions, or has sent as many steps just now, as it may: ``metadata["quota"]``."""


class AuthenticationError(TenutoError):
    """Credentials are missing, or nobody's."""


class PermissionDeniedError(TenutoError):
    """The caller may not do this: it takes the role of an admin."""


class SnapshotError(TenutoError):
    """An exported session that the server cannot go on with: SNAPSHOT_INVALID or SNAPSHOT_MISMATCH."""


class CapacityError(TenutoError):
    """All slots of the server are leased."""


class DeadlineError(TenutoError):
    """No answer came in time."""


class QueueTimeoutError(DeadlineError):
    """The step waited for the device longer than it may; it was not applied."""


class UnexpectedReplyError(TenutoError):
    """The other side does not keep the contract: not a tenuto server, or one of another version."""


class MissingExtraError(TenutoError):
    """A package that the base install does not bring is missing; the text says how to install it."""


class ClientClosedError(TenutoError):
    """The policy was used after close()."""


GYM_ADVICE = "pip install 'tenuto[gym]', or pip install '.[gym]' in a clone"
"""How gymnasium, POPGym and rich are installed."""
_BY_REASON: dict[int, type[TenutoError]] = {
    pb.POLICY_UNKNOWN: PolicyUnknownError,
    pb.VERSION_UNKNOWN: VersionUnknownError,
    pb.SESSION_UNKNOWN: SessionUnknownError,
    pb.SESSION_CLOSED: SessionClosedError,
    pb.SESSION_EXPIRED: SessionExpiredError,
    pb.SESSION_EXISTS: SessionExistsError,
    pb.STEP_INDEX_MISMATCH: StepIndexError,
    pb.STEP_IN_FLIGHT: StepInFlightError,
    pb.OBSERVATION_FIELDS: ObservationError,
    pb.OBSERVATION_DTYPE: ObservationError,
    pb.OBSERVATION_SHAPE: ObservationError,
    pb.OBSERVATION_OUT_OF_SPACE: ObservationError,
    pb.OBSERVATION_NOT_FINITE: ObservationError,
    pb.BATCH_EMPTY: BatchError,
    pb.BATCH_TOO_LARGE: BatchError,
    pb.BATCH_COLUMNS: BatchError,
    pb.SESSION_REPEATED: BatchError,
    pb.POLICY_MISMATCH: BatchError,
    pb.CAPACITY_REACHED: CapacityError,
    pb.QUEUE_FULL: OverloadedError,
    pb.QUEUE_TIMEOUT: QueueTimeoutError,
    pb.DRAINING: DrainingError,
    pb.COMPUTE_FAILED: ComputeError,
    pb.UNAUTHENTICATED: AuthenticationError,
    pb.PERMISSION_DENIED: PermissionDeniedError,
    pb.QUOTA_EXCEEDED: QuotaExceededError,
    pb.SESSION_EXPORTED: SessionExportedError,
    pb.SNAPSHOT_INVALID: SnapshotError,
    pb.SNAPSHOT_MISMATCH: SnapshotError,
    pb.STORE_UNAVAILABLE: ServerUnavailableError,
}
# A status without a reason comes from gRPC itself or from a proxy.
_BY_CODE: dict[grpc.StatusCode, type[TenutoError]] = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    # What a stopping server answers to calls that it drops.
    grpc.StatusCode.CANCELLED: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
}
_TOO_LARGE = "larger than max"
"""What gRPC says of a message that is over a limit of bytes; its code is that of an overload."""


def error_from_reason(
    code: grpc.StatusCode,
    reason: int,
    message: str,
    metadata: Mapping[str, str],
    server_epoch: int = 0,
    retry_after_s: float | None = None,
) -> TenutoError:
    """Return the exception for a refusal. ``server_epoch``: that of the server which opened the session; 0: none."""
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, UnexpectedReplyError)
    if reason not in _BY_REASON and kind is OverloadedError and _TOO_LARGE in message:
        kind = MessageTooLargeError
    epoch = metadata.get("server_epoch", "")
    if kind is SessionUnknownError and server_epoch and epoch.isdecimal() and int(epoch) != server_epoch:
        kind = SessionLostError
        message = f"the server restarted and the session is gone ({message})"
    name = pb.ErrorReason.Name(cast("pb.ErrorReason", reason)) if reason in _BY_REASON else ""
    return kind(message, reason=name, code=code, metadata=metadata, retry_after_s=retry_after_s)


def error_from_message(error: pb.Error, server_epoch: int = 0) -> TenutoError:
    """Return the exception for an Error message: of a row, or of a whole batch on a stream."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    retry_after_s = error.retry_after_ms / 1e3 if error.retry_after_ms else None
    return error_from_reason(code, error.reason, error.message, dict(error.metadata), server_epoch, retry_after_s)


_BROKEN = "Internal error from Core"
"""What grpc.aio says of a connection that breaks in the middle of an operation; no server does."""


def error_from_rpc(error: Any, server_epoch: int = 0) -> TenutoError:
    """Return the exception for a failed call: a grpc.RpcError of the sync or of the async API."""
    code = cast("grpc.StatusCode | None", error.code()) or grpc.StatusCode.UNKNOWN
    message = str(error.details() or code.name)
    if message.startswith(_BROKEN):
        code = grpc.StatusCode.UNAVAILABLE
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY:
            try:
                decoded = decode_status(cast("bytes", value))
            except DecodeError:
                continue
            if decoded is not None:
                reason, metadata, retry_after_s = decoded
                return error_from_reason(code, reason, message, metadata, server_epoch, retry_after_s)
    return error_from_reason(code, pb.ERROR_REASON_UNSPECIFIED, message, {}, server_epoch)


def error_from_wire(error: WireError, hint: str = "") -> ObservationError:
    """Return the exception for an observation that cannot be packed; ``hint`` ends its text."""
    name = pb.ErrorReason.Name(cast("pb.ErrorReason", error.reason))
    return ObservationError(f"{error}{hint}", reason=name)
