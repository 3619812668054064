"""The settings of one server process; argv is read here and nowhere else."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

from tenuto_server.errors import ConfigurationError


@dataclass(frozen=True)
class ServerConfig:
    """Checked settings. Each field is also the flag ``--field-name`` of ``tenuto-serve``."""

    repository: Path
    """Folder of checkpoints: <repository>/<policy>/<version>/. Created if it does not exist."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs tls_certificate, or insecure."""
    metrics_host: str = ""
    """Address of the metrics port, which is plain HTTP; empty: that of host where that may be plain too, else
    127.0.0.1. Other than loopback needs insecure."""
    port: int = 50051
    """TCP port of the gRPC service; 0: any free one, which is logged."""
    metrics_port: int = 9464
    """TCP port of /metrics, /healthz and /readyz; 0: any free one, which is logged."""
    tls_certificate: Path | None = None
    """PEM file: the server's certificate and those above it. Read again when it changes, as the next two are."""
    tls_key: Path | None = None
    """PEM file: the private key of the certificate."""
    tls_client_ca: Path | None = None
    """PEM file: who signs clients' certificates. With it clients must have one, whose name says who calls."""
    tokens: Path | None = None
    """JSON file of the principals that may call, made by python -m tenuto_server.tokens. Read again when it changes."""
    insecure: bool = False
    """Listen on other addresses than loopback although what travels there, tokens too, is not encrypted."""
    max_streams: int = 1024
    """Calls of one connection that may be under way at once; a client holds further ones back."""
    max_connection_age_s: float = 0.0
    """Seconds after which a client must connect anew, and show its certificate again; 0: never."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA where there is one."""
    capacity: int = 4096
    """Sessions per policy that may be open at once."""
    max_batch: int = 256
    """Rows in one forward pass, and in one StepBatch request."""
    max_wait_ms: float = 0.0
    """Milliseconds that a step waits for company although the device is free; 0: at most 3, where many step."""
    max_queued: int = 16384
    """Rows that may wait for the device before steps are refused with QUEUE_FULL."""
    max_queue_delay_ms: float = 500.0
    """Milliseconds that a step may wait for the device: one that would wait longer, as the device does now, is refused
    with QUEUE_FULL when it arrives; 0: only max_queued counts."""
    queue_timeout_s: float = 10.0
    """Seconds that a step may wait for the device at most, whatever its own deadline."""
    stall_timeout_s: float = 10.0
    """Seconds after which a batch or an event loop that does not come to an end makes the server not ready."""
    stall_exit_s: float = 300.0
    """Seconds after which a batch or an event loop that hangs ends the process, to be started again; 0: never."""
    durability: str = ""
    """Where sessions outlive this process: sqlite:PATH, or for several servers redis://HOST:PORT/DB; empty: nowhere."""
    snapshot_interval_s: float = 0.25
    """Seconds between two writes of what has changed, with --durability."""
    idle_timeout_s: float = 300.0
    """Seconds without a step after which a session expires."""
    drain_timeout_s: float = 30.0
    """Seconds after SIGTERM in which running episodes may finish."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Bytes of one request."""
    compute_threads: int = 0
    """CPU threads that share a large batch; 0: one per core, at most 4."""
    deterministic: bool = False
    """Serve a policy only if the self-test finds its results to be the same bits in every batch size and place."""
    checkpoint_public_key: Path | None = None
    """PEM file of ed25519 public keys: versions that none of them has signed are refused. See docs/security.md."""
    poll_s: float = 5.0
    """Seconds between looks at the repository besides file system events, which network mounts do not send."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            self._require(name, 0 <= getattr(self, name) <= 65535, "0..65535")
        for name in ("capacity", "max_batch", "max_queued", "max_streams"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("compute_threads", self.compute_threads >= 0, "at least 0")
        for name in ("snapshot_interval_s", "queue_timeout_s", "stall_timeout_s", "idle_timeout_s", "poll_s"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "more than 0")
        for name in ("max_wait_ms", "max_queue_delay_ms", "drain_timeout_s", "max_connection_age_s"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "at least 0")
        longer = self.stall_exit_s == 0 or self.stall_timeout_s < self.stall_exit_s < float("inf")
        self._require("stall_exit_s", longer, f"0, or more than stall_timeout_s, {self.stall_timeout_s:g}")
        self._require("max_queued", self.max_queued >= self.max_batch, f"at least max_batch, {self.max_batch}")
        self._require("max_message_bytes", self.max_message_bytes >= 1024, "at least 1024")
        self._require(
            "log_level", self.log_level in ("DEBUG", "INFO", "WARNING", "ERROR"), "DEBUG, INFO, WARNING or ERROR"
        )
        self._check_security()
        if self.repository.exists() and not self.repository.is_dir():
            raise ConfigurationError(f"repository: got {self.repository}, which is a file, expected a folder")

    def _check_security(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing, given = ("tls_key", "tls_certificate") if self.tls_key is None else ("tls_certificate", "tls_key")
            raise ConfigurationError(f"{missing}: got none, expected one, since there is a {given}")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ConfigurationError("tls_client_ca: got one without tls_certificate, expected both or neither")
        for name, is_encrypted in (("host", self.tls_certificate is not None), ("metrics_host", False)):
            host = getattr(self, name) or "127.0.0.1"
            if not (is_loopback(host) or is_encrypted or self.insecure):
                remedy = "loopback, or the flag --insecure" if name == "metrics_host" else (
                    "loopback, or --tls-certificate and --tls-key, or the flag --insecure"
                )  # fmt: skip
                message = f"{name}: got {host!r}, where others could read and write what travels, expected {remedy}"
                raise ConfigurationError(message)

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigurationError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def metrics_address(self) -> str:
        """Address of the metrics port."""
        return self.metrics_host or (self.host if is_loopback(self.host) or self.insecure else "127.0.0.1")

    @property
    def num_compute_threads(self) -> int:
        """CPU threads that share a large batch, on this machine."""
        # Those that this process may use, where the system tells.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.compute_threads or min(cores, 4)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes that a GPU's forward pass is padded to: powers of two from 4 on, then max_batch."""
        sizes = [4]
        while sizes[-1] < self.max_batch:
            sizes.append(min(2 * sizes[-1], self.max_batch))
        return tuple(sizes)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches the address. A name other than localhost is asked of nobody."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_args(argv: Sequence[str] | None = None) -> ServerConfig:
    """Read the command line. Raises ConfigurationError for a bad value; argparse exits for unknown flags."""
    parser = argparse.ArgumentParser(
        prog="tenuto-serve",
        allow_abbrev=False,
        description="Serve policies that remember, from a folder of checkpoints, over gRPC.",
    )
    parser.add_argument("--version", action="version", version=f"tenuto {version('tenuto')}")
    kinds = {"int": int, "float": float, "str": str, "Path": Path, "Path | None": Path}
    names = {"Path": "DIR", "Path | None": "FILE"}
    for field in fields(ServerConfig):
        required, flag = field.name == "repository", "--" + field.name.replace("_", "-")
        default = "none" if field.default is None else field.default
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", help=_help(field.name))
            continue
        parser.add_argument(
            flag,
            type=kinds[str(field.type)],
            required=required,
            default=None if required else field.default,
            metavar=names.get(str(field.type), str(field.type).upper()),
            help=_help(field.name) + ("" if required else f" (default: {default})"),
        )
    return ServerConfig(**vars(parser.parse_args(argv)))


def _help(name: str) -> str:
    return _HELP[name].replace("%", "%%")


def _field_docs() -> dict[str, str]:
    """The strings under the fields of ServerConfig, so that a flag's help and its documentation are one text."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(ServerConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs[statement.target.id] = str(after.value.value)
    return docs


_HELP = _field_docs()
