"""One run: a world drawn from a seed, servers and clients in it, and a nemesis that breaks what can break.

The same seed gives the same run, event by event; ``digest`` is the hash of all of them.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import random
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from simulation import laws, servers
from simulation.clients import Client, ManyEnvs, OneEnv
from simulation.disk import Disk, FileDisk
from simulation.laws import BrokenLawError, Chain, Laws
from simulation.loop import PROCESS, Crash, StuckError, VirtualLoop
from simulation.network import BALANCER, Network
from simulation.prober import Prober
from simulation.rolling import Weights
from tenuto_client.errors import ReplayMismatchError, SessionExpiredError
from tenuto_server.principals import Entry, Principal, to_text

FAILPOINTS = ("before_scatter", "after_scatter", "before_snapshot_commit", "after_snapshot_commit",
              "between_reply_and_ack")  # fmt: skip
FAULTS = ("request lost", "reply lost", "request doubled", "delayed", "connection cut", "host cut off", "storm",
          "crash", "drain", "disk full", "write failed", "torn page", "forward failed", "result not finite",
          "caller cancelled", "version published", "other weights published", "other memory published",
          "rebalanced")  # fmt: skip
STORES = {"memory": 8, "file": 2, "shared": 5, "shared file": 2, "none": 3}
"""Where sessions are kept, and how often."""
_MAX_TURNS = 400
"""Turns of the loop for each step that is asked for."""
_PATIENCE_S = 120.0
"""Virtual seconds in which everybody gets on once the faults have stopped."""
_KEPT_EVENTS = 400
NUM_STEPS = 1000
"""Of a run, all clients together."""


@dataclass
class Result:
    """What came of a run."""

    seed: int
    num_steps: int
    num_answers: int
    virtual_s: float
    digest: str
    counts: Counter[str]
    error: BrokenLawError | None
    store: str
    events: list[str] = field(default_factory=lambda: [])
    """The last ones; all of them where they were asked for."""


class World:
    """Owns everything of one run."""

    def __init__(self, seed: int, num_steps: int, *, keeps_all: bool = False, store: str = "") -> None:
        self.seed, self._target, self._keeps_all = seed, num_steps, keeps_all
        self._rngs: dict[str, random.Random] = {}
        self.loop = VirtualLoop(self)
        self.loop.set_exception_handler(self._on_exception)
        self.counts: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=16)
        self._events: deque[Any] = deque(maxlen=None if keeps_all else _KEPT_EVENTS)
        self.num_steps = self.num_answers = self.num_downs = 0
        self.is_over = self.is_calm = False
        self.laws = Laws(self)
        self.network = Network(self)
        self.repository = servers.Repository(self.loop.time)
        self.closed_ids: set[int] = set()
        self.closed: list[tuple[int, int]] = []
        """Sessions whose end was acknowledged, and how many servers had gone down by then."""
        self._swapped_s = -1.0
        """When what had been published was last replaced by something else."""
        self._armed: dict[str, int] = {}
        """Failpoints that crash whoever passes them, after so many others."""
        self._engine_rng, self._thread_rng = self.rng_of("engine"), self.rng_of("threads")
        self.loop.thread_delay_s = lambda: self._thread_rng.expovariate(1 / self._thread_s)
        self._draw(store)

    def _draw(self, store: str) -> None:
        """Draw what holds for the whole run."""
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        rng = self.rng_of("world")
        self.store = store or rng.choices(list(STORES), list(STORES.values()))[0]
        self.is_durable, self.is_shared = self.store != "none", self.store.startswith("shared")
        if "file" in self.store:
            self.disk: Disk = FileDisk(self, self._folder / "sessions.db", is_shared=self.is_shared)
        else:
            self.disk = Disk(self, is_shared=self.is_shared)
        self._compute_s = rng.choice((2e-4, 2e-3))
        self._brief = rng.choice((0.0, 0.5, 1.0))
        self._thread_s = rng.choice((1e-4, 2e-3, 2e-2))
        self._not_finite = rng.choice((0.0, 0.0, 0.01))
        self._forward_fails = 0.0
        self.failure_rate = rng.choice((0.0, 0.0, 0.01))
        num_hosts = 2 if self.is_shared else 1
        max_batch = rng.choice((2, 8, 64))
        self.hosts = [servers.Host(self, f"host-{i}:1") for i in range(num_hosts)]
        self.tokens = {"robots": "robots-token", "prober": "prober-token"} if rng.random() < 0.6 else {}
        self.idle_timeout_s = rng.choice((300.0, 300.0, 10.0))
        self.clients = self._draw_clients(rng)
        num_sessions = sum(client.num_sessions for client in self.clients)
        config = servers.config(
            self._folder,
            tokens=self._write_tokens(rng),
            # Lost sessions keep their slots until they are idle for too long.
            capacity=num_sessions + (rng.choice((2, 30)) if self.idle_timeout_s < 60 else 200),
            idle_timeout_s=self.idle_timeout_s,
            max_batch=max_batch,
            max_wait_ms=rng.choice((0.0, 0.0, 2.0)),
            max_queued=max(max_batch, rng.choice((16, 1024))),
            max_queue_delay_ms=rng.choice((5.0, 500.0)),
            queue_timeout_s=rng.choice((0.1, 10.0)),
            durability="" if self.store == "none" else "simulated:",
            snapshot_interval_s=rng.choice((0.05, 0.1, 0.25)),
            drain_timeout_s=rng.choice((0.5, 5.0)),
            poll_s=1.0,
        )
        for host in self.hosts:
            host.config = config
        self.network.delay_s = rng.choice((1e-4, 1e-3))
        self._swaps = self.is_durable and rng.random() < 0.3
        self.fault_rate = rng.choice((0.0, 0.01, 0.05))
        self.pause_s = rng.choice((0.1, 0.3, 1.0))
        """Between two acts of the nemesis."""

    def _draw_clients(self, rng: random.Random) -> list[Client]:
        found: list[Client] = []
        for number in range(rng.randint(1, 5)):
            kind = rng.choice((OneEnv, OneEnv, ManyEnvs, ManyEnvs, Prober))
            name = f"{kind.__name__} {number}"
            found.append(Prober(self, name) if kind is Prober else kind(self, name, stream=rng.random() < 0.5))
        return found

    def _write_tokens(self, rng: random.Random) -> Path | None:
        if not self.tokens:
            return None
        entries: list[Entry] = []
        for name, token in self.tokens.items():
            rate = rng.choice((None, None, 100.0)) if name == "prober" else None
            entries.append(Entry(Principal(name, False, None, rate), (hashlib.sha256(token.encode()).hexdigest(),)))
        path = self._folder / "tokens.json"
        path.write_text(to_text(entries))
        path.chmod(0o600)
        return path

    def address(self, rng: random.Random) -> str:
        """Where a client connects to."""
        return BALANCER if self.is_shared and rng.random() < 0.7 else rng.choice(self.hosts).address

    # ------------------------------------------------------------------ what the parts ask

    def rng_of(self, name: str) -> random.Random:
        """The stream of chance of one part, so that one does not disturb another."""
        if name not in self._rngs:
            self._rngs[name] = random.Random(f"{self.seed}/{name}")
        return self._rngs[name]

    def trace(self, *event: Any) -> None:
        event = (self.loop.now_s, *event)
        self._events.append(event)
        self._hash.update(repr(event).encode())

    def note(self, text: str) -> None:
        """Keep a line among the events that is none of them."""
        self._events.append((self.loop.now_s, "log", text))

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def server_at(self, address: str) -> Any:
        for host in self.hosts:
            if host.address == address:
                return host.process
        return None

    def compute_s(self) -> float:
        return self._engine_rng.expovariate(1 / self._compute_s)

    def handover_s(self) -> float:
        return self._engine_rng.expovariate(1 / self._compute_s) / 4

    def restart_s(self) -> float:
        return self.rng_of("hosts").uniform(0.05, 1.0)

    def expected_s(self) -> float:
        return 0.0 if self._engine_rng.random() < self._brief else 1.0

    def finite_rows(self, num_rows: int) -> np.ndarray[Any, Any]:
        """Which rows of a batch come out finite; raises where the forward pass fails."""
        finite = np.ones(num_rows, np.bool_)
        if self.is_calm or PROCESS.get() is None:
            return finite
        if self.failure_rate and self._engine_rng.random() < self.failure_rate:
            self.count("forward failed")
            raise RuntimeError("the forward pass fails")
        if self._not_finite and self._engine_rng.random() < self._not_finite:
            self.count("result not finite")
            finite[self._engine_rng.randrange(num_rows)] = False
        return finite

    def failpoint(self, name: str, *, only_look: bool = False) -> bool:
        """End the process that is here, where its end is due. ``only_look``: say whether the next call would."""
        left = self._armed.get(name)
        if left is None:
            return False
        if only_look:
            return left == 0
        if left:
            self._armed[name] = left - 1
            return False
        del self._armed[name]
        self.count(name)
        self.crash(PROCESS.get(), name)
        raise Crash(name)

    def require_alive(self) -> None:
        process = PROCESS.get()
        if process is not None and process.is_dead:
            raise Crash("it is dead already")

    def crash(self, process: Any, why: str) -> None:
        for host in self.hosts:
            if host.process is process and process is not None:
                host.crash(why)

    @property
    def may_fail(self) -> bool:
        """Whether forward passes fail here."""
        return self.failure_rate > 0 or self._not_finite > 0

    @property
    def has_swapped(self) -> bool:
        """Whether what had been published was replaced."""
        return self._swapped_s > 0

    def may_lose(self, chain: Chain, error: Any) -> bool:
        """Whether a session may be gone."""
        if isinstance(error, SessionExpiredError) or getattr(error, "reason", "") == "SESSION_EXPIRED":
            return self.loop.now_s - chain.last_s > self.idle_timeout_s - 1.0
        if not self.is_durable:
            return self.num_downs > chain.num_downs
        if error is None and (self.may_fail or self.num_downs > chain.num_downs):
            # An episode begins in a new session where the old one cannot be replayed, or not soon enough.
            return True
        if isinstance(error, ReplayMismatchError):
            return chain.born_s <= self._swapped_s
        return chain.session_id in self.disk.torn or chain.born_s <= self._swapped_s

    def _on_exception(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Crash) or (error is None and "never retrieved" in context["message"]):
            return
        process = PROCESS.get()
        if process is not None and process.is_dead:
            return
        self.laws.broken(laws.ERROR, f"{context['message']}: {error!r}")

    # ------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Play it. Law breaking is in the result."""
        try:
            with servers.outside(), self._logs():
                try:
                    self.loop.run(self._main())
                except StuckError as error:
                    self.laws.broken(laws.LIVE, str(error))
                self.loop.end()
        finally:
            self.disk.close()
            shutil.rmtree(self._folder)
        return Result(
            self.seed, self.num_steps, self.num_answers, self.loop.now_s - 1000.0, self._hash.hexdigest(), self.counts,
            self.laws.error, self.store, [repr(event) for event in self._events],
        )  # fmt: skip

    @contextmanager
    def _logs(self) -> Generator[None]:
        """Have what is logged among the events, where they are all kept; else nowhere."""
        logger, handler = logging.getLogger(), _Logs(self)
        before, level = logger.handlers, logger.level
        if self._keeps_all:
            logger.handlers = [handler]
            logger.setLevel(logging.DEBUG)
        else:
            logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logger.handlers = before
            logger.setLevel(level)
            logging.disable(logging.NOTSET)

    async def _main(self) -> None:
        try:
            await self._play()
        except Exception as error:
            self.laws.broken(laws.ERROR, f"the simulation itself: {error!r}")
            raise

    async def _play(self) -> None:
        for host in self.hosts:
            host.start()
        playing = [asyncio.create_task(client.play()) for client in self.clients]
        watching = asyncio.create_task(self._watch())
        nemesis = asyncio.create_task(self._trouble())
        while self.num_steps < self._target and not all(task.done() for task in playing):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        nemesis.cancel()
        self._heal()
        self.trace("calm")
        for client in self.clients:
            client.is_last = True
        _, waiting = await asyncio.wait(playing, timeout=_PATIENCE_S)
        for task in playing:
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.laws.broken(laws.ERROR, f"a client ended with {task.exception()!r}")
        if waiting:
            stuck = [client.name for client, task in zip(self.clients, playing, strict=True) if not task.done()]
            self.laws.broken(laws.LIVE, f"after {_PATIENCE_S} s without faults these still wait: {stuck}")
        await self._quiet()
        watching.cancel()
        await self._stop()

    async def _quiet(self) -> None:
        """Nobody asks for anything any more."""
        # A store that has failed is tried again after 5 s at most.
        await asyncio.sleep(6.0)
        for host in self.hosts:
            process = host.process
            if process is None or process.server is None:
                self.laws.broken(laws.LIVE, f"{host.address} does not run")
                continue
            self.laws.tables(process)
            for policy in process.server.registry:
                self.laws.require(not policy.sessions.busy[:-1].any(), laws.ANSWERED, "a session is still busy")
                if self.is_durable:
                    left = policy.sessions.num_changed()
                    self.laws.require(not left, laws.SAVED, f"{left} sessions of {process.name} are not saved")
        if self.is_durable:
            for chain in (chain for client in self.clients for chain in client.chains() if chain.index):
                if self.loop.now_s - chain.last_s > self.idle_timeout_s - 1.0:
                    continue
                there = self.disk.num_steps(chain.session_id)
                self.laws.require(
                    there == chain.index, laws.SAVED, f"session {chain.session_id}: {there} steps, of {chain.index}"
                )
        closed = [chain.session_id for client in self.clients for chain in client.chains()]
        for client in self.clients:
            await client.close()
        await asyncio.sleep(2.0)
        if self.is_durable and not self.is_shared:
            closed += [i for i, num_downs in self.closed if num_downs == self.num_downs]
            kept = [i for i in closed if self.disk.num_steps(i) >= 0]
            self.laws.require(not kept, laws.SAVED, f"sessions {kept} are closed, and still in the store")

    async def _stop(self) -> None:
        self.is_over = True
        running = [host for host in self.hosts if host.process is not None]
        for host in running:
            host.terminate()
        for _ in range(200):
            await asyncio.sleep(0.1)
            if all(host.process is None for host in self.hosts):
                return
        self.laws.broken(laws.ANSWERED, "a server does not end")

    async def _watch(self) -> None:
        """Look at the servers' tables now and then."""
        while True:
            await asyncio.sleep(0.1)
            for host in self.hosts:
                if host.process is not None and host.process.server is not None:
                    self.laws.tables(host.process)
            if self.loop.num_turns > _MAX_TURNS * self._target + 100_000:
                self.laws.broken(laws.LIVE, f"{self.loop.num_turns} turns of the loop, {self.num_steps} steps")

    def _heal(self) -> None:
        self.is_calm = True
        network = self.network
        network.loss = network.reply_loss = network.double = network.slow = 0.0
        network.cut_off.clear()
        self.disk.fails = self.disk.tears = False
        self._armed.clear()

    # ------------------------------------------------------------------ the nemesis

    async def _trouble(self) -> None:
        rng, network = self.rng_of("nemesis"), self.network
        network.loss = network.reply_loss = network.double = network.slow = self.fault_rate
        acts = {
            self._arm: 8, self._crash: 2, self._drain: 2, self._cut: 3, self._cut_off: 1, self._fill_disk: 1,
            self._publish: 2, self._storm: 1, self._balance: 4 if self.is_shared else 0,
            self._swap: 2 if self._swaps else 0,
        }  # fmt: skip
        if self._swaps and rng.random() < 0.5:
            # Before anything is stored.
            self.disk.fails = True
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            self.disk.fails = False
            self._swap(rng)
        while True:
            # Somebody shall get on in between.
            enough = self.num_steps + rng.choice((0, 10, 40))
            until_s = self.loop.now_s + 5.0
            await asyncio.sleep(rng.expovariate(1 / self.pause_s))
            while self.num_steps < enough and self.loop.now_s < until_s:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            rng.choices(list(acts), list(acts.values()))[0](rng)

    def _arm(self, rng: random.Random) -> None:
        """Crash somebody at a failpoint."""
        name = rng.choice(FAILPOINTS)
        self._armed.setdefault(name, rng.choice((0, 0, 1, 5, 20)))
        if name == "before_snapshot_commit":
            self.disk.tears = rng.random() < 0.6

    def _crash(self, rng: random.Random) -> None:
        rng.choice(self.hosts).crash("power")

    def _drain(self, rng: random.Random) -> None:
        rng.choice(self.hosts).terminate()

    def _cut(self, rng: random.Random) -> None:
        if self.network.channels:
            self.count("connection cut")
            self.network.cut(rng.choice(self.network.channels))

    def _balance(self, rng: random.Random) -> None:
        """Somebody's connection goes to another server from now on."""
        balanced = [c for c in self.network.channels if c.address == BALANCER]
        if balanced:
            self.count("rebalanced")
            channel = rng.choice(balanced)
            channel.host = rng.choice(self.hosts).address
            if rng.random() < 0.5:
                self.network.cut(channel)

    def _cut_off(self, rng: random.Random) -> None:
        address = rng.choice(self.hosts).address
        self.count("host cut off")
        self.network.cut_off.add(address)
        self.network.later(rng.uniform(0.1, 2.0), self.network.cut_off.discard, address)

    def _fill_disk(self, rng: random.Random) -> None:
        self.count("disk full")
        self.disk.fails = True
        self.network.later(rng.uniform(0.1, 3.0), setattr, self.disk, "fails", False)

    def _publish(self, rng: random.Random) -> None:
        version = self.repository.newest + 1
        self.count("version published")
        self.repository.publish(version, Weights(version, self.repository.versions[version - 1].layout))

    def _swap(self, rng: random.Random) -> None:
        """Replace every version by another one of its number, while nobody runs."""
        for host in self.hosts:
            host.crash("swap")
        self._swapped_s = self.loop.now_s
        has_other_layout = rng.random() < 0.5
        self.count("other memory published" if has_other_layout else "other weights published")
        for version, weights in list(self.repository.versions.items()):
            number, layout = weights.number, weights.layout
            other = Weights(number, layout + "'") if has_other_layout else Weights(number + 1000, layout)
            self.repository.publish(version, other)

    def _storm(self, rng: random.Random) -> None:
        """A bad minute of the network."""
        self.count("storm")
        network = self.network
        for name in ("loss", "reply_loss", "double", "slow"):
            setattr(network, name, rng.choice((0.0, 0.1, 0.3)))
        self.network.later(rng.uniform(0.2, 2.0), self._end_storm)

    def _end_storm(self) -> None:
        network = self.network
        if not self.is_calm:
            network.loss = network.reply_loss = network.double = network.slow = self.fault_rate


class _Logs(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get()
        error = record.exc_info and record.exc_info[1]
        text = f"{process.name if process else 'clients'} {record.levelname} {record.getMessage()}"
        self._world.note(text if not error else f"{text}: {error!r}")


@cache
def _set_imports_apart() -> None:
    """Have the collections between runs pass over what lives as long as the process."""
    gc.collect()
    gc.freeze()


def simulate(seed: int, num_steps: int = NUM_STEPS, *, keeps_all: bool = False, store: str = "") -> Result:
    """Run a seed. No garbage is collected meanwhile, since what that finds would run at a time that no seed decides."""
    _set_imports_apart()
    was_on = gc.isenabled()
    gc.disable()
    try:
        return World(seed, num_steps, keeps_all=keeps_all, store=store).run()
    finally:
        if was_on:
            gc.enable()
