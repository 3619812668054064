"""Who calls: the names that sessions belong to, what each may, and the file that tells the server's callers.

The file is JSON. It holds hashes of tokens, never a token, so that who reads it learns nothing that lets him in::

    {"format_version": 1,
     "principals": [{"name": "robot-7", "tokens_sha256": ["9f86d0…"], "admin": false,
                     "max_sessions": 8, "max_steps_per_s": 400}]}

Two tokens of one principal let clients change over from one to the other. One without tokens is known by its
certificate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tenuto_server.errors import ConfigurationError

FORMAT_VERSION = 1
MAX_FILE_BYTES = 16 * 1024 * 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/*+-]{0,127}")
"""Also what certificates hold: host names, addresses of mail and IP, spiffe://…"""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"name", "tokens_sha256", "admin", "max_sessions", "max_steps_per_s"}


@dataclass(frozen=True)
class Principal:
    """One caller, as its credentials say."""

    name: str
    is_admin: bool = False
    """Whether it may see, inspect and export the sessions of others."""
    max_sessions: int | None = None
    """Sessions that it may have open at once; None: as many as there are slots."""
    max_steps_per_s: float | None = None
    """Steps that it may send, averaged over a second; None: as many as the device takes."""


ANYONE = Principal("", is_admin=True)
"""The caller where the server does not ask who calls."""


@dataclass(frozen=True)
class Entry:
    """A principal of the file with the SHA-256, in hexadecimal, of each of its tokens."""

    principal: Principal
    tokens_sha256: tuple[str, ...] = ()


def parse(text: bytes) -> list[Entry]:
    """Read the file's text. Raises ConfigurationError, whose text quotes no value that could be a token."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        # JSON's own message has the position; UnicodeDecodeError's would quote.
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigurationError(f"tokens: not JSON{where}") from None
    if not isinstance(document, dict) or set(document) != {"format_version", "principals"}:
        raise ConfigurationError("tokens: expected an object with format_version and principals, and nothing else")
    if document["format_version"] != FORMAT_VERSION:
        raise ConfigurationError(f"tokens: format_version: expected {FORMAT_VERSION}")
    if not isinstance(document["principals"], list):
        raise ConfigurationError("tokens: principals: expected a list")
    entries = [_entry(number, fields) for number, fields in enumerate(document["principals"])]
    names, digests = [e.principal.name for e in entries], [d for e in entries for d in e.tokens_sha256]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"tokens: principal {name!r}: got it twice, expected once")
    if len(set(digests)) < len(digests):
        raise ConfigurationError("tokens: tokens_sha256: got one twice, expected each once in the file")
    return entries


def to_text(entries: Sequence[Entry]) -> str:
    """Write the file's text."""
    listed: list[dict[str, Any]] = []
    for entry in entries:
        principal = entry.principal
        fields: dict[str, Any] = {"name": principal.name, "tokens_sha256": list(entry.tokens_sha256)}
        fields["admin"] = principal.is_admin
        for name in ("max_sessions", "max_steps_per_s"):
            if (value := getattr(principal, name)) is not None:
                fields[name] = value
        listed.append(fields)
    return json.dumps({"format_version": FORMAT_VERSION, "principals": listed}, indent=2) + "\n"


def _entry(number: int, fields: Any) -> Entry:
    where = f"tokens: principals[{number}]"
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{where}: expected an object")
    # Keys are counted, not quoted: somebody may have put a token there.
    if extra := len(fields.keys() - _KEYS):
        raise ConfigurationError(f"{where}: got {extra} unknown keys, expected some of {', '.join(sorted(_KEYS))}")
    name = fields.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigurationError(f"{where}: name: expected {NAME.pattern}")
    digests = fields.get("tokens_sha256", [])
    if not isinstance(digests, list) or not all(isinstance(d, str) and _SHA256.fullmatch(d) for d in digests):
        raise ConfigurationError(f"{where}: tokens_sha256: expected a list of 64 lower-case hexadecimal digits each")
    is_admin = fields.get("admin", False)
    if not isinstance(is_admin, bool):
        raise ConfigurationError(f"{where}: admin: expected true or false")
    max_sessions = fields.get("max_sessions")
    if max_sessions is not None and (type(max_sessions) is not int or max_sessions < 0):
        raise ConfigurationError(f"{where}: max_sessions: expected a number of at least 0")
    rate = fields.get("max_steps_per_s")
    if rate is not None and (type(rate) not in (int, float) or not 0 < rate < math.inf):
        raise ConfigurationError(f"{where}: max_steps_per_s: expected a number of more than 0")
    return Entry(Principal(name, is_admin, max_sessions, rate), tuple(digests))
