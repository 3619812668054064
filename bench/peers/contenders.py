"""Who is measured: tenuto in its modes, the peers, and the echo as a floor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenuto_bench.cases import MODES, Case, Mode
from tenuto_bench.clients import OWN_CLIENT

Kind = Literal["tenuto", "peer", "floor"]
CLIENT = Path(__file__).with_name("client.py")
PEERS = {"triton": "Triton", "ray": "Ray Serve", "websocket": "websocket"}
"""Peer -> its name in the tables."""
ECHO = {"unary": "echo, unary", "stream": "echo, stream"}
FORWARD = "forward alone"


@dataclass(frozen=True)
class Contender:
    """One line of every table."""

    name: str
    kind: Kind
    server: str
    """Whose server it is measured with."""
    mode: Mode
    command: tuple[str, ...]
    """Of its client process."""

    def case(self, sessions: int, processes: int, policy: str = "frameconv") -> Case:
        """Return the case of so many sessions; in mode ``batch`` a process makes one call for all of its own."""
        return Case(self.mode, policy, sessions, processes, sessions // processes if self.mode == "batch" else 1)


def contenders(venvs: Path, peers: Sequence[str]) -> list[Contender]:
    """Return all of them, peers first."""
    clients = {peer: _client(str(venvs / peer / "bin" / "python"), peer) for peer in peers}
    return [
        *(Contender(PEERS[peer], "peer", peer, "unary", clients[peer]) for peer in peers),
        *(Contender(f"tenuto, {mode}", "tenuto", "tenuto", mode, OWN_CLIENT) for mode in MODES),
        *(
            Contender(ECHO[mode], "floor", "echo", mode, _client(sys.executable, "echo"))
            for mode in ("unary", "stream")
        ),
    ]


def _client(python: str, name: str) -> tuple[str, ...]:
    return python, "-W", "ignore", str(CLIENT), name
