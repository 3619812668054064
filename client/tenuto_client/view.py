"""Shows how tenuto-play goes on: one live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_LINE_EVERY_S = 2.0
LIVE_LINE_EVERY_S = 0.1


class View(Protocol):
    """Takes what there is to show."""

    def update(self, line: Callable[[], str]) -> None:
        """Show the state of things; ``line`` is called only where something is shown."""

    def note(self, text: str) -> None:
        """Show something that happened."""


class PlainView:
    """Prints a line every two seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock() + PLAIN_LINE_EVERY_S

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, line: Callable[[], str]) -> None:
        """See View."""
        if self._clock() >= self._next_s:
            self._next_s = self._clock() + PLAIN_LINE_EVERY_S
            print(line(), flush=True)

    def note(self, text: str) -> None:
        """See View."""
        print(text, flush=True)


class LiveView:
    """Keeps one line at the bottom of the terminal up to date. Needs rich."""

    def __init__(self, live: Live, clock: Callable[[], float] = time.monotonic) -> None:
        self._live, self._clock, self._next_s = live, clock, 0.0

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, line: Callable[[], str]) -> None:
        """See View."""
        from rich.text import Text

        if self._clock() >= self._next_s:
            self._next_s = self._clock() + LIVE_LINE_EVERY_S
            # On one line also where the terminal is narrower.
            self._live.update(Text(line(), no_wrap=True, overflow="ellipsis"))

    def note(self, text: str) -> None:
        """See View."""
        self._live.console.print(text, markup=False)


def open_view() -> AbstractContextManager[View]:
    """Return the live view on a terminal with rich, else the plain one."""
    if sys.stdout.isatty():
        try:
            from rich.live import Live
        except ImportError:
            return PlainView()
        return LiveView(Live("", refresh_per_second=10))
    return PlainView()
