"""``python -m tenuto_server.tokens``: keeps the file of principals and tokens that ``tenuto-serve --tokens`` reads.

A token is printed once, when it is made; the file keeps its SHA-256 alone. The file is replaced in one step, so a
running server reads either the old one or the new one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tenuto_server.errors import ConfigurationError
from tenuto_server.principals import MAX_FILE_BYTES, NAME, Entry, Principal, parse, to_text

PREFIX = "tenuto_"
"""By which scanners for leaked secrets know a token."""


def make_token() -> str:
    """Draw a token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """What the file keeps of a token. A plain hash will do: nobody guesses 256 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


def add(file: Path, principal: Principal) -> str:
    """Make a token for a principal, a further one where it has some, and return it. Raises ConfigurationError.

    What else is said of the principal replaces what the file said.
    """
    entries, token = _read(file), make_token()
    before = next((e for e in entries if e.principal.name == principal.name), Entry(principal))
    entry = Entry(principal, (*before.tokens_sha256, digest_of(token)))
    _write(file, [*(e for e in entries if e is not before), entry])
    return token


def remove(file: Path, name: str, digest_prefix: str | None = None) -> int:
    """Remove a principal, or only its tokens whose hash begins so; returns how many tokens that were.

    Raises ConfigurationError where there is no such principal or token.
    """
    entries = _read(file)
    entry = next((e for e in entries if e.principal.name == name), None)
    if entry is None:
        raise ConfigurationError(f"principal: got {name!r}, expected one of {[e.principal.name for e in entries]}")
    rest = [e for e in entries if e is not entry]
    if digest_prefix is None:
        _write(file, rest)
        return len(entry.tokens_sha256)
    kept = tuple(d for d in entry.tokens_sha256 if not d.startswith(digest_prefix))
    if len(kept) == len(entry.tokens_sha256):
        raise ConfigurationError(f"token of {name!r}: got {digest_prefix!r}, with which no hash of its tokens begins")
    _write(file, [*rest, replace(entry, tokens_sha256=kept)])
    return len(entry.tokens_sha256) - len(kept)


def _read(file: Path) -> list[Entry]:
    try:
        text = file.read_bytes() if file.exists() else None
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from None
    if text is None:
        return []
    if len(text) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{file}: got {len(text)} bytes, expected at most {MAX_FILE_BYTES}")
    return parse(text)


def _write(file: Path, entries: Sequence[Entry]) -> None:
    """Replace the file in one step; a new one is its owner's to read, an old one keeps its mode."""
    try:
        # A link stays, and what it leads to is replaced.
        target = file.resolve()
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w") as written:
                written.write(to_text(entries))
                written.flush()
                os.fsync(written.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).rename(target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written ({error.strerror})") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tenuto_server.tokens", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a token for a principal and print it, once")
    adding.add_argument("file", type=Path, metavar="FILE", help="made where it does not exist")
    adding.add_argument("name", metavar="NAME", help="whose it is; sessions belong to that name")
    adding.add_argument("--admin", action="store_true", help="may list, inspect and export the sessions of others")
    adding.add_argument("--max-sessions", type=int, metavar="N", help="open at once (default: no limit)")
    adding.add_argument("--max-steps-per-s", type=float, metavar="N", help="steps a second (default: no limit)")
    removing = commands.add_parser("remove", help="remove a principal, or one of its tokens")
    removing.add_argument("file", type=Path, metavar="FILE")
    removing.add_argument("name", metavar="NAME")
    removing.add_argument("--token", metavar="HASH", help="only tokens whose SHA-256 begins so (see list)")
    listing = commands.add_parser("list", help="show principals and the beginnings of their tokens' hashes")
    listing.add_argument("file", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. The token goes to standard output, alone; what to know about it to standard error."""
    flags = _parse(argv)
    try:
        if flags.command == "add":
            if not NAME.fullmatch(flags.name):
                raise ConfigurationError(f"name: got {flags.name!r}, expected {NAME.pattern}")
            principal = Principal(flags.name, flags.admin, flags.max_sessions, flags.max_steps_per_s)
            # The same checks as the server's.
            parse(to_text([Entry(principal)]).encode())
            print(add(flags.file, principal))
            print(f"{flags.name}'s token, shown only now; {flags.file} keeps its hash", file=sys.stderr)
        elif flags.command == "remove":
            print(f"removed {remove(flags.file, flags.name, flags.token)} tokens of {flags.name}")
        else:
            for entry in _read(flags.file):
                hashes = " ".join(digest[:12] for digest in entry.tokens_sha256) or "no token"
                print(f"{entry.principal.name}{' (admin)' if entry.principal.is_admin else ''}: {hashes}")
    except ConfigurationError as error:
        sys.exit(f"tokens: {str(error).removeprefix('tokens: ')}")


if __name__ == "__main__":
    main()
