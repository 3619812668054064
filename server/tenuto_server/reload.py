"""Watches the repository and brings new versions into service under running episodes.

A version is read and verified on a worker thread, warmed on the engine's thread one bucket at a time between batches,
and only then offered to new episodes. One that is refused is named, counted, and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from watchfiles import awatch

from tenuto_models import Checkpoint, CheckpointError, checkpoint
from tenuto_models.compiled import CompiledStep
from tenuto_models.errors import ConfigError
from tenuto_models.signing import Verifier
from tenuto_proto import WireError
from tenuto_server.config import ServerConfig
from tenuto_server.engine import Engine, ServedVersion
from tenuto_server.errors import CapacityError, ConfigurationError
from tenuto_server.metrics import Metrics
from tenuto_server.policies import MismatchError, PolicyRegistry, ServedPolicy
from tenuto_server.self_test import SelfTest
from tenuto_server.step import StepRows

log = logging.getLogger(__name__)
_DEBOUNCE_MS = 100


class Reloader:
    """Owned by the event loop."""

    def __init__(
        self,
        registry: PolicyRegistry,
        engine: Engine,
        metrics: Metrics,
        config: ServerConfig,
        epoch: int,
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._engine, self._metrics, self._config = registry, engine, metrics, config
        self._repository, self._epoch, self._clock = config.repository, epoch, clock
        self.on_scan: Callable[[], Awaitable[None]] | None = None
        """Awaited after each look at the repository, the first time before the server is ready."""
        self._verifier = _verifier(config.checkpoint_public_key)
        self.has_scanned = False
        """Whether everything that was in the repository at the start has been loaded or refused."""
        self._one_at_a_time = asyncio.Lock()
        self._is_readable = self._is_watchable = True
        self._unreadable: set[str] = set()
        """Policies whose folder could not be read at the last look."""
        self._too_large: dict[str, int] = {}
        """Policies for whose sessions there is no memory: the newest version for which that was found out."""

    async def watch(self, poll_s: float, stop: asyncio.Event) -> None:
        """Scan now, at every change of the repository and every ``poll_s`` seconds, until ``stop``."""
        await self._scan_safely()
        # What is loaded by now lives as long as the process: without this, a full collection of garbage walks through
        # all of it and makes the steps of that moment wait some 200 ms.
        gc.collect()
        gc.freeze()
        self.has_scanned = True
        if len(self._registry) == 0:
            log.warning("no policy of %s is served; waiting for a version that can be", self._repository)
        while not stop.is_set():
            try:
                await self._watch_one(poll_s, stop)
                continue
            except ConfigurationError:
                raise
            except FileNotFoundError:
                # There is nothing to watch until somebody brings it back.
                pass
            except Exception as error:  # noqa: BLE001 (the system has no watch left, or the mount has none)
                if self._is_watchable:
                    log.warning("cannot watch the repository, which is looked at every %g s: %s", poll_s, error)
                self._is_watchable = False
            await self._scan_safely()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), poll_s)

    async def _watch_one(self, poll_s: float, stop: asyncio.Event) -> None:
        """Scan at changes until another folder is in the repository's place, of which no events would come. Raises
        FileNotFoundError where there is none.
        """
        watched = _identity(self._repository)
        async for _ in awatch(
            self._repository,
            debounce=_DEBOUNCE_MS,
            step=_DEBOUNCE_MS // 2,
            rust_timeout=int(poll_s * 1000),
            yield_on_timeout=True,
            stop_event=stop,
            # A folder that cannot be read is told of by the scan.
            ignore_permission_denied=True,
        ):
            await self._scan_safely()
            if _identity(self._repository) != watched:
                return

    async def _scan_safely(self) -> None:
        try:
            await self.scan()
            if self.on_scan is not None:
                await self.on_scan()
        except ConfigurationError:
            raise
        except Exception:
            log.exception("could not look through the repository; it is tried again")

    async def require(self, policy_name: str, version: int) -> bool:
        """Serve a version beside the newest, for sessions that began with it. Returns whether it is served.

        It is kept for as long as a session may be idle, after that while a session needs it.
        """
        async with self._one_at_a_time:
            policy = self._registry.get(policy_name)
            if policy is None:
                return False
            policy.hold(version, self._clock() + self._config.idle_timeout_s)
            if version in policy.versions:
                return True
            try:
                present = await asyncio.to_thread(checkpoint.versions, self._repository / policy_name)
            except OSError as error:
                self._cannot_read(policy_name, error)
                return False
            return version in present and await self._load(policy_name, version)

    async def scan(self) -> None:
        """Load the newest sound version of every policy that is newer than the one in service."""
        async with self._one_at_a_time:
            await self._scan()

    async def _scan(self) -> None:
        present: dict[str, list[int]] = {}
        try:
            names = await asyncio.to_thread(_policies, self._repository)
        except OSError as error:
            self._tell_repository(error)
            return
        self._tell_repository(None)
        for name in names:
            policy = self._registry.get(name)
            current = policy.newest.version if policy else self._too_large.get(name, 0)
            try:
                present[name] = await asyncio.to_thread(checkpoint.versions, self._repository / name)
            except OSError as error:
                # The other policies have nothing to do with it.
                self._cannot_read(name, error)
                continue
            self._unreadable.discard(name)
            for version in sorted((v for v in present[name] if v > current), reverse=True):
                try:
                    if await self._load(name, version):
                        break
                except CapacityError as error:
                    # Nor would the older ones: their state is as large.
                    log.error("cannot serve policy %s: %s", name, error)
                    self._metrics.versions_refused.labels(name, "failed").inc()
                    self._registry.refused.add(name, version, None, str(error))
                    self._too_large[name] = version
                    break
        self._registry.refused.keep_only(present)

    def _tell_repository(self, error: OSError | None) -> None:
        """Say once that the repository is gone, and once that it is back: what is served goes on meanwhile."""
        if error is not None and self._is_readable:
            log.error("cannot read the repository %s: %s; what is served goes on", self._repository, error)
        elif error is None and not self._is_readable:
            log.warning("the repository %s can be read again", self._repository)
        self._is_readable = error is None
        self._metrics.repository_readable.set(self._is_readable)

    def _cannot_read(self, name: str, error: OSError) -> None:
        if name not in self._unreadable:
            self._unreadable.add(name)
            self._metrics.versions_refused.labels(name, "failed").inc()
            log.error("cannot read the versions of policy %s: %s", name, error)

    async def _load(self, name: str, version: int) -> bool:
        """Bring one version into service; False where it was refused, now or before in the same form.

        Raises CapacityError where the sessions of a new policy do not fit into memory, and at start-up
        ConfigurationError where its results depend on the batch although they must not.
        """
        folder = self._repository / name / str(version)
        form, refused = await asyncio.to_thread(_form, folder), self._registry.refused
        if refused.holds(name, version, form):
            return False
        try:
            log.info("loading version %d of policy %s", version, name)
            loaded = await asyncio.to_thread(_read, folder, self._engine.device.type, self._verifier)
            policy = self._registry.get(name)
            first = policy is None
            if policy is None:
                policy = await self._engine.call(
                    lambda: ServedPolicy(loaded, self._engine, self._config.capacity, self._epoch)
                )
            served = await self._engine.call(lambda: policy.prepare(loaded, self._engine))
            await self._warm(served)
            if first:
                await self._test(policy, loaded)
        except (CheckpointError, MismatchError, WireError) as error:
            # Callers learn which version it is, not where this server keeps it.
            message = str(error).removeprefix(f"{folder}: ").replace(str(folder), f"version {version}")
            refused.add(name, version, form, message)
            reason = "mismatch" if isinstance(error, MismatchError) else "broken"
            self._metrics.versions_refused.labels(name, reason).inc()
            log.warning("refused version %d of policy %s: %s", version, name, error)
            return False
        except CapacityError:
            raise
        except ConfigurationError as error:
            # Who has just started the server shall see it at once; later it goes on with what it serves.
            if not self.has_scanned:
                raise
            refused.add(name, version, form, str(error))
            self._metrics.versions_refused.labels(name, "failed").inc()
            log.error("refused version %d of policy %s: %s", version, name, error)
            return False
        except Exception:
            refused.add(name, version, form, "it could not be loaded; the server's log says why")
            self._metrics.versions_refused.labels(name, "failed").inc()
            log.exception("could not load version %d of policy %s", version, name)
            return False
        policy.versions[version] = served
        refused.discard(name, version)
        if first:
            self._registry.add(policy)
            self._metrics.begin_policy(name)
            self._metrics.capacity.labels(name).set(self._config.capacity)
            self._metrics.arena_bytes.labels(name).set(policy.arena.num_bytes)
        policy.drop_unused_versions(self._clock())
        if served is policy.newest:
            self._metrics.newest_version.labels(name).set(version)
            self._metrics.newest_published.labels(name).set(loaded.created_unix_s)
        self._metrics.versions_loaded.labels(name).inc()
        training = loaded.training
        log.info(
            "serving version %d of policy %s (%d env steps, training return %s)",
            version, name, training.env_steps, training.return_mean,
        )  # fmt: skip
        return True

    async def _warm(self, served: ServedVersion) -> None:
        """Run a batch of every size that has code of its own. Raises CheckpointError where the output is not finite."""
        for size in served.step.sizes:
            results = await self._engine.call(lambda size=size: served.step.advance(padding(served, size)))
            if not results.finite.all():
                raise CheckpointError("its output is not finite")

    async def _test(self, policy: ServedPolicy, first: Checkpoint) -> None:
        """Find out whether the policy's results depend on the batch. Raises ConfigurationError where they must not."""
        spread = await SelfTest(self._engine, first.policy, self._config.max_batch).spread()
        policy.is_batch_invariant = spread == 0
        self._metrics.batch_invariant.labels(policy.name).set(policy.is_batch_invariant)
        if policy.is_batch_invariant:
            return
        message = f"policy {policy.name}: results differ by up to {spread:.1e} between batches on {self._engine.device}"
        if self._config.deterministic:
            raise ConfigurationError(f"deterministic: {message}")
        log.warning("%s", message)


