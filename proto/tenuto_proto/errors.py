"""The one error of this package, and the words in which an error travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tenuto_proto.v1 import policy_pb2 as pb

DOMAIN = "tenuto.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"


class WireError(ValueError):
    """A value that does not fit the contract. ``reason`` is the ErrorReason; the text says what, got, expected."""

    def __init__(self, reason: int, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StatusDetails(NamedTuple):
    """What the details of a failed call say."""

    reason: int
    """An ErrorReason."""
    metadata: dict[str, str]
    """As the reason says."""
    retry_after_s: float | None
    """Seconds after which another try makes sense; None: not said."""


def encode_status(
    code: grpc.StatusCode,
    message: str,
    reason: int,
    metadata: Mapping[str, str],
    retry_after_s: float | None = None,
) -> bytes:
    """Return google.rpc.Status bytes with an ErrorInfo, for the trailing metadata ``grpc-status-details-bin``.

    ``retry_after_s``: seconds after which another try makes sense, as a RetryInfo; None: there is none.
    """
    status = status_pb2.Status(code=code.value[0], message=message)
    name = pb.ErrorReason.Name(cast(pb.ErrorReason, reason))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=name, domain=DOMAIN, metadata=metadata))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(1e9 * retry_after_s))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status.SerializeToString()


def decode_status(details: bytes) -> StatusDetails | None:
    """Return what :func:`encode_status` was given; None if there is no ErrorInfo of ours in it."""
    found: tuple[int, dict[str, str]] | None = None
    retry_after_s: float | None = None
    for detail in status_pb2.Status.FromString(details).details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if found is None and detail.Unpack(info) and info.domain == DOMAIN:
            known = info.reason in pb.ErrorReason.keys()  # noqa: SIM118 (an enum wrapper, not a dict)
            found = pb.ErrorReason.Value(info.reason) if known else pb.ERROR_REASON_UNSPECIFIED, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    return None if found is None else StatusDetails(*found, retry_after_s)
