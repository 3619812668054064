"""Names of threads, as tools outside of Python show them (``top -H``, /proc)."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_NAME = 15


def name_thread(name: str) -> None:
    """Give the calling thread a name of at most 15 characters; on Linux, elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