def padding(served: ServedVersion, rows: int) -> StepRows:
    """Make rows of the spare slot, which no session has."""
    slots = np.full(rows, served.arena.spare)
    nothing, observation = np.zeros(rows, np.uint64), np.linspace(-1, 1, served.observation_size, dtype=np.float32)
    return StepRows(
        slots=slots, generations=served.pool.generation[slots],
        observations=np.tile(observation, (rows, 1)), episode_starts=np.ones(rows, np.bool_),
        seeds=nothing, step_indices=nothing, deterministic=np.ones(rows, np.bool_), rewards=np.zeros(rows, np.float32),
        session_ids=nothing,
    )  # fmt: skip


def _verifier(public_key: Path | None) -> Verifier | None:
    try:
        return None if public_key is None else Verifier.from_file(public_key)
    except ConfigError as error:
        raise ConfigurationError(f"checkpoint_public_key: {error}") from error


def _read(folder: Path, device_type: str, verifier: Verifier | None) -> Checkpoint:
    """Read a version; for the CPU take a step with it, so that what the first step compiles is compiled here."""
    loaded = checkpoint.read(folder, verifier)
    if device_type == "cpu":
        CompiledStep(loaded.policy).try_out()
    return loaded


def _policies(repository: Path) -> list[str]:
    """Return the names of the policies. Raises OSError where there is no repository, or it cannot be read."""
    with os.scandir(repository):
        return checkpoint.policies(repository)


def _identity(folder: Path) -> object:
    """What tells a folder from another in its place."""
    try:
        stat = folder.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _form(folder: Path) -> object:
    """What tells a changed folder from the one that was refused."""
    found: list[tuple[str, int, int]] = []
    try:
        for path in sorted(folder.iterdir()):
            stat = path.lstat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        return str(error)
    return found
