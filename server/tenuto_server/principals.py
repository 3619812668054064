"""Who calls: the names that sessions belong to, and what each may."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Principal:
    """One caller, as its credentials say."""

    name: str
    is_admin: bool = False
    """Whether it may see, inspect and export the sessions of others."""
    max_sessions: int | None = None
    """Sessions that it may have open at once; None: as many as there are slots."""
    max_steps_per_s: float | None = None
    """Steps that it may send, averaged over a second; None: as many as the device takes."""


ANYONE = Principal("", is_admin=True)
"""The caller where the server does not ask who calls."""
