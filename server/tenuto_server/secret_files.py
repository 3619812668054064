"""Reads files that an operator names and may replace while the server runs: tokens, certificates, keys."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from tenuto_server.errors import ConfigurationError

log = logging.getLogger(__name__)


def read_file(what: str, path: Path, max_bytes: int, *, is_private: bool = False) -> bytes:
    """Return a regular file's bytes. Blocks; follows links, since mounted secrets are links.

    Raises ConfigurationError, which never holds a byte of the file. ``is_private``: warns where all may read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"{what}: got {path}, which cannot be read ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{what}: got {path}, expected a regular file")
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o002:
            raise ConfigurationError(f"{what}: {path} has mode {mode:04o}, expected one with which not all may write")
        if is_private and mode & 0o004:
            log.warning("%s: all users of this machine may read %s (mode %04o)", what, path, mode)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigurationError(f"{what}: got {path}, which cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise ConfigurationError(f"{what}: {path} has more than {max_bytes} bytes")
    return content
