"""What the logic of this package asks the outside world for: calls and pauses.

Programs (generators) yield effects and are sent the answers. They do no I/O, so that one program serves the sync and
the async API, and a test drives it by hand.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

if TYPE_CHECKING:
    from tenuto_client.step import Step

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One rpc of PolicyService."""

    method: str
    request: Message
    timeout_s: float
    """From now until the call fails with DeadlineError."""
    session_id: int = 0
    """Sent as the metadata x-session-id; 0: the call is not about one session."""
    server_epoch: int = 0
    """Of the server where the session was opened, to tell a restart from an unknown session."""
    step: Step | None = None
    """Of a Step: itself, for a transport that sends it over a stream and answers with its StepResult."""


@dataclass(frozen=True)
class Calls:
    """Calls to be made at once. The answer is a list with the reply or the TenutoError of each, in the same order."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Sleep:
    """A pause. The answer is None."""

    seconds: float


Program = Generator["Calls | Sleep", Any, T]
