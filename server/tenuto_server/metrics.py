"""Every metric of the server, declared here and nowhere else, and the HTTP face that Prometheus and probes ask.

The stations of ``tenuto_station_seconds`` are those of docs/request.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.exposition import make_wsgi_app

_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 1.5e-2, 2.5e-2, 5e-2, 0.1,
            0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # fmt: skip
_ROWS = tuple(float(2**i) for i in range(13))
STATIONS = ("check", "admit", "submit", "gather", "run", "scatter", "reply")
"""Stations 2 to 8 of docs/request.md."""
MAX_VERSION_LABELS = 32
"""Versions per policy whose returns are kept as label values; older ones leave /metrics."""


class Metrics:
    """The metrics of one server process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.steps = Counter("tenuto_steps", "Session steps applied.", ["policy"], registry=r)
        self.step_seconds = Histogram(
            "tenuto_step_seconds", "From a request's arrival to its reply.", ["rpc"], buckets=_SECONDS, registry=r
        )
        self.station_seconds = Histogram(
            "tenuto_station_seconds", "Time at each station of a step.", ["station"], buckets=_SECONDS, registry=r
        )
        # Looked up once: a label costs more than an observation.
        self.station = {name: self.station_seconds.labels(name) for name in STATIONS}
        self.batch_rows = Histogram("tenuto_batch_rows", "Sessions per forward pass.", buckets=_ROWS, registry=r)
        self.queued_rows = Gauge("tenuto_queued_rows", "Steps waiting for the device.", registry=r)
        self.refusals = Counter("tenuto_refusals", "Requests and rows refused.", ["reason"], registry=r)
        self.cancelled = Counter(
            "tenuto_requests_cancelled", "Requests given up by the caller, or past its deadline.", registry=r
        )
        self.sessions = Gauge("tenuto_sessions", "Open sessions.", ["policy"], registry=r)
        self.capacity = Gauge("tenuto_session_capacity", "Sessions that may be open at once.", ["policy"], registry=r)
        self.sessions_opened = Counter("tenuto_sessions_opened", "Sessions opened.", ["policy"], registry=r)
        self.sessions_ended = Counter("tenuto_sessions_ended", "Sessions ended.", ["policy", "reason"], registry=r)
        self.episodes = Counter("tenuto_episodes", "Episodes begun.", ["policy"], registry=r)
        self.episode_return = Summary(
            "tenuto_episode_return",
            "Returns of finished episodes whose rewards the clients sent, by the version that began them.",
            ["policy", "version"],
            registry=r,
        )
        self.newest_version = Gauge("tenuto_newest_version", "Version of new episodes.", ["policy"], registry=r)
        self.versions_held = Gauge("tenuto_versions_held", "Versions on the device.", ["policy"], registry=r)
        self.checkpoints = Counter("tenuto_checkpoints", "Checkpoints seen.", ["policy", "outcome"], registry=r)
        self.arena_bytes = Gauge("tenuto_arena_bytes", "Device memory of sessions' state.", ["policy"], registry=r)
        self.batch_invariant = Gauge(
            "tenuto_batch_invariant",
            "1 if all batch sizes gave the same bits in the self-test.",
            ["policy"],
            registry=r,
        )
        self._returned: dict[str, deque[int]] = {}

    def observe_return(self, policy: str, version: int, episode_return: float) -> None:
        """Record a finished episode; keeps the number of version labels bounded."""
        versions = self._returned.setdefault(policy, deque())
        if version not in versions:
            versions.append(version)
            if len(versions) > MAX_VERSION_LABELS:
                self.episode_return.remove(policy, str(versions.popleft()))
        self.episode_return.labels(policy, str(version)).observe(episode_return)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A probe every few seconds is not news."""


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class MetricsServer:
    """Serves /metrics, /healthz (the process answers) and /readyz (steps are answered) from a thread of its own."""

    def __init__(self, metrics: Metrics, host: str, port: int, not_ready: Callable[[], str | None]) -> None:
        """``not_ready`` returns why the server is not ready, or None. Raises OSError where the port is taken."""
        exposition = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return exposition(environ, start_response)
            status, body = "404 Not Found", "expected /metrics, /healthz or /readyz"
            if path == "/healthz":
                status, body = "200 OK", "ok"
            elif path == "/readyz":
                reason = not_ready()
                status, body = ("200 OK", "ok") if reason is None else ("503 Service Unavailable", reason)
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [body.encode() + b"\n"]

        self._server = make_server(host, port, app, _Threaded, _Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
