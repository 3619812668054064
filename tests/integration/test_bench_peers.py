"""The run beside peers against real servers: paused in turns, started again when they have died, and never stopped by
one that cannot be had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from peers import processes
from peers.contenders import ECHO, FORWARD, PEERS, contenders
from peers.run import measure
from peers.servers import Server, echo_server, python_of, websocket_server
from tenuto_bench import clients
from tenuto_bench.cases import Case
from tenuto_bench.clients import Clients, LoadError
from tenuto_bench.served import Served, ServerError

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def echo(tmp_path: Path) -> Generator[Server]:
    server = Server(partial(echo_server, tmp_path))
    yield server
    server.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def wait_until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline_s
        os.sched_yield()


def pid_of(server: Server) -> int:
    with server.awake() as served:
        assert served.pid is not None
        return served.pid


def test_all_that_is_there_is_measured_and_what_is_not_is_told(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "figures.json"
    command = [sys.executable, "-W", "ignore", str(BENCH / "peers" / "run.py"), "--venvs", str(tmp_path / "none")]
    flags = ["--rounds", "1", "--seconds", "0.3", "--sessions", "256", "--processes", "2", "--json", str(file)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    told = json.loads(file.read_text())
    rows = {(r["policy"], r["name"], r["processes"]): r for r in told["rows"]}
    for name in PEERS.values():
        assert rows["frameconv", name, 1]["failures"] == ["not installed"] and not rows["frameconv", name, 1]["turns"]
    measured = {key for key, row in rows.items() if row["turns"] and not row["failures"]}
    assert measured == {
        *(("frameconv", f"tenuto, {mode}", 1) for mode in ("unary", "stream", "batch")),
        *(("frameconv", f"tenuto, {mode}", 2) for mode in ("unary", "stream")),
        *(("frameconv", ECHO[mode], processes) for mode in ("unary", "stream") for processes in (1, 2)),
        *((policy, FORWARD, 1) for policy in ("frameconv", "dnc")),
        ("dnc", "tenuto, batch", 1),
    }
    [turn] = rows["frameconv", "tenuto, stream", 1]["turns"]
    assert turn["steps_per_s"] > 0 and turn["p50_ms"] <= turn["p99_ms"]
    assert turn["client_us"] > 0 and turn["server_us"] > 0 and turn["own_us"] is None
    # Only where threads compute can their part be told apart.
    [turn] = rows["dnc", "tenuto, batch", 1]["turns"]
    assert turn["server_us"] > turn["own_us"] > 0
    assert "1 of 1 turns" in done.stdout and "p99 by p50" in done.stdout
    assert {"what", "got", "wanted", "held"} <= told["goals"][0].keys() and told["machine"]["processor"]


@pytest.mark.parametrize("mode", ["unary", "stream"])
def test_the_echo_is_a_floor_of_real_messages(echo: Server, mode: str) -> None:
    [who] = [each for each in contenders(Path("none"), []) if each.name == ECHO[mode]]
    with echo.awake() as served:
        found = measure(who, served, who.case(4, 2), 0.3)
    assert found.steps_per_s > 0 and found.server_us is not None and found.server_us > 0 and found.own_us is None


def test_a_server_runs_only_while_it_is_measured(echo: Server) -> None:
    with echo.awake() as served:
        assert served.pid is not None and state_of(served.pid) != "T"
    pid = served.pid
    wait_until(lambda: state_of(pid) == "T")
    assert processes.is_alive(pid) and pid_of(echo) == pid


def test_a_server_that_died_is_started_again(echo: Server) -> None:
    first = pid_of(echo)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not processes.is_alive(first))
    second = pid_of(echo)
    assert second != first and processes.is_alive(second)
    echo.close()
    assert not processes.is_alive(second)


def test_a_server_that_dies_under_load_fails_its_turn(echo: Server) -> None:
    [who] = [each for each in contenders(Path("none"), []) if each.name == ECHO["unary"]]
    with echo.awake() as served, pytest.raises(LoadError, match="a client process ended"):
        assert served.pid is not None
        os.kill(served.pid, signal.SIGKILL)
        measure(who, served, who.case(1, 1), 0.3)


def test_a_server_that_cannot_be_started_is_not_tried_twice(tmp_path: Path) -> None:
    tried: list[int] = []

    @contextmanager
    def start() -> Generator[Served]:
        tried.append(1)
        with websocket_server(tmp_path, tmp_path, tmp_path) as served:
            yield served

    # An environment without the peer's packages.
    (tmp_path / "websocket" / "bin").mkdir(parents=True)
    (tmp_path / "websocket" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "websocket" / "installed").touch()
    assert python_of(tmp_path, "websocket").exists()
    server = Server(start)
    for _ in range(2):
        with pytest.raises(ServerError, match=r"ModuleNotFoundError|No such file"), server.awake():
            pass
    assert len(tried) == 1


def test_a_client_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_START_S", 0.1)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(LoadError, match=r"hung: got no report in 0\.3 s"):
        Clients("127.0.0.1:1", Case("unary", "frameconv", 2, 2), 0.0, 0.1, command=command)
