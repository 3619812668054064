"""Snapshots in Redis, for several servers: a session that its server has left behind goes on at whichever is asked.

A session is one string, its number of steps (8 bytes, big-endian) before its snapshot. Redis decides by a script which
of two snapshots has more steps. How much outlives Redis itself is a matter of its own persistence: ``appendonly yes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tenuto_server.errors import ConfigurationError, StoreError
from tenuto_server.store import StoredSession

_PREFIX = "tenuto:session:"
_TIMEOUT_S = 2.0
"""For an answer of Redis; what fails is tried again with the next group."""
_WRITE = """
local overtaken, lifetime_ms, num_ended = {}, ARGV[1], tonumber(ARGV[2])
for i = 1, #KEYS do
  local kept, new = redis.call('GETRANGE', KEYS[i], 0, 7), ARGV[2 + i]
  local is_newer = kept ~= '' and kept > string.sub(new, 1, 8)
  if i <= num_ended then
    if not is_newer then redis.call('UNLINK', KEYS[i]) end
  elseif is_newer then
    overtaken[#overtaken + 1] = i - num_ended
  else
    redis.call('SET', KEYS[i], new, 'PX', lifetime_ms)
  end
end
return overtaken
"""


class RedisStore:
    """A database of Redis's, shared with other servers. Raises ConfigurationError where the address makes no sense;
    Redis itself may come later.
    """

    is_shared = True

    def __init__(self, url: str, lifetime_s: float) -> None:
        self._lifetime_ms = max(1, int(1000 * lifetime_s))
        scheme, _, path = url.partition("://")
        database = path.partition("?")[0].partition("/")[2]
        if scheme != "unix" and database and not database.isdecimal():
            # Redis' client would take the first one, which may be somebody else's.
            raise ConfigurationError("durability: the database behind the address of Redis must be a number")
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 1)
            )
        except ValueError:
            # It may hold a password, of which the error's text may quote a part.
            raise ConfigurationError("durability: got no address of Redis, expected redis://HOST:PORT/DB") from None
        self._write: Any = self._redis.register_script(_WRITE)

    def write(self, sessions: Sequence[StoredSession], ended: Iterable[tuple[int, int]]) -> set[int]:
        """See SnapshotStore: one script."""
        ends = list(ended)
        if not sessions and not ends:
            return set()
        keys = [_key(i) for i, _ in ends] + [_key(s.session_id) for s in sessions]
        values = [_count(n) for _, n in ends] + [_count(s.num_steps) + s.snapshot for s in sessions]
        try:
            overtaken = cast("list[int]", self._write(keys, [self._lifetime_ms, len(ends), *values]))
        except redis.RedisError as error:
            raise StoreError(f"redis: {error}") from error
        return {sessions[i - 1].session_id for i in overtaken}

    def read(self, session_ids: Iterable[int]) -> list[StoredSession]:
        """See SnapshotStore."""
        ids = list(session_ids)
        try:
            values = cast("list[bytes | None]", self._redis.mget([_key(i) for i in ids]) if ids else [])
        except redis.RedisError as error:
            raise StoreError(f"redis: {error}") from error
        return [
            StoredSession(session_id, int.from_bytes(value[:8], "big"), value[8:])
            for session_id, value in zip(ids, values, strict=True)
            if value is not None
        ]

    def session_ids(self) -> list[int]:
        """See SnapshotStore: of a shared store nobody's."""
        raise NotImplementedError("a shared store has sessions of other servers")

    def close(self) -> None:
        """See SnapshotStore."""
        self._redis.close()


def _key(session_id: int) -> str:
    return f"{_PREFIX}{session_id:016x}"


def _count(num_steps: int) -> bytes:
    return num_steps.to_bytes(8, "big")
