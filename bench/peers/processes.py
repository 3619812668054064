"""A process and all below it: its CPU time, and signals to the whole of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection
from pathlib import Path

END_S = 15.0
"""How long a server may take to end before it is killed."""


def tree(pid: int) -> list[int]:
    """Return the process and all below it; those that have ended are left out."""
    try:
        children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_s(pid: int) -> float:
    """CPU seconds of the process and all below it, user and system."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(") ", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def threads_cpu_s(pid: int, names: Collection[str]) -> float:
    """CPU seconds of the process's threads of these names."""
    spent = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() in names:
                spent += int((task / "schedstat").read_text().split()[0]) / 1e9
    return spent


def is_alive(pid: int) -> bool:
    """Whether the process runs or is paused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to the process and all below it."""
    for each in tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


def end(process: subprocess.Popen[str]) -> None:
    """End the process, kindly first, and whatever of it is left."""
    below = tree(process.pid)
    send(process.pid, signal.SIGCONT)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    for each in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
