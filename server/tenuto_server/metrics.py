"""Every metric of the server, declared here and nowhere else, and the HTTP face that Prometheus and probes ask.

The stations of ``tenuto_station_seconds`` are those of docs/request.md. Labels are bounded: by the methods and codes of
gRPC, the reasons of the contract, the policies in the repository, and versions, of which the oldest leave.
"""

from __future__ import annotations

import platform
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version as installed_version
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    GCCollector,
    Info,
    ProcessCollector,
    Summary,
    disable_created_metrics,
)
from prometheus_client.exposition import make_wsgi_app

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.histogram import Histogram

_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 1.5e-2, 2.5e-2, 5e-2, 0.1,
            0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # fmt: skip
_ROWS = tuple(float(2**i) for i in range(13))
STATIONS = ("check", "admit", "submit", "gather", "run", "scatter", "reply")
"""Stations 2 to 8 of docs/request.md."""
STEP_RPCS = ("Step", "StepBatch", "StepStream")
STATES = ("loading", "empty", "serving", "stalled", "failing", "draining")
READY = "serving"
_NOT_READY = {
    "loading": "loading",
    "empty": "no policy is served yet",
    "stalled": "stalled: the device or the event loop has been busy with one thing for longer than stall_timeout_s",
    "failing": "failing: one batch after another fails; the device is tried until it computes",
    "draining": "draining",
}
MAX_VERSION_LABELS = 32
"""Versions per policy whose episodes are kept as label values; older ones leave /metrics."""


