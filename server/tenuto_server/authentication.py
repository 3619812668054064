"""Says who calls, by bearer token or by client certificate, and ends the streams of those who may no longer.

Owned by the event loop. The file of principals is read anew while the server runs; one that cannot be used is refused
as a whole and the one before it goes on.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal
from tenuto_server.principals import ANYONE, Entry, Principal

AUTHORIZATION = "authorization"
_SCHEME = "Bearer "


@dataclass(eq=False)
class Caller:
    """Who has a stream open. ``principal`` changes with the file."""

    credential: str
    """The hash of a token, or a certificate's name, with what it is before it."""
    principal: Principal
    is_revoked: bool = False


class Authentication:
    """Answers ``principal(context)`` for every call.

    With tokens, a caller is who its token says; without one in the call, who its certificate says, where the
    connection has one. Where there is a file of principals, a name that is not in it is nobody's.
    """

    def __init__(self, entries: Sequence[Entry] | None = None, *, by_certificate: bool = False) -> None:
        """``entries``: of the file of principals, None where there is none. ``by_certificate``: the transport has
        verified a certificate of every client.
        """
        self._by_certificate, self._has_file = by_certificate, entries is not None
        self._by_digest: dict[bytes, tuple[bytes, Principal]] = {}
        self._by_name: dict[str, Principal] = {}
        self._cache: dict[str, tuple[str, Principal]] = {}
        """Of headers that were good: credential and principal. As large as the number of tokens at most."""
        self._streams: dict[asyncio.Task[Any], Caller] = {}
        if entries is not None:
            self.take(entries)

    @property
    def is_on(self) -> bool:
        """Whether callers must say who they are."""
        return self._has_file or self._by_certificate

    def take(self, entries: Sequence[Entry]) -> int:
        """Go on with other entries of the file; returns the number of streams that this ends."""
        digests = [(bytes.fromhex(d), e.principal) for e in entries for d in e.tokens_sha256]
        self._by_digest = {digest: (digest, principal) for digest, principal in digests}
        self._by_name = {e.principal.name: e.principal for e in entries}
        self._cache.clear()
        num_ended = 0
        for task, caller in self._streams.items():
            now = self._of_credential(caller.credential)
            if now is not None and now.name == caller.principal.name:
                caller.principal = now
            elif not caller.is_revoked:
                caller.is_revoked = True
                task.cancel()
                num_ended += 1
        return num_ended

    def principal(self, context: Any) -> Principal:
        """Say who makes a call. Raises Refusal (UNAUTHENTICATED)."""
        return self._find(context)[1] if self._has_file or self._by_certificate else ANYONE

    @contextmanager
    def stream(self, context: Any) -> Generator[Caller]:
        """Say who has opened the stream that this task serves, until it ends; raises Refusal (UNAUTHENTICATED).

        A credential that is taken away meanwhile cancels the block and raises that refusal too.
        """
        if not self.is_on:
            yield Caller("", ANYONE)
            return
        task = asyncio.current_task()
        assert task is not None, "a stream is served by a task"
        caller = self._streams[task] = Caller(*self._find(context))
        try:
            yield caller
        except asyncio.CancelledError:
            if not caller.is_revoked:
                raise
            raise Refusal(pb.UNAUTHENTICATED, "the credentials of this stream are no longer valid") from None
        finally:
            del self._streams[task]

    def _find(self, context: Any) -> tuple[str, Principal]:
        if self._has_file:
            for key, value in context.invocation_metadata():
                if key == AUTHORIZATION:
                    found = self._cache.get(value)
                    return found if found is not None else self._check(value)
        if self._by_certificate:
            name = self._certificate_name(context)
            principal = self._of_credential(f"certificate {name}")
            if principal is not None:
                return f"certificate {name}", principal
            raise Refusal(pb.UNAUTHENTICATED, "the certificate is of nobody whom this server knows")
        raise Refusal(pb.UNAUTHENTICATED, f"metadata {AUTHORIZATION}: got none, expected a bearer token")

    def _check(self, header: str | bytes) -> tuple[str, Principal]:
        """Look a header up that was not good before. The text of the refusal says nothing of it."""
        refusal = Refusal(pb.UNAUTHENTICATED, f"metadata {AUTHORIZATION}: got no valid bearer token")
        # RFC 9110: the scheme's case does not matter.
        if not isinstance(header, str) or header[: len(_SCHEME)].lower() != _SCHEME.lower():
            raise refusal
        digest = sha256(header[len(_SCHEME) :].strip().encode(errors="replace")).digest()
        known = self._by_digest.get(digest)
        # The time of the look-up tells something of a hash, and nothing of the token that it is of.
        if known is None or not hmac.compare_digest(known[0], digest):
            raise refusal
        found = f"token {digest.hex()}", known[1]
        if len(self._cache) >= 4 * len(self._by_digest):  # Spaces make more than one header of a token.
            self._cache.clear()
        self._cache[header] = found
        return found

    def _of_credential(self, credential: str) -> Principal | None:
        kind, _, value = credential.partition(" ")
        if kind == "token":
            known = self._by_digest.get(bytes.fromhex(value))
            return None if known is None else known[1]
        return self._by_name.get(value) if self._has_file else Principal(value)

    @staticmethod
    def _certificate_name(context: Any) -> str:
        """The first subject alternative name of the client's certificate; the common name where it has none."""
        identities: Sequence[bytes] | None = context.peer_identities()
        name = bytes(identities[0]).decode(errors="replace") if identities else ""
        if not name:
            raise Refusal(pb.UNAUTHENTICATED, "the certificate has no name: neither subject alternative nor common")
        return name
