"""The servers of the contenders: started when first needed, paused while another one is measured, and started again
when they have died.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from peers import processes
from tenuto_bench.served import Served, ServerError

HERE = Path(__file__).parent
START_S = 90.0
_Process = subprocess.Popen[str]


class Server:
    """One contender's server. To be closed."""

    def __init__(self, start: Callable[[], AbstractContextManager[Served]]) -> None:
        self._start, self._stack = start, ExitStack()
        self._served: Served | None = None
        self._failure: ServerError | None = None

    @contextmanager
    def awake(self) -> Generator[Served]:
        """Have it run meanwhile, and only then. Raises ServerError where it cannot be started, now or once before."""
        if self._failure:
            raise self._failure
        if self._served is None or not processes.is_alive(_pid(self._served)):
            self._stack.close()
            try:
                self._served = self._stack.enter_context(self._start())
            except ServerError as failure:
                self._failure = failure
                raise
        processes.send(_pid(self._served), signal.SIGCONT)
        try:
            yield self._served
        finally:
            processes.send(_pid(self._served), signal.SIGSTOP)

    def close(self) -> None:
        """End the server."""
        self._stack.close()


def _pid(served: Served) -> int:
    assert served.pid is not None
    return served.pid


def python_of(venvs: Path, peer: str) -> Path:
    """Return the interpreter of a peer's environment. Raises ServerError where it is not installed."""
    if not (venvs / peer / "installed").exists():
        raise ServerError("not installed")
    return venvs / peer / "bin" / "python"


@contextmanager
def echo_server(folder: Path) -> Generator[Served]:
    """Start the echo, a floor."""
    with _spawned([sys.executable, str(HERE / "echo_server.py")], folder / "echo.log") as process:
        yield _on_printed_port(process, folder / "echo.log")


@contextmanager
def websocket_server(venvs: Path, repository: Path, folder: Path) -> Generator[Served]:
    """Start the server of the openpi kind."""
    command = [str(python_of(venvs, "websocket")), str(HERE / "websocket_server.py"), str(repository)]
    with _spawned(command, folder / "websocket.log") as process:
        yield _on_printed_port(process, folder / "websocket.log")


@contextmanager
def ray_server(venvs: Path, repository: Path, folder: Path) -> Generator[Served]:
    """Start Ray Serve."""
    command = [str(python_of(venvs, "ray")), "-W", "ignore", str(HERE / "ray_server.py"), str(repository)]
    with _spawned([*command, str(folder / "ray")], folder / "ray.log") as process:
        yield _on_printed_port(process, folder / "ray.log")


_ENVIRONMENT = """
import json, pathlib, pytriton, sys, sysconfig
packages = pathlib.Path(pytriton.__file__).parents[1]
path = [p for p in sys.path if p and not p.startswith(sysconfig.get_path("stdlib")) and not p.endswith(".zip")]
print(json.dumps({"packages": str(packages), "path": path, "version": "%d.%d" % sys.version_info[:2]}))
"""
"""Triton's stub brings the system's Python of the same version, with that one's own standard library."""


@contextmanager
def triton_server(venvs: Path, repository: Path, folder: Path) -> Generator[Served]:
    """Start the tritonserver of nvidia-pytriton's wheel on a model repository of its own."""
    asked = subprocess.run([str(python_of(venvs, "triton")), "-c", _ENVIRONMENT], capture_output=True, text=True)
    if asked.returncode:
        raise ServerError(asked.stderr.splitlines()[-1])
    told = json.loads(asked.stdout)
    packages, triton = Path(told["packages"]), Path(told["packages"]) / "pytriton" / "tritonserver"
    model, backends, log = folder / "models" / "frameconv", folder / "backends", folder / "triton.log"
    (model / "1").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "triton_config.pbtxt", model / "config.pbtxt")
    # The stub's interpreter does not look at PYTHONPATH.
    path = [*told["path"], str(HERE)]
    (model / "1" / "model.py").write_text(f"import sys\nsys.path += {path!r}\nfrom triton_model import *\n")
    shutil.copytree(triton / "backends", backends, dirs_exist_ok=True)
    stub = triton / "python_backend_stubs" / told["version"] / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"its Python backend has no stub for Python {told['version']}")
    shutil.copy(stub, backends / "python")
    environment = {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "TENUTO_BENCH_REPOSITORY": str(repository),
    }
    grpc, http, metrics = _free_ports(3)
    command = [
        str(triton / "bin" / "tritonserver"), f"--model-repository={folder / 'models'}",
        f"--backend-directory={backends}", f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}",
        "--grpc-address=127.0.0.1", "--http-address=127.0.0.1", "--exit-timeout-secs=3",
    ]  # fmt: skip
    with _spawned(command, log, environment) as process:
        deadline_s = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{http}/v2/health/ready"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise ServerError(_last_line(log))
            time.sleep(0.2)
        yield Served(f"127.0.0.1:{grpc}", None, None, process.pid)


@contextmanager
def _spawned(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Generator[_Process]:
    """Run a server whose words go to a file, which takes more of them than a pipe that nobody reads."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=file, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            processes.end(process)


def _on_printed_port(process: _Process, log: Path) -> Served:
    """Wait for the line with the server's port. Raises ServerError where none comes."""
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    watchdog.cancel()
    if not line:
        raise ServerError(_last_line(log))
    return Served(f"127.0.0.1:{int(line)}", None, None, process.pid)


def _last_line(log: Path) -> str:
    lines = log.read_text().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "ended without a word")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False