class Metrics:
    """The metrics of one server process, in a registry of its own."""

    def __init__(self, device: torch.device) -> None:
        # Each counter would have a second row, the time of its first.
        disable_created_metrics()
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        GCCollector(registry=r)
        self._device = device
        Info("tenuto_build", "What runs here.", registry=r).info({
            "version": installed_version("tenuto"), "python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        })  # fmt: skip

        self.state = Enum(
            "tenuto_state",
            "1 for what the server does: loading, empty (no policy yet), serving, stalled (the device or the event "
            "loop hangs), failing (one batch after another), draining.",
            states=STATES, registry=r,
        )  # fmt: skip

        # Requests.
        self._requests = Counter(
            "tenuto_requests", "Requests by how they ended; each message of a StepStream is one.", ["rpc", "code"],
            registry=r,
        )  # fmt: skip
        self.refusals = Counter("tenuto_refusals", "Steps and other requests refused.", ["reason"], registry=r)
        # From the start at 0: Prometheus sees no increase in a row that appears with its first.
        for reason in pb.ErrorReason.keys()[1:]:
            self.refusals.labels(reason)
        self.step_seconds = Histogram(
            "tenuto_step_seconds", "From a request's arrival to its reply.", _SECONDS, r, "rpc", STEP_RPCS
        )
        self.station_seconds = Histogram(
            "tenuto_station_seconds", "Time at each station of a step.", _SECONDS, r, "station", STATIONS
        )
        self.step, self.station = self.step_seconds.series, self.station_seconds.series
        self._request_of: dict[tuple[str, str], Counter] = {}

        # Steps and the engine.
        self._steps_of: dict[str, Counter] = {}
        self._steps = Counter("tenuto_steps", "Session steps applied.", ["policy"], registry=r)
        self.failed_steps = Counter(
            "tenuto_failed_steps",
            "Steps refused with COMPUTE_FAILED: no finite result, or an error in the log.",
            ["policy"],
            registry=r,
        )
        self.failed_batches = Counter(
            "tenuto_failed_batches", "Batches that failed as a whole: out_of_memory, or error (see the log).",
            ["reason"], registry=r,
        )  # fmt: skip
        for reason in ("out_of_memory", "error"):
            self.failed_batches.labels(reason)
        self.batch_rows = Histogram("tenuto_batch_rows", "Sessions per forward pass.", _ROWS, r)
        self.queued_rows = Gauge("tenuto_queued_rows", "Steps waiting for the device.", registry=r)
        self.queue_capacity = Gauge(
            "tenuto_queue_capacity_rows", "Steps that may wait at once, at the device's speed.", registry=r
        )
        self.queue_delay = Gauge(
            "tenuto_queue_delay_seconds", "Time that the device needs for the steps that wait, at its measured speed.",
            registry=r,
        )  # fmt: skip
        self.queue_parties = Gauge(
            "tenuto_queue_parties", "Principals, or hosts where nobody authenticates, that share the queue.", registry=r
        )
        self.engine_busy = Counter("tenuto_engine_busy_seconds", "Time that the engine spent on batches.", registry=r)
        self.loop_lag = Histogram(
            "tenuto_event_loop_lag_seconds", "How late the event loop came back to a timer, four times a second.",
            _SECONDS, r,
        )  # fmt: skip
        self.batch_invariant = Gauge(
            "tenuto_batch_invariant",
            "1 if a session got the same bits in all batch sizes and places in the self-test.",
            ["policy"], registry=r,
        )  # fmt: skip

        # Sessions and episodes.
        self.sessions = Gauge(
            "tenuto_sessions",
            "Slots in use: opened (no step yet), waiting (for its next step), stepping, ending (with its step).",
            ["policy", "state"], registry=r,
        )  # fmt: skip
        self.capacity = Gauge("tenuto_session_capacity", "Sessions that may be open at once.", ["policy"], registry=r)
        self.sessions_opened = Counter("tenuto_sessions_opened", "Sessions opened.", ["policy"], registry=r)
        self.sessions_ended = Counter("tenuto_sessions_ended", "Sessions ended.", ["policy", "reason"], registry=r)
        self.episodes = Counter("tenuto_episodes", "Episodes begun.", ["policy", "version"], registry=r)
        self.episode_return = Summary(
            "tenuto_episode_return",
            "Returns of finished episodes whose rewards the clients sent, by the version that began them.",
            ["policy", "version"], registry=r,
        )  # fmt: skip
        self._return_squares = Counter(
            "tenuto_episode_return_squares", "Sum of the squares of these returns; with the mean it tells the spread.",
            ["policy", "version"], registry=r,
        )  # fmt: skip
        self._version_number = Gauge(
            "tenuto_version_number", "The version as a number, to find the newest of those with returns.",
            ["policy", "version"], registry=r,
        )  # fmt: skip

        # Versions.
        self.repository_readable = Gauge(
            "tenuto_repository_readable",
            "1 if the repository was there and could be read at the last look.",
            registry=r,
        )
        self.newest_version = Gauge("tenuto_newest_version", "Version of new episodes.", ["policy"], registry=r)
        self.newest_published = Gauge(
            "tenuto_newest_version_published_timestamp_seconds", "When the files of the newest version were written.",
            ["policy"], registry=r,
        )  # fmt: skip
        self._version_sessions = Gauge(
            "tenuto_version_sessions", "Sessions in an episode of this version; one row for each version held.",
            ["policy", "version"], registry=r,
        )  # fmt: skip
        self.versions_loaded = Counter("tenuto_versions_loaded", "Versions taken into service.", ["policy"], registry=r)
        self.versions_refused = Counter(
            "tenuto_versions_refused",
            "Versions not taken into service: broken, mismatch (with the versions served), failed (see the log).",
            ["policy", "reason"], registry=r,
        )  # fmt: skip

        # Durability.
        self.snapshots = Counter("tenuto_snapshots", "Sessions written to the store.", ["policy"], registry=r)
        self.snapshot_seconds = Histogram(
            "tenuto_snapshot_seconds", "Time in which all that had changed was written.", _SECONDS, r
        )
        self.snapshot_failures = Counter(
            "tenuto_snapshot_failures", "Groups of sessions that the store did not take; they are tried again.",
            registry=r,
        )  # fmt: skip
        self.unsaved_seconds = Gauge(
            "tenuto_unsaved_seconds", "Time since the store held all that there was; 0 without durability.", registry=r
        )
        self.sessions_restored = Counter(
            "tenuto_sessions_restored", "Sessions taken from the store.", ["policy"], registry=r
        )
        self.snapshots_refused = Counter(
            "tenuto_snapshots_refused", "Snapshots that no session could go on from.", ["reason"], registry=r
        )
        for reason in ("snapshot_invalid", "snapshot_mismatch", "capacity_reached", "session_exists"):
            self.snapshots_refused.labels(reason)

        # Access.
        self.credential_reloads = Counter(
            "tenuto_credential_reloads",
            "Changed files of tokens or tls: taken into use, or refused (those before go on, see the log).",
            ["files", "outcome"], registry=r,
        )  # fmt: skip
        for files in ("tokens", "tls"):
            for outcome in ("taken", "refused"):
                self.credential_reloads.labels(files, outcome)
        self.certificate_expiry = Gauge(
            "tenuto_tls_certificate_expiry_timestamp_seconds", "When the server's certificate ends; without one, 0.",
            registry=r,
        )  # fmt: skip

        # Memory.
        self.arena_bytes = Gauge("tenuto_arena_bytes", "Device memory of sessions' state.", ["policy"], registry=r)
        self.device_memory = Gauge(
            "tenuto_device_memory_bytes", "Memory that torch holds on the GPU; without one, 0.", registry=r
        )
        self._begun: dict[str, set[int]] = {}
        self._held: dict[str, set[str]] = {}

    def count_request(self, rpc: str, code: str) -> None:
        """Count a request that ended, by its method and the name of its gRPC code."""
        counter = self._request_of.get((rpc, code))
        if counter is None:
            counter = self._request_of[rpc, code] = self._requests.labels(rpc, code)
        counter.inc()

    def count_steps(self, policy: str, count: int) -> None:
        """Count steps that were applied."""
        counter = self._steps_of.get(policy)
        if counter is None:
            counter = self._steps_of[policy] = self._steps.labels(policy)
        counter.inc(count)

    def begin_policy(self, policy: str) -> None:
        """Begin a policy's counters at 0."""
        for reason in ("broken", "mismatch", "failed"):
            self.versions_refused.labels(policy, reason)
        for reason in ("closed", "expired"):
            self.sessions_ended.labels(policy, reason)
        self.sessions_opened.labels(policy)
        self.sessions_restored.labels(policy)
        self.snapshots.labels(policy)
        self.count_steps(policy, 0)
        self.failed_steps.labels(policy)

    def count_episodes(self, policy: str, version: int, count: int) -> None:
        """Record episodes that began; of versions beyond the newest MAX_VERSION_LABELS as those of ``older``."""
        kept = self._begun.setdefault(policy, set())
        if version not in kept and (len(kept) < MAX_VERSION_LABELS or version > min(kept)):
            kept.add(version)
            self.episode_return.labels(policy, str(version))
            self._return_squares.labels(policy, str(version))
            self._version_number.labels(policy, str(version)).set(version)
            if len(kept) > MAX_VERSION_LABELS:
                oldest = min(kept)
                kept.remove(oldest)
                for metric in (self.episodes, self.episode_return, self._return_squares, self._version_number):
                    metric.remove(policy, str(oldest))
        self.episodes.labels(policy, str(version) if version in kept else "older").inc(count)

    def observe_returns(self, policy: str, finished: Iterable[tuple[int, float]]) -> None:
        """Record finished episodes, each as (version, return), of versions that are still among the labels."""
        for version, episode_return in finished:
            if version in self._begun.get(policy, ()):
                self.episode_return.labels(policy, str(version)).observe(episode_return)
                self._return_squares.labels(policy, str(version)).inc(episode_return**2)

    def observe_sessions(self, policy: str, by_state: Mapping[str, int], by_version: Mapping[int, int]) -> None:
        """Set the gauges of a policy's slots and of the versions that it holds."""
        for state, count in by_state.items():
            self.sessions.labels(policy, state).set(count)
        held = {str(version): count for version, count in by_version.items()}
        for version in self._held.get(policy, set()) - held.keys():
            self._version_sessions.remove(policy, version)
        self._held[policy] = set(held)
        for version, count in held.items():
            self._version_sessions.labels(policy, version).set(count)

    def observe_device(self) -> None:
        """Set the gauge of the device's memory."""
        if self._device.type == "cuda":
            self.device_memory.set(torch.cuda.memory_reserved(self._device))


class _Quiet(WSGIRequestHandler):
    timeout = 10
    """Seconds after which a connection that asks nothing is closed: each holds a thread."""

    def log_message(self, format: str, *args: Any) -> None:
        """A probe every few seconds is not news."""


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ThreadedIPv6(_Threaded):
    address_family = socket.AF_INET6


class MetricsServer:
    """Serves /metrics, /healthz (the process answers) and /readyz (steps are answered) from a thread of its own."""

    def __init__(self, metrics: Metrics, host: str, port: int, state: Callable[[], str]) -> None:
        """``state`` returns one of STATES, from any thread. Raises OSError where the port is taken."""
        exposition = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                # Here, since the event loop may hang.
                metrics.state.state(state())
                return exposition(environ, start_response)
            status, body = "404 Not Found", "expected /metrics, /healthz or /readyz"
            if path == "/healthz":
                status, body = "200 OK", "ok"
            elif path == "/readyz":
                now = state()
                status, body = ("200 OK", "ok") if now == READY else ("503 Service Unavailable", _NOT_READY[now])
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [body.encode() + b"\n"]

        self._server = make_server(host, port, app, _ThreadedIPv6 if ":" in host else _Threaded, _Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
