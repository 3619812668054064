"""tenuto-bench against real servers: it counts what it sends, checks what it is told, and says when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_proto.v1 import policy_pb2 as pb


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tenuto_bench.main", "--seconds", "0.5", "--warmup", "0.2", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def against(server: ServerProcess, tmp_path: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    metrics = f"127.0.0.1:{server.metrics_port}"
    file = tmp_path / "figures.json"
    done = bench("--address", server.address, "--metrics", metrics, "--json", str(file), *flags)
    return done, json.loads(file.read_text()) if file.exists() else []


@pytest.mark.parametrize("memory", ["dnc", "frameconv"])
def test_every_mode_is_measured_and_its_answers_are_right(server: ServerProcess, tmp_path: Path, memory: str) -> None:
    # Other tests may have left theirs on this server.
    open_before = server.metric('tenuto_sessions{state="waiting"}')
    flags = ("--sessions", "6", "--rows", "3", "--processes", "2", "--policy", memory)
    done, figures = against(server, tmp_path, "--repository", str(server.repository), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f["case"]["mode"] for f in figures] == ["unary", "stream", "batch"]
    for f in figures:
        assert f["steps_per_s"] > 0 and f["errors"] == {} and f["checked"] > 0 and f["wrong"] == 0
        assert f["p50_ms"] <= f["p90_ms"] <= f["p99_ms"] <= f["max_ms"] and f["client_us"] > 0 and f["server_us"] > 0
        assert f["batch_rows"] >= 1
    assert f"{memory}, batch" in done.stdout
    wait_until(lambda: server.metric('tenuto_sessions{state="waiting"}') <= open_before, "its sessions to be closed")


def test_answers_of_other_weights_are_found(server: ServerProcess, tmp_path: Path) -> None:
    publish(tmp_path / "others", small_policy(seed=9), "dnc")
    flags = ("--policy", "dnc", "--mode", "stream", "--sessions", "2", "--repository", str(tmp_path / "others"))
    done, [figures] = against(server, tmp_path, *flags)
    assert done.returncode == 1 and "answered wrongly" in done.stderr and figures["wrong"] > 0


def test_sessions_are_closed_where_not_all_could_be_opened(tmp_path: Path) -> None:
    publish(tmp_path / "repository", small_policy(), "dnc")
    with ServerProcess(tmp_path / "repository", "--capacity", "8") as server:
        done = bench("--address", server.address, "--policy", "dnc", "--mode", "stream", "--sessions", "9")
        assert done.returncode != 0 and "expected at most 8" in done.stderr
        assert not server.stub.ListSessions(pb.ListSessionsRequest()).sessions


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--address", "127.0.0.1:1", "--policy", "dnc"), "ServerUnavailableError"),
        (("--sessions", "0"), "expected at least 1"),
        (("--seconds", "0"), "expected more than 0"),
        (("--warmup", "nan"), "expected more than 0"),
        (("--metrics", "127.0.0.1:1"), "--address, which is missing"),
        (("--json", "/no/such/folder/figures.json"), "does not exist"),
        (("--address", "127.0.0.1:1", "--repository", "/no/such/folder"), "is no folder"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(flags: tuple[str, ...], expected: str) -> None:
    done = bench("--mode", "stream", *flags)
    assert done.returncode != 0 and expected in done.stderr and "Traceback" not in done.stderr
