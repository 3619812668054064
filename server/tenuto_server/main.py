"""``tenuto-serve``: builds the parts, keeps them running, and takes them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server.access import Access
from tenuto_server.batch_queue import BatchQueue
from tenuto_server.config import ServerConfig, is_loopback, parse_args
from tenuto_server.durability import Durability, Snapshotter
from tenuto_server.engine import Engine, choose_device
from tenuto_server.errors import ConfigurationError, FatalError, StoreError
from tenuto_server.guard import guarded
from tenuto_server.intake import Intake
from tenuto_server.metrics import READY, Metrics, MetricsServer
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.reload import Reloader, padding
from tenuto_server.service import PolicyService
from tenuto_server.sessions import Door
from tenuto_server.stepper import Stepper
from tenuto_server.store import open_store

log = logging.getLogger("tenuto")
SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"].full_name
_SWEEP_S = 0.25
_DRAIN_LOOK_S = 0.05
_STOP_GRACE_S = 2.0
_FAILING_BATCHES = 5
"""As many batches that fail one after another make the server not ready."""
_EXIT_UNSAVED = 75
"""EX_TEMPFAIL: stopped as asked, with sessions that are not saved as they were."""
_EXIT_FATAL = 70
"""Exit code where nothing can be relied upon any more."""
_STORE_MARGIN_S = 60.0
"""For which a shared store keeps a session longer than it may be idle here and then at another server."""
_HANDSHAKE_MS = 20_000
_AGE_GRACE_MS = 30_000
"""What a call that is under way when its connection gets too old has left."""


class Server:
    """One serving process. Owned by the event loop that runs :meth:`run`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        # What torch itself does here are odds and ends.
        torch.set_num_threads(1)
        self.engine = Engine(
            choose_device(config.device), config.buckets, config.num_compute_threads, deterministic=config.deterministic
        )
        self.metrics = Metrics(self.engine.device)
        self.access = Access(config, self.metrics)
        self.registry = PolicyRegistry()
        epoch = secrets.randbits(63)
        max_delay_s = config.max_queue_delay_ms / 1000 or math.inf
        queue = BatchQueue(config.max_batch, config.max_wait_ms / 1000, config.max_queued, max_delay_s)
        self.metrics.queued_rows.set_function(lambda: queue.num_rows)
        self.metrics.queue_capacity.set_function(lambda: queue.max_waiting)
        self.metrics.queue_delay.set_function(lambda: queue.delay_s)
        self.metrics.queue_parties.set_function(lambda: queue.num_parties)
        self.stepper = Stepper(self.engine, self.registry, queue, self.metrics, time.monotonic)
        self.reloader = Reloader(self.registry, self.engine, self.metrics, config, epoch, time.monotonic)
        snapshotter = Snapshotter(
            self.registry, self.engine, self.reloader, time.monotonic, knows_callers=self.access.authentication.is_on
        )
        self.durability = self._make_durability(snapshotter)
        limits = pb.Limits(
            max_batch_rows=config.max_batch,
            max_message_bytes=config.max_message_bytes,
            idle_timeout_s=config.idle_timeout_s,
            queue_timeout_s=config.queue_timeout_s,
        )
        self.intake = Intake(self.registry, self.stepper, self.metrics, time.monotonic, config.max_batch, epoch)
        self.service = PolicyService(
            self.registry, self.stepper, self.intake, self.engine, self.metrics, limits, epoch, time.monotonic,
            self.access.authentication, snapshotter, self.durability,
        )  # fmt: skip
        self.health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._is_stalled, self._swept_s = False, time.monotonic()
        self._exit_code = 0
        self._num_failed = 0
        """Batches that failed since the last that did not."""
        self._trying: asyncio.Task[None] | None = None
        self.stepper.batcher.on_outcome = self._on_outcome
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._wanted: dict[tuple[str, int], asyncio.Task[bool]] = {}
        """Versions that are looked for."""
        if self.durability is not None:
            self._use(self.durability)

    def _make_durability(self, snapshotter: Snapshotter) -> Durability | None:
        """Raises ConfigurationError where the store cannot be opened."""
        config = self.config
        if not config.durability:
            return None
        # After a crash a session is idle anew.
        store = open_store(config.durability, 2 * config.idle_timeout_s + _STORE_MARGIN_S)
        thread = ThreadPoolExecutor(1, "store")
        return Durability(
            store, snapshotter, self.registry, self.metrics, time.monotonic, config.snapshot_interval_s,
            lambda work: asyncio.get_running_loop().run_in_executor(thread, work),
        )  # fmt: skip

    def _use(self, durability: Durability) -> None:
        """Have steps and versions looked for in the store, and the replies say what it holds."""
        self.stepper.is_durable = True
        self.stepper.want_version = self._want_version
        self.intake.fetch = durability.fetch
        self.reloader.on_scan = self._restore

    async def _restore(self) -> None:
        """Go on with the sessions of policies that are served by now."""
        assert self.durability is not None
        await self.durability.restore()
        if not self.durability.has_more:
            self.intake.fetch = None

    def _want_version(self, policy: ServedPolicy, version: int) -> None:
        if (policy.name, version) not in self._wanted:
            self._wanted[policy.name, version] = wanting = asyncio.create_task(
                self.reloader.require(policy.name, version)
            )
            wanting.add_done_callback(lambda _: self._wanted.pop((policy.name, version)))

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then drain; returns the exit code. Raises ConfigurationError where a port is
        taken.
        """
        if self.durability is not None:
            try:
                await self.durability.prepare()
            except StoreError as error:
                raise ConfigurationError(f"durability: {error}") from error
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._on_signal)
        server = await self._listen()
        watching = asyncio.create_task(self.reloader.watch(self.config.poll_s, self._stop))
        sweeping = asyncio.create_task(self._sweep())
        looking = asyncio.create_task(self.access.watch())
        stopping = asyncio.create_task(self._stop.wait())
        working = {watching, sweeping, looking}
        if self.durability is not None:
            working.add(asyncio.create_task(self.durability.run(self._stop)))
        await asyncio.wait({stopping, *working}, return_when=asyncio.FIRST_COMPLETED)
        failed = next((t for t in working if t.done() and t.exception() is not None), None)
        await self._drain()
        self.intake.end_turn()
        self.stepper.batcher.close()
        await server.stop(_STOP_GRACE_S)
        sweeping.cancel()
        faulthandler.cancel_dump_traceback_later()
        looking.cancel()
        if self.durability is not None:
            self.durability.close()
        self.engine.close()
        self.metrics_server.close()
        if failed is not None:
            error = failed.exception()
            if isinstance(error, ConfigurationError):
                raise error
            raise RuntimeError("a background task of the server failed") from error
        log.info("stopped")
        return self._exit_code

    async def _listen(self) -> grpc.aio.Server:
        config, tls = self.config, self.access.tls
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                # Robots on mobile links keep idle streams open; let them ping.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # The third ping that comes too early ends the connection.
                ("grpc.http2.max_ping_strikes", 2),
                ("grpc.max_concurrent_streams", config.max_streams),
                # Who connects and says nothing leaves soon.
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                *_age_options(config.max_connection_age_s),
            ],
        )
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(guarded(self.service, self.metrics), server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        # Nobody asks reflection who it is; health is for probes, and tells nothing else.
        if not self.access.authentication.is_on:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        await self._set_health(serving=False)
        metrics_host = config.metrics_address
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            _try_to_bind(config.host, config.port)
            address = f"{host}:{config.port}"
            port = server.add_secure_port(address, tls.credentials()) if tls else server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            message = f"port: got {config.host}:{config.port}, which cannot be bound ({reason})"
            raise ConfigurationError(message) from error
        try:
            self.metrics_server = MetricsServer(self.metrics, metrics_host, config.metrics_port, self.state)
        except OSError as error:
            raise ConfigurationError(
                f"metrics_port: got {metrics_host}:{config.metrics_port}, which cannot be bound ({error.strerror})"
            ) from error
        _create(config.repository)
        await server.start()
        log.info(
            "listening on %s:%d, metrics on port %d, device %s, repository %s",
            config.host, port, self.metrics_server.port, self.engine.device, config.repository,
        )  # fmt: skip
        self._warn_of_strangers()
        return server

    def _warn_of_strangers(self) -> None:
        config = self.config
        if not is_loopback(config.host):
            if self.access.tls is None:
                log.warning("insecure: what travels to and from %s is not encrypted, tokens neither", config.host)
            if not self.access.authentication.is_on:
                log.warning(
                    "nobody who connects to %s is asked who they are: see --tokens, --tls-client-ca", config.host
                )

    def state(self) -> str:
        """What the server does, one of metrics.STATES. Called from any thread."""
        if self._stop.is_set() or self.stepper.draining:
            return "draining"
        if not self.reloader.has_scanned:
            return "loading"
        if len(self.registry) == 0:
            return "empty"
        loop_s = time.monotonic() - self._swept_s
        if max(loop_s, self.stepper.batcher.running_s) > self.config.stall_timeout_s:
            return "stalled"
        return READY if self._num_failed < _FAILING_BATCHES else "failing"

    async def _sweep(self) -> None:
        """Regularly: expire idle sessions and late steps, drop unused versions, and say whether we are ready."""
        due_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            self.metrics.loop_lag.observe(now_s - due_s)
            self._swept_s = now_s
            state = self.state()
            self._log_stall(state)
            self._wind_watchdog()
            if state == "failing" and self._trying is None:
                self._trying = asyncio.create_task(self._try_device())
            await self._set_health(serving=state == READY)
            for policy in self.registry:
                for slot in policy.sessions.idle_slots(now_s, self.config.idle_timeout_s):
                    self.service.end_session(policy, slot, pb.SESSION_EXPIRED)
                for version in policy.drop_unused_versions(now_s):
                    log.info("dropped version %d of policy %s: no session needs it", version, policy.name)
                sessions = dict.fromkeys(policy.versions, 0) | policy.sessions.by_version()
                self.metrics.observe_sessions(policy.name, policy.sessions.by_state(), sessions)
            self.intake.end_turn()
            self.stepper.batcher.expire()
            self.metrics.observe_device()
            due_s = time.monotonic() + _SWEEP_S
            await asyncio.sleep(_SWEEP_S)

    def _wind_watchdog(self) -> None:
        """Put off the end of the process, unless a batch hangs. It comes from a thread that needs no lock of Python's,
        with the stacks of all threads on standard error.
        """
        if self.config.stall_exit_s and self.stepper.batcher.running_s <= 2 * _SWEEP_S:
            faulthandler.dump_traceback_later(self.config.stall_exit_s, exit=True)

    def _on_outcome(self, error: BaseException | None) -> None:
        """Called after each batch."""
        if error is None:
            self._num_failed = 0
            return
        if isinstance(error, FatalError):
            _end_at_once(error)
        self._num_failed += 1
        reason = "out_of_memory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else "error"
        self.metrics.failed_batches.labels(reason).inc()
        if self._num_failed == _FAILING_BATCHES:
            log.error("failing: %d batches in a row have failed", _FAILING_BATCHES)

    async def _try_device(self) -> None:
        """Compute a row of nobody's with every policy; nobody sends steps to a server that is not ready."""
        try:
            for policy in self.registry:
                version = policy.newest
                await self.engine.call(lambda v=version: self.engine.run(v, padding(v, 1)))
        except FatalError as error:
            _end_at_once(error)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next sweep tries again)
            log.debug("the device still fails: %s", error)
        else:
            log.warning("the device computes again")
            self._num_failed = 0
        finally:
            self._trying = None

    def _log_stall(self, state: str) -> None:
        if state == "stalled" and not self._is_stalled:
            log.error("stalled: a batch has been running for longer than %g s", self.config.stall_timeout_s)
        elif self._is_stalled and state != "stalled":
            log.warning("the device answers again")
        self._is_stalled = state == "stalled"

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self.health.set(name, status)

    async def _drain(self) -> None:
        """Refuse new sessions and episodes, and wait for the open ones until the timeout or a second signal. Where
        sessions outlive the process refuse every step, and save them.
        """
        self.stepper.door = Door.NO_EPISODES if self.durability is None else Door.SHUT
        await self._set_health(serving=False)
        deadline_s = time.monotonic() + self.config.drain_timeout_s
        if self.durability is not None:
            await self._save_all(self.durability, deadline_s)
            return
        begun = self._num_sessions()
        log.info("draining: %d sessions have begun, at most %g s", begun, self.config.drain_timeout_s)
        while self._num_sessions() and time.monotonic() < deadline_s and not self._hurry.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), _DRAIN_LOOK_S)
        if left := self._num_sessions():
            log.warning("%d sessions were still open at the end of the drain", left)

    async def _save_all(self, durability: Durability, deadline_s: float) -> None:
        """Answer the steps that run, then write every session, until the deadline or a second signal."""
        log.info("draining: saving %d sessions, at most %g s", self._num_sessions(), self.config.drain_timeout_s)
        self.intake.end_turn()
        while not (self.stepper.batcher.idle and await durability.flush()):
            if time.monotonic() >= deadline_s or self._hurry.is_set():
                left = sum(policy.sessions.num_changed() for policy in self.registry)
                log.error("%d sessions were not saved as they are at the end of the drain", left)
                self._exit_code = _EXIT_UNSAVED
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), _DRAIN_LOOK_S)

    def _num_sessions(self) -> int:
        """Sessions that may have an episode running: those that have taken a step."""
        return sum(policy.sessions.num_begun for policy in self.registry)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()


