"""The one error of this package, and the words in which an error travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from tenuto_proto.v1 import policy_pb2 as pb

DOMAIN = "tenuto.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"


class WireError(ValueError):
    """A value that does not fit the contract. ``reason`` is the ErrorReason; the text says what, got, expected."""

    def __init__(self, reason: int, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def encode_status(code: grpc.StatusCode, message: str, reason: int, metadata: Mapping[str, str]) -> bytes:
    """Return google.rpc.Status bytes with an ErrorInfo, for the trailing metadata ``grpc-status-details-bin``."""
    info = error_details_pb2.ErrorInfo(
        reason=pb.ErrorReason.Name(cast(pb.ErrorReason, reason)), domain=DOMAIN, metadata=metadata
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=code.value[0], message=message, details=[detail]).SerializeToString()


def decode_status(details: bytes) -> tuple[int, dict[str, str]] | None:
    """Return (reason, metadata) from :func:`encode_status`; None if there is no ErrorInfo of ours in it."""
    for detail in status_pb2.Status.FromString(details).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            known = info.reason in pb.ErrorReason.keys()  # noqa: SIM118 (an enum wrapper, not a dict)
            reason = pb.ErrorReason.Value(info.reason) if known else pb.ERROR_REASON_UNSPECIFIED
            return reason, dict(info.metadata)
    return None
