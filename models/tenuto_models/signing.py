"""Signatures of checkpoints, ed25519: whoever may write to a repository can still not put a version of his own there.

``python -m tenuto_models.signing make-keys SECRET PUBLIC`` makes a key pair: the trainer signs with the first file,
servers check with the second. ``… sign SECRET VERSION`` signs a version that lies in a repository already. Keys are
PEM; the file of public keys may hold several, one after the other, so that a key can be replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from tenuto_models.errors import ConfigError, ModelError
from tenuto_models.safe_files import read_regular

SIGNATURE_BYTES = 64
# Nothing else that this key may sign begins so.
_CONTEXT = b"tenuto checkpoint manifest v1\0"
_MAX_KEY_BYTES = 64 * 1024
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class Signer:
    """Signs manifests. Has no text of its own, since it holds a secret."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @staticmethod
    def from_file(path: Path) -> Signer:
        """Read the secret key. Raises ConfigError, which never holds a byte of the file."""
        try:
            key = load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError):
            raise ConfigError(f"signing key: {path} holds no private key in PEM without a passphrase") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"signing key: {path} holds a key of another kind, expected ed25519")
        return Signer(key)

    def sign(self, manifest: bytes) -> bytes:
        """Return the signature of a manifest's bytes, which name policy and version and hold all digests."""
        return self._key.sign(_CONTEXT + manifest)


class Verifier:
    """Knows whose signatures count."""

    def __init__(self, keys: Sequence[Ed25519PublicKey]) -> None:
        self._keys = tuple(keys)

    @staticmethod
    def from_file(path: Path) -> Verifier:
        """Read one public key or several. Raises ConfigError."""
        blocks, keys = _PUBLIC_PEM.findall(_read(path)), list[Ed25519PublicKey]()
        for block in blocks:
            try:
                key = load_pem_public_key(block)
            except ValueError:
                raise ConfigError(f"public key: {path} holds one that is no PEM") from None
            if not isinstance(key, Ed25519PublicKey):
                raise ConfigError(f"public key: {path} holds a key of another kind, expected ed25519")
            keys.append(key)
        if not keys:
            raise ConfigError(f"public key: {path} holds no public key in PEM")
        return Verifier(keys)

    def accepts(self, manifest: bytes, signature: bytes) -> bool:
        """Whether one of the keys has signed exactly these bytes."""
        for key in self._keys:
            try:
                key.verify(signature, _CONTEXT + manifest)
            except InvalidSignature:
                continue
            return True
        return False


def make_key_pair(secret: Path, public: Path) -> None:
    """Write a new pair; the secret one is its owner's alone to read. Raises ConfigError; overwrites nothing."""
    key = Ed25519PrivateKey.generate()
    files = (
        (secret, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        (public, 0o644, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
    )
    for path, mode, text in files:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _MAX_KEY_BYTES, follow_links=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tenuto_models.signing", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make-keys", help="make a key pair")
    making.add_argument("secret", type=Path, metavar="SECRET", help="file to make, for the trainer alone")
    making.add_argument("public", type=Path, metavar="PUBLIC", help="file to make, for the servers")
    signing = commands.add_parser("sign", help="sign a version after looking whether it is sound")
    signing.add_argument("secret", type=Path, metavar="SECRET", help="file of the secret key")
    signing.add_argument("version", type=Path, metavar="VERSION", help="<repository>/<policy>/<version>")
    flags = parser.parse_args(argv)
    try:
        if flags.command == "make-keys":
            make_key_pair(flags.secret, flags.public)
        else:
            # Torch takes seconds to import.
            from tenuto_models import checkpoint

            checkpoint.sign(flags.version, Signer.from_file(flags.secret))
    except ModelError as error:
        sys.exit(f"signing: {error}")


if __name__ == "__main__":
    main()
