"""The files by which a command line says who calls and whom it trusts: a token, certificates, a key."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc

from tenuto_client.transport import authorization_of


@dataclass(frozen=True)
class AccessFiles:
    """Paths; nothing is read before it is asked for. Raises ValueError where they do not fit together."""

    token_file: Path | None = None
    """Its first line is the token."""
    ca_certificate: Path | None = None
    """PEM: whom to trust to be the server; with it everything is encrypted."""
    client_certificate: Path | None = None
    """PEM, for servers that ask for one."""
    client_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("--client-certificate and --client-key: got one of them, expected both or neither")
        if self.client_certificate is not None and self.ca_certificate is None:
            raise ValueError("--client-certificate: got one without --ca-certificate, expected both")

    def token(self) -> str | None:
        """Read the token. Raises ValueError, which does not quote it."""
        if self.token_file is None:
            return None
        lines = _read("--token-file", self.token_file).decode(errors="replace").splitlines()
        token = lines[0].strip() if lines else ""
        try:
            authorization_of(token)
        except ValueError as error:
            raise ValueError(f"--token-file: {self.token_file}: {error}") from None
        return token

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Read the certificates; None where there are none. Equal files give the same object. Raises ValueError."""
        return None if self.ca_certificate is None else _credentials(self)


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of AccessFiles."""
    for flag, text in (
        ("--token-file", "its first line is the bearer token to call with"),
        ("--ca-certificate", "PEM file: whom to trust to be the server; with it everything is encrypted"),
        ("--client-certificate", "PEM file, for a server that asks for one"),
        ("--client-key", "PEM file: its private key"),
    ):
        parser.add_argument(flag, type=Path, metavar="FILE", help=text)


@cache
def _credentials(files: AccessFiles) -> grpc.ChannelCredentials:
    assert files.ca_certificate is not None
    return grpc.ssl_channel_credentials(
        _read("--ca-certificate", files.ca_certificate),
        _read("--client-key", files.client_key) if files.client_key is not None else None,
        _read("--client-certificate", files.client_certificate) if files.client_certificate is not None else None,
    )


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag}: got {path}, which cannot be read ({error.strerror})") from None
