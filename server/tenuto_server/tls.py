"""The server's certificate, its key and the authority of its clients, taken anew when their files change.

Connections that stand keep what they were made with; see ``max_connection_age_s``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from tenuto_server.errors import ConfigurationError
from tenuto_server.secret_files import read_file

_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, repr=False)
class TlsFiles:
    """The bytes of the files, found to fit together. Has no text of its own, since it holds a key."""

    certificates: bytes
    """PEM: the server's certificate, then those between it and the authority that clients trust."""
    key: bytes
    client_ca: bytes | None
    expires_unix_s: float
    """When the first of the server's certificates ends."""

    @staticmethod
    def read(certificate: Path, key: Path, client_ca: Path | None) -> TlsFiles:
        """Read and check the files. Blocks. Raises ConfigurationError, which quotes no secret."""
        chain = read_file("tls_certificate", certificate, _MAX_BYTES)
        private = read_file("tls_key", key, _MAX_BYTES, is_private=True)
        authority = None if client_ca is None else read_file("tls_client_ca", client_ca, _MAX_BYTES)
        try:
            found = x509.load_pem_x509_certificates(chain)
        except ValueError:
            raise ConfigurationError(f"tls_certificate: {certificate} holds no certificate in PEM") from None
        try:
            loaded = load_pem_private_key(private, password=None)
        except (ValueError, TypeError):
            raise ConfigurationError(f"tls_key: {key} holds no private key in PEM without a passphrase") from None
        mine, certified = (
            of.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            for of in (loaded.public_key(), found[0].public_key())
        )
        if mine != certified:
            raise ConfigurationError(f"tls_key: {key} is not the key of the first certificate in {certificate}")
        if authority is not None:
            try:
                x509.load_pem_x509_certificates(authority)
            except ValueError:
                raise ConfigurationError(f"tls_client_ca: {client_ca} holds no certificate in PEM") from None
        expires_unix_s = min(c.not_valid_after_utc for c in found).timestamp()
        return TlsFiles(chain, private, authority, expires_unix_s)


class ServerTls:
    """What new connections are made with. gRPC's threads ask for it; the event loop changes it, by one assignment."""

    def __init__(self, files: TlsFiles) -> None:
        self._next: TlsFiles | None = None
        self._requires_client = files.client_ca is not None
        self.files = files

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow :meth:`take`."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self.files), cast("Any", self._fetch), require_client_authentication=self._requires_client
        )

    def take(self, files: TlsFiles) -> None:
        """Go on with other files from the next connection on."""
        assert (files.client_ca is not None) == self._requires_client, "clients are asked for certificates or not"
        self.files = self._next = files

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """None: what there was."""
        taken, self._next = self._next, None
        return None if taken is None else _configuration(taken)


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificates)], files.client_ca)
