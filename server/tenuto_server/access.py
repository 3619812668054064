"""Keeps tokens and certificates as their files are: looks at them regularly and takes what changed into use.

Owned by the event loop; files are read on a thread. Files that cannot be used are refused, counted and logged, and
what was read before goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenuto_server.authentication import Authentication
from tenuto_server.config import ServerConfig
from tenuto_server.errors import ConfigurationError
from tenuto_server.metrics import Metrics
from tenuto_server.principals import MAX_FILE_BYTES, Entry, parse
from tenuto_server.secret_files import read_file
from tenuto_server.tls import ServerTls, TlsFiles

log = logging.getLogger(__name__)
LOOK_S = 1.0
"""Seconds between two looks at the files."""
T = TypeVar("T")


class Access:
    """Who may call, and the encryption of the port. Raises ConfigurationError where a file cannot be used."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._seen = {what: _form(files) for what, files in self._files().items()}
        entries = _read_entries(config.tokens) if config.tokens else None
        self.authentication = Authentication(entries, by_certificate=config.tls_client_ca is not None)
        self.tls = None if config.tls_certificate is None else ServerTls(self._read_tls())
        self._observe()

    async def watch(self) -> None:
        """Take changed files into use, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Take changed files into use, once."""
        for what, files in self._files().items():
            form = await asyncio.to_thread(_form, files)
            if form == self._seen[what]:
                continue
            # Before they are read: what changes meanwhile is looked at again.
            self._seen[what] = form
            if what == "tokens":
                tokens = self._config.tokens
                assert tokens is not None
                await self._reload(what, lambda tokens=tokens: _read_entries(tokens), self._take_entries)
            else:
                await self._reload(what, self._read_tls, self._take_tls)
        self._observe()

    async def _reload(self, what: str, read: Callable[[], T], take: Callable[[T], None]) -> None:
        try:
            found = await asyncio.to_thread(read)
        except ConfigurationError as error:
            self._metrics.credential_reloads.labels(what, "refused").inc()
            log.error("refused the changed files of %s, those before go on: %s", what, error)
        else:
            take(found)
            self._metrics.credential_reloads.labels(what, "taken").inc()

    def _take_entries(self, entries: list[Entry]) -> None:
        num_ended = self.authentication.take(entries)
        log.info("took the changed tokens: %d principals; ended %d streams", len(entries), num_ended)

    def _take_tls(self, files: TlsFiles) -> None:
        assert self.tls is not None
        self.tls.take(files)
        log.info("took the changed certificate for new connections")

    def _read_tls(self) -> TlsFiles:
        config = self._config
        assert config.tls_certificate is not None and config.tls_key is not None
        return TlsFiles.read(config.tls_certificate, config.tls_key, config.tls_client_ca)

    def _files(self) -> dict[str, list[Path]]:
        config, files = self._config, dict[str, list[Path]]()
        if config.tokens is not None:
            files["tokens"] = [config.tokens]
        if config.tls_certificate is not None and config.tls_key is not None:
            files["tls"] = [config.tls_certificate, config.tls_key]
            files["tls"] += [config.tls_client_ca] if config.tls_client_ca is not None else []
        return files

    def _observe(self) -> None:
        if self.tls is not None:
            self._metrics.certificate_expiry.set(self.tls.files.expires_unix_s)


def _read_entries(path: Path) -> list[Entry]:
    return parse(read_file("tokens", path, MAX_FILE_BYTES))


def _form(files: list[Path]) -> object:
    """What tells changed files from those before. Follows links, as secrets that are mounted anew need it."""
    found: list[object] = []
    for path in files:
        try:
            stat = path.stat()
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        except OSError as error:
            found.append(error.strerror)
    return found