def _end_at_once(error: FatalError) -> None:
    """End the process as a crash would: what it still holds is not written anywhere, since it may be wrong."""
    log.critical("ending: %s", error)
    logging.shutdown()
    os._exit(_EXIT_FATAL)


def _age_options(max_age_s: float) -> list[tuple[str, int]]:
    if not max_age_s:
        return []
    return [
        ("grpc.max_connection_age_ms", max(1, round(max_age_s * 1000))),
        ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
    ]


def _create(repository: Path) -> None:
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"repository: got {repository}, which cannot be created ({error.strerror})"
        raise ConfigurationError(message) from error


def _try_to_bind(host: str, port: int) -> None:
    """Raise OSError with the system's reason where gRPC would only say that it failed."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tenuto-serve``."""
    try:
        config = parse_args(argv)
        logging.basicConfig(
            level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
        code = _run(_serve(config))
    except ConfigurationError as error:
        sys.exit(f"tenuto-serve: {error}")
    sys.exit(code)


def _run(serving: Coroutine[None, None, int]) -> int:
    """Run the event loop: uvloop's where it is installed, which takes a third of gRPC's cost per message away."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serving)
    return uvloop.run(serving)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether gRPC says more than that a client was gone before its reply, or that a stream ended with the server."""
    error = record.exc_info and record.exc_info[1]
    return not (isinstance(error, asyncio.CancelledError) or type(error).__name__ == "ExecuteBatchError")


async def _serve(config: ServerConfig) -> int:
    return await Server(config).run()


if __name__ == "__main__":
    main()
