"""Every failure arrives as a class of this package, chosen by reason and code, never by text."""

from typing import Any

import grpc
import pytest

from tenuto_client import (
    DeadlineError,
    MessageTooLargeError,
    OverloadedError,
    SessionLostError,
    SessionUnknownError,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client import errors as errors_module
from tenuto_client.errors import ServerUnavailableError, error_from_message, error_from_reason, error_from_rpc
from tenuto_proto.errors import STATUS_DETAILS_KEY, encode_status
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal


class FailedCall:
    """What a grpc.RpcError offers."""

    def __init__(self, code: grpc.StatusCode, details: bytes | None = None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "for people"

    def trailing_metadata(self) -> Any:
        return None if self._details is None else (("other", "x"), (STATUS_DETAILS_KEY, self._details))


@pytest.mark.parametrize("reason", [value for value in pb.ErrorReason.values() if value])
def test_each_reason_has_a_class_and_keeps_its_name_and_metadata(reason: pb.ErrorReason) -> None:
    details = encode_status(grpc.StatusCode.ABORTED, "text", reason, {"expected": "4"})
    error = error_from_rpc(FailedCall(grpc.StatusCode.ABORTED, details))
    assert type(error) not in (TenutoError, UnexpectedReplyError)
    assert (error.reason, error.code) == (pb.ErrorReason.Name(reason), grpc.StatusCode.ABORTED)
    assert error.metadata == {"expected": "4"} and str(error) == "for people"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, ServerUnavailableError),
        (grpc.StatusCode.CANCELLED, ServerUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNIMPLEMENTED, UnexpectedReplyError),
    ],
)
@pytest.mark.parametrize("details", [None, b"", b"\xff\xff no status"])
def test_a_status_without_a_reason_is_told_by_its_code(
    code: grpc.StatusCode, kind: type[TenutoError], details: bytes | None
) -> None:
    error = error_from_rpc(FailedCall(code, details))
    assert type(error) is kind and error.reason == ""


def test_a_connection_that_breaks_within_grpc_is_an_unavailable_server() -> None:
    call = FailedCall(grpc.StatusCode.INTERNAL)
    call.details = lambda: "Internal error from Core"
    error = error_from_rpc(call)
    assert type(error) is ServerUnavailableError and error.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("side", ["Received", "SERVER: Received", "CLIENT: Sent"])
def test_a_message_over_a_limit_is_no_overload_though_its_code_is(side: str) -> None:
    call = FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED)
    call.details = lambda: f"{side} message larger than max (16777230 vs. 16777216)"
    assert type(error_from_rpc(call)) is MessageTooLargeError


@pytest.mark.parametrize(("sent", "told"), [(0.25, 0.25), (7200.5, 7200.5), (None, None)])
def test_the_servers_hint_when_to_try_again_is_told(sent: float | None, told: float | None) -> None:
    details = encode_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "text", pb.QUEUE_FULL, {}, sent)
    error = error_from_rpc(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert type(error) is OverloadedError and error.retry_after_s == told
    row = Refusal(pb.QUEUE_FULL, "text", retry_after_s=sent).to_wire()
    assert error_from_message(row).retry_after_s == told


def test_a_reason_of_a_newer_contract_is_told_by_its_code() -> None:
    assert type(error_from_reason(grpc.StatusCode.UNAVAILABLE, 999, "new", {})) is ServerUnavailableError


@pytest.mark.parametrize(
    ("epoch", "opened_at", "kind"),
    [
        ("8", 7, SessionLostError),
        ("7", 7, SessionUnknownError),
        ("", 7, SessionUnknownError),
        ("8", 0, SessionUnknownError),
    ],
)
def test_a_session_is_lost_where_the_servers_epoch_has_changed(
    epoch: str, opened_at: int, kind: type[TenutoError]
) -> None:
    error = error_from_reason(
        grpc.StatusCode.NOT_FOUND, pb.SESSION_UNKNOWN, "", {"server_epoch": epoch} if epoch else {}, opened_at
    )
    assert type(error) is kind


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors_module.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if name.endswith("Error"):
            drawn.append(((len(line) - len(line.lstrip("│├└─ "))) // 4, name))

    parents: dict[int, str] = {}
    expected: dict[str, str] = {}
    for depth, name in drawn:
        parents[depth] = name
        expected[name] = parents[depth - 1] if depth else "Exception"
    classes = [c for c in vars(errors_module).values() if isinstance(c, type) and issubclass(c, TenutoError)]
    assert {c.__name__: c.__mro__[1].__name__ for c in classes} == expected
