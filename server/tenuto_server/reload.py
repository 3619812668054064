"""Watches the repository and brings new versions into service under running episodes.

A version is read and verified on a worker thread, warmed on the engine's thread one bucket at a time between batches,
and only then offered to new episodes. One that is refused is named, counted, and changes nothing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from watchfiles import awatch

from tenuto_models import Checkpoint, CheckpointError, checkpoint
from tenuto_proto import WireError
from tenuto_server.engine import Engine, ServedVersion
from tenuto_server.errors import CapacityError
from tenuto_server.metrics import Metrics
from tenuto_server.policies import MismatchError, PolicyRegistry, ServedPolicy

log = logging.getLogger(__name__)
_DEBOUNCE_MS = 100


class Reloader:
    """Owned by the event loop."""

    def __init__(
        self, repository: Path, registry: PolicyRegistry, engine: Engine, metrics: Metrics, capacity: int, epoch: int
    ) -> None:
        self._repository, self._registry, self._engine, self._metrics = repository, registry, engine, metrics
        self._capacity, self._epoch = capacity, epoch
        self.has_scanned = False
        """Whether everything that was in the repository at the start has been loaded or refused."""
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

    async def _scan_safely(self) -> None:
        try:
            await self.scan()
        except Exception:
            log.exception("could not look through the repository; it is tried again")

    async def scan(self) -> None:
        """Load the newest sound version of every policy that is newer than the one in service."""
        present: dict[str, list[int]] = {}
        for name in await asyncio.to_thread(checkpoint.policies, self._repository):
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

    def _cannot_read(self, name: str, error: OSError) -> None:
        if name not in self._unreadable:
            self._unreadable.add(name)
            self._metrics.versions_refused.labels(name, "failed").inc()
            log.error("cannot read the versions of policy %s: %s", name, error)

    async def _load(self, name: str, version: int) -> bool:
        """Bring one version into service; False where it was refused, now or before in the same form.

        Raises CapacityError where the sessions of a new policy do not fit into memory.
        """
        folder = self._repository / name / str(version)
        form, refused = await asyncio.to_thread(_form, folder), self._registry.refused
        if refused.holds(name, version, form):
            return False
        try:
            log.info("loading version %d of policy %s", version, name)
            loaded = await asyncio.to_thread(_read, folder)
            policy = self._registry.get(name)
            first = policy is None
            if policy is None:
                policy = await self._engine.call(
                    lambda: ServedPolicy(loaded, self._engine, self._capacity, self._epoch)
                )
            served = await self._engine.call(lambda: policy.prepare(loaded, self._engine))
            await self._warm(served, self_test=first)
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
            self._metrics.capacity.labels(name).set(self._capacity)
            self._metrics.arena_bytes.labels(name).set(policy.arena.num_bytes)
        policy.drop_unused_versions()
        self._metrics.newest_version.labels(name).set(version)
        self._metrics.newest_published.labels(name).set(loaded.created_unix_s)
        self._metrics.versions_loaded.labels(name).inc()
        training = loaded.training
        log.info(
            "serving version %d of policy %s (%d env steps, training return %s)",
            version, name, training.env_steps, training.return_mean,
        )  # fmt: skip
        return True

    async def _warm(self, served: ServedVersion, *, self_test: bool) -> None:
        """Run every bucket once. With ``self_test`` also compare what they computed for the same row.

        Raises CheckpointError where the output is not finite.
        """
        first_rows: list[NDArray[np.float32]] = []
        for bucket in self._engine.buckets:
            first_rows.append(await self._engine.call(lambda size=bucket: self._engine.warm(served, size)))
        if not np.isfinite(first_rows).all():
            raise CheckpointError("its output is not finite")
        if self_test:
            equal = all(np.array_equal(first_rows[0], row) for row in first_rows)
            self._metrics.batch_invariant.labels(served.policy_name).set(equal)
            if not equal:
                spread = float(np.max(np.ptp(np.stack(first_rows), axis=0)))
                log.warning(
                    "policy %s: logits differ by up to %.1e between batch sizes on this device",
                    served.policy_name, spread,
                )  # fmt: skip


def _read(folder: Path) -> Checkpoint:
    """Read a version and take a step with it, so that what compiles at the first step does so on this thread."""
    loaded = checkpoint.read(folder)
    with torch.inference_mode():
        loaded.policy.step(torch.zeros(1, loaded.policy.observation_size), loaded.policy.initial_state(1))
    return loaded


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
