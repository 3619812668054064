"""Reads files that somebody else may have put there: through no link, from no device or pipe, never without a bound."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path | str, max_bytes: int, *, folder: int | None = None, follow_links: bool = False) -> bytes:
    """Return a regular file's bytes; ``path`` is seen from an open ``folder``. Raises OSError, also for larger ones."""
    # Without O_NONBLOCK a pipe would hold the caller up.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = _open(path, flags, folder)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, expected at most {max_bytes}")
        # It may grow meanwhile. Python sets the memory aside that it is asked for: no more than there is to read.
        content = file.read(found.st_size + 1)
    if len(content) > found.st_size:
        raise OSError(errno.EBUSY, "it grows while it is read")
    return content


def open_folder(path: Path | str, folder: int | None = None) -> int:
    """Open a folder that is no link; to be closed. Raises OSError."""
    return _open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, folder)


def _open(path: Path | str, flags: int, folder: int | None) -> int:
    try:
        return os.open(path, flags, dir_fd=folder)
    except OSError as error:
        # ENOTDIR: what Linux says of a link where a folder is wanted.
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and flags & os.O_NOFOLLOW and _is_link(path, folder):
            raise OSError(errno.ELOOP, "a symbolic link") from None
        raise


def _is_link(path: Path | str, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
