"""tenuto-bench against real servers: it counts what it sends, checks what it is told, and says when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import ServerProcess, publish, small_policy, wait_until


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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--address", "127.0.0.1:1", "--policy", "dnc"), "ServerUnavailableError"),
        (("--sessions", "0"), "expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(flags: tuple[str, ...], expected: str) -> None:
    done = bench("--mode", "stream", *flags)
    assert done.returncode != 0 and expected in done.stderr and "Traceback" not in done.stderr
