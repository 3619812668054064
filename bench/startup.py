"""Measures how long a server takes to be ready and a client to be imported, and the server's memory at rest.

    python bench/startup.py [--rounds 3]

Cold is the first start after an installation: Python's byte code and the DNC's compiled loops (numba) are made anew, in
folders of their own. Warm is every later start.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tenuto_bench.served import publish, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console, figures = Console(width=100), dict[str, list[float]]()
    memories = list[float]()
    for _ in track(range(options.rounds), "starting", console=console, transient=True):
        for memory in ("dnc", "frameconv"):
            with tempfile.TemporaryDirectory() as folder:
                publish(Path(folder, "repository"), (memory,))
                for name in ("cold", "warm"):
                    seconds, megabytes = start(Path(folder))
                    figures.setdefault(f"tenuto-serve ready, {memory}, {name} (s)", []).append(seconds)
                if memory == "dnc":
                    memories.append(megabytes)
        figures.setdefault("python alone (s)", []).append(run("pass"))
        figures.setdefault("import tenuto_client, python included (s)", []).append(run("import tenuto_client"))
    figures["server's memory at rest, dnc, 4096 slots (MB)"] = memories
    table = Table("what", "median", "highest", title=f"start-up, {os.cpu_count()} CPUs")
    for what, values in figures.items():
        table.add_row(what, f"{statistics.median(values):.2f}", f"{max(values):.2f}")
    console.print(table)


def start(folder: Path) -> tuple[float, float]:
    """Start a server with its caches below ``folder``; returns (seconds until ready, resident MB)."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")
    began = time.perf_counter()
    try:
        with serve(folder / "repository") as server:
            seconds = time.perf_counter() - began
            resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
            assert resident is not None
            return seconds, int(resident[1]) / 1000
    finally:
        del os.environ["PYTHONPYCACHEPREFIX"], os.environ["NUMBA_CACHE_DIR"]


def run(program: str) -> float:
    """Seconds that the interpreter takes for a program; the best of five, the others were disturbed."""
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
