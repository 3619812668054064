"""The versions that this server will not serve, and why: GetPolicy tells it to the trainer that published them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import shortened

MAX_LISTED = 16
"""Refused versions of one policy in one answer; the newest ones."""


@dataclass(frozen=True)
class _Refused:
    form: object
    """What the files looked like; of another form the version is tried again."""
    message: str


class RefusedVersions:
    """Owned by the event loop: the reloader keeps it, GetPolicy reads it. Holds no more than the repository does."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, _Refused]] = {}

    def add(self, name: str, version: int, form: object, message: str) -> None:
        """Keep a version out. ``message`` is for whoever may call the server."""
        # A manifest can hold, and a text quote, half a surrogate pair, which no message can carry.
        sendable = shortened(message).encode(errors="replace").decode()
        self._of.setdefault(name, {})[version] = _Refused(form, sendable)

    def holds(self, name: str, version: int, form: object) -> bool:
        """Whether the version was refused in just this form."""
        found = self._of.get(name, {}).get(version)
        return found is not None and found.form == form

    def discard(self, name: str, version: int) -> None:
        """Forget a version that is served after all."""
        self._of.get(name, {}).pop(version, None)

    def keep_only(self, present: Mapping[str, Collection[int]]) -> None:
        """Forget what is no longer in the repository; ``present`` are its policies with their versions."""
        kept = {name: {v: r for v, r in of.items() if v in present.get(name, ())} for name, of in self._of.items()}
        self._of = {name: of for name, of in kept.items() if of}

    def to_wire(self, name: str) -> list[pb.RefusedVersion]:
        """List a policy's newest refused versions, ascending."""
        newest = sorted(self._of.get(name, {}).items())[-MAX_LISTED:]
        return [pb.RefusedVersion(version=version, message=refused.message) for version, refused in newest]
