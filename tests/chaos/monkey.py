"""Servers that are killed while environments play, with their store, their network, their disk and their clock."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from chaos.fleet import ENVIRONMENTS, Fleet
from chaos.proxy import Proxy
from redis_process import RedisProcess
from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_envs import make
from tenuto_proto.v1 import policy_pb2 as pb

_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
_CLOCKED = 0.2
"""Of the servers' lives, those with a clock that jumps."""
_DISK_BYTES = 64 << 20
_MEMORIES = ("dnc", "frameconv")


@dataclass
class Report:
    """What came of a run."""

    faults: Counter[str] = field(default_factory=lambda: Counter())
    num_steps: int = 0
    took_s: float = 0.0
    longest_pause_s: float = 0.0
    num_different: int = 0
    """Environments whose actions were not those of the undisturbed run."""
    num_miscounted: int = 0
    """Sessions of which the servers have another number of steps than their environments."""


class Disk:
    """A folder that can be filled up: a small file system of its own, which takes root to make."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
        self.can_fill = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if self.can_fill:
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)

    @contextlib.contextmanager
    def full(self) -> Generator[None]:
        """Leave no byte free for a while."""
        ballast = self.folder / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"\0" * 65_536):
                    pass
            yield
        finally:
            ballast.unlink(missing_ok=True)


class Monkey:
    """Does harm in a thread of its own, as the seed says, while a fleet makes its way."""

    def __init__(self, folder: Path, store: str, num_kills: int, seed: int, stack: ExitStack) -> None:
        """``store``: sqlite, with one server, or redis, with two."""
        self.store, self.num_kills = store, num_kills
        self.report = Report()
        self._random, self._stack = random.Random(seed), stack
        self._repository = folder / "repository"
        for number, (name, env_id) in enumerate(ENVIRONMENTS.items()):
            env = make(env_id)
            memory = _MEMORIES[number % len(_MEMORIES)]
            publish(self._repository, small_policy(memory, env.observation_space, env.action_space), name)
        self.proxy = stack.enter_context(Proxy(seed))
        self._disk = Disk(folder / "disk", stack)
        self._redis: RedisProcess | None = None
        if store == "redis":
            (folder / "redis").mkdir()
            self._redis = stack.enter_context(RedisProcess(folder / "redis"))
        self._clock, self._python = folder / "clock", Path(sys.executable)
        self._clock.write_text("+0")
        if _FAKETIME.exists():
            self._python = folder / "python"
            # Of the wall clock only; the monotonic one does not jump on any machine.
            environment = {
                "LD_PRELOAD": str(_FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
            settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
            self._python.write_text(f'#!/bin/sh\nexec env {settings} {shlex.quote(sys.executable)} "$@"\n')
            self._python.chmod(0o755)
        self.servers: list[ServerProcess] = []
        stack.callback(self._end_servers)
        for _ in range(2 if store == "redis" else 1):
            self.servers.append(self._start(wait=True))
        self._reconnect()

    def _start(self, *, wait: bool) -> ServerProcess:
        url = self._redis.url if self._redis is not None else f"sqlite:{self._disk.folder / 'sessions.db'}"
        flags = ("--durability", url, "--snapshot-interval-s", "0.1", "--idle-timeout-s", "600")
        while True:
            try:
                # A clock that can be set costs a server most of its speed.
                python = self._python if self._random.random() < _CLOCKED else sys.executable
                return ServerProcess(self._repository, *flags, python=python, wait=wait)
            except AssertionError:
                # Where the disk is full it does not start; a supervisor tries again.
                self.report.faults["starts that failed"] += 1
                time.sleep(0.2)

    def _reconnect(self) -> None:
        self.proxy.ports = [server.port for server in self.servers]

    def _end_servers(self) -> None:
        for server in self.servers:
            server.close()

    def log(self) -> list[str]:
        """What the running servers said that is not everyday."""
        return [line for server in self.servers for line in server.log if " INFO " not in line]

    # ------------------------------------------------------------------ harm

    def harm(self, fleet: Fleet, is_over: threading.Event) -> None:
        """Kill a server as often as was asked for, and do what else there is in between, spread over the fleet's way;
        then let it finish.
        """
        try:
            self._harm(fleet, is_over)
        finally:
            fleet.let_finish()

    def _harm(self, fleet: Fleet, is_over: threading.Event) -> None:
        harms = self._lesser_harms() + [self._kill] * self.num_kills
        self._random.shuffle(harms)
        total = fleet.total - len(fleet.players)
        for number, harm in enumerate(harms):
            mark = total * (number + self._random.random()) / (len(harms) + 0.5)
            while fleet.num_done < mark and not is_over.wait(0.05):
                pass
            if is_over.is_set():
                return
            harm()
            if harm == self._kill and self._random.random() < 0.25:
                # Again, perhaps before it has restored its sessions.
                is_over.wait(self._random.uniform(0.2, 4.0))
                self._kill()

    def _kill(self) -> None:
        self._start_again(self._end_one())

    def _end_one(self) -> int:
        number = self._random.randrange(len(self.servers))
        old = self.servers[number]
        old.process.send_signal(signal.SIGKILL)
        old.process.wait()
        old.close()
        self.report.faults["servers killed"] += 1
        return number

    def _start_again(self, number: int) -> None:
        self.servers[number] = self._start(wait=False)
        self._reconnect()

    def _lesser_harms(self) -> list[Callable[[], None]]:
        """Everything else that is possible here, each several times."""
        harms: list[Callable[[], None]] = [self._cut, self._delay, self._turn_off]
        if _FAKETIME.exists():
            harms.append(self._jump)
        if self._redis is not None:
            harms.append(self._kill_redis)
        elif self._disk.can_fill:
            harms.append(self._fill_disk)
        return harms * max(1, self.num_kills // 3)

    def _cut(self) -> None:
        self.proxy.cut()
        self.report.faults["connections cut"] += 1

    def _delay(self) -> None:
        self.proxy.delay_s = self._random.uniform(0.01, 0.2)
        time.sleep(self._random.uniform(0.1, 1.0))
        self.proxy.delay_s = 0.0
        self.report.faults["network delayed"] += 1

    def _turn_off(self) -> None:
        self.proxy.ports = []
        self.proxy.cut()
        time.sleep(self._random.uniform(0.1, 1.0))
        self._reconnect()
        self.report.faults["network off"] += 1

    def _jump(self) -> None:
        # In place: whoever reads it meanwhile must find something.
        self._clock.write_text(f"{self._random.choice((-1, 1)) * self._random.randrange(1, 100_000):+d}")
        self.report.faults["clock jumps"] += 1

    def _kill_redis(self) -> None:
        assert self._redis is not None
        self._redis.kill()
        time.sleep(self._random.uniform(0.0, 1.0))
        self._redis.start()
        self.report.faults["redis killed"] += 1

    def _fill_disk(self) -> None:
        ended = None
        with self._disk.full():
            time.sleep(self._random.uniform(0.2, 1.5))
            if self._random.random() < 0.5:
                ended = self._end_one()
        if ended is not None:
            self._start_again(ended)
        self.report.faults["disk full"] += 1

    # ------------------------------------------------------------------ what it came to

    def num_steps_of(self, session_id: int) -> int:
        """Steps that the servers have of a session; of two the one that is further."""
        found = [0]
        for server in self.servers:
            with contextlib.suppress(grpc.RpcError):
                inspected = server.stub.InspectSession(pb.InspectSessionRequest(session_id=session_id), timeout=30)
                found.append(inspected.session.next_step_index)
        return max(found)


def run(
    folder: Path,
    store: str,
    *,
    num_environments: int,
    num_steps: int,
    num_kills: int,
    seed: int,
    tell: Callable[[str, Fleet, Report], None] = lambda phase, fleet, report: None,
) -> Report:
    """Play twice, undisturbed and disturbed, and compare. ``tell`` is called now and then."""
    with ExitStack() as stack:
        monkey = Monkey(folder, store, num_kills, seed, stack)
        expected = Fleet(num_environments, num_steps)
        with _telling(tell, "undisturbed", expected, monkey.report):
            asyncio.run(expected.play(monkey.servers[0].address, is_calm=True))
        fleet, is_over = Fleet(num_environments, num_steps), threading.Event()
        harming = threading.Thread(target=monkey.harm, args=(fleet, is_over), name="monkey")
        began_s = time.monotonic()
        harming.start()
        try:
            with _telling(tell, "disturbed", fleet, monkey.report):
                asyncio.run(fleet.play(monkey.proxy.address, is_calm=False))
        except BaseException:
            print("the servers said:", *monkey.log()[-40:], sep="\n")
            raise
        finally:
            is_over.set()
            harming.join()
        report = monkey.report
        report.took_s, report.num_steps = time.monotonic() - began_s, fleet.num_done
        report.longest_pause_s = max(player.longest_pause_s for player in fleet.players)
        pairs = zip(fleet.players, expected.players, strict=True)
        report.num_different = sum(one.actions != other.actions for one, other in pairs)
        for server in monkey.servers:
            wait_until(lambda server=server: server.http("/readyz")[0] == 200, "the servers to be ready", 60)
        report.num_miscounted = sum(monkey.num_steps_of(p.session_id) != num_steps for p in fleet.players)
        return report


@contextlib.contextmanager
def _telling(tell: Callable[[str, Fleet, Report], None], phase: str, fleet: Fleet, report: Report) -> Generator[None]:
    is_over = threading.Event()

    def keep_telling() -> None:
        while not is_over.wait(0.25):
            tell(phase, fleet, report)

    thread = threading.Thread(target=keep_telling, name="progress")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        tell(phase, fleet, report)
