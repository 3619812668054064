"""An event loop without a world: its clock jumps to the next timer, threads are delays, and processes can end at any
line.

Everything that belongs to a simulated process runs in a context in which PROCESS names it. When it crashes, what it has
scheduled is dropped and what it schedules afterwards never runs, so that the rest of its code is harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any


class Crash(BaseException):
    """Unwinds the code of a process that has just ended."""


class StuckError(Exception):
    """Nothing will ever happen again."""


class Process:
    """Whatever can crash."""

    def __init__(self, name: str) -> None:
        self.name, self.is_dead = name, False
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        self.signals: dict[int, Callable[..., Any]] = {}
        self.threads: dict[int, deque[Any]] = {}
        """By the id of an executor that is busy: what waits for it."""

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run a coroutine as a part of this process."""
        return self.context.run(asyncio.get_running_loop().create_task, coroutine)


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def _no_delay() -> float:
    return 0.0


class VirtualLoop(asyncio.BaseEventLoop):
    """Its own selector: with nothing ready, time passes at once."""

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world = world
        self.now_s = 1000.0
        self.num_turns = 0
        self.thread_delay_s: Callable[[], float] = _no_delay
        """How long a thread takes to begin, and to tell that it is done."""
        self._selector = self
        self._clock_resolution = 1e-9
        self._is_over = False
        self._kept: list[Any] = []
        """Tasks of dead processes: were they collected, their code would go on at a time that no seed decides."""

    def time(self) -> float:
        return self.now_s

    # ------------------------------------------------------------------ what BaseEventLoop asks its selector

    def select(self, timeout: float | None) -> tuple[()]:
        self.num_turns += 1
        if timeout is None:
            raise StuckError("nothing is scheduled")
        if timeout > 0:
            self.now_s = max(self.now_s, self._scheduled[0]._when)
        return ()

    def _process_events(self, events: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    # ------------------------------------------------------------------ scheduling, unless the process is dead

    def _is_dead(self, context: contextvars.Context) -> bool:
        process = context.get(PROCESS)
        return self._is_over or (process is not None and process.is_dead)

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        context = contextvars.copy_context() if context is None else context
        handle = asyncio.Handle(callback, args, self, context)
        if self._is_dead(context):
            handle.cancel()
        else:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        context = contextvars.copy_context() if context is None else context
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        if self._is_dead(context):
            timer.cancel()
        else:
            heapq.heappush(self._scheduled, timer)
            timer._scheduled = True
        return timer

    def bury(self, process: Process) -> None:
        """Drop what a process that is dead by now has scheduled."""
        self._kept += asyncio.all_tasks(self)
        for handle in [*self._ready, *self._scheduled]:
            if handle._context.get(PROCESS) is process:
                handle.cancel()

    # ------------------------------------------------------------------ threads and signals

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run a function some time later, those of one executor one after the other, and tell of it later still. One
        that nobody waits for any more when its turn comes is not run.
        """
        done: asyncio.Future[Any] = self.create_future()
        work = contextvars.copy_context(), done, func, args
        process = PROCESS.get()
        if executor is None or process is None:
            self.call_later(self.thread_delay_s(), self._work, work, None)
            return done
        waiting = process.threads.get(id(executor))
        if waiting is not None:
            waiting.append(work)
        else:
            process.threads[id(executor)] = deque([work])
            self._next_work(process, id(executor))
        return done

    def _next_work(self, process: Process, thread: int) -> None:
        waiting = process.threads[thread]
        while waiting and waiting[0][1].cancelled():
            waiting.popleft()
        if waiting:
            self.call_later(self.thread_delay_s(), self._work, waiting.popleft(), (process, thread))
        else:
            del process.threads[thread]

    def _work(self, work: Any, thread: tuple[Process, int] | None) -> None:
        context, done, func, args = work
        outcome: tuple[BaseException | None, Any] = None, None
        if not done.cancelled():
            try:
                outcome = None, context.run(func, *args)
            except Exception as error:  # noqa: BLE001 (whoever waits hears of it)
                outcome = error, None
        self.call_later(self.thread_delay_s(), self._tell, done, outcome, thread)

    def _tell(self, done: Any, outcome: tuple[BaseException | None, Any], thread: tuple[Process, int] | None) -> None:
        error, result = outcome
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)
        if thread is not None:
            self._next_work(*thread)

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:
        process = PROCESS.get()
        assert process is not None
        process.signals[sig] = callback

    # ------------------------------------------------------------------ from begin to end

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine to its end, or until somebody stops the loop: then None."""
        main = self.create_task(coroutine)
        main.add_done_callback(lambda _: self.stop())
        try:
            self.run_forever()
        finally:
            self._is_over = True
            self._kept += asyncio.all_tasks(self)
            for task in self._kept:
                task._log_destroy_pending = False
        return main.result() if main.done() and not main.cancelled() else None

    def end(self) -> None:
        """Let go of everything."""
        self._ready.clear()
        self._scheduled.clear()
        kept, self._kept = self._kept, []
        for task in kept:
            coroutine = task.get_coro()
            if coroutine.cr_running:
                continue
            # Nobody is left whom it concerns.
            with contextlib.suppress(BaseException):
                coroutine.close()
        self.close()
