"""``make mutations``: plants a bug in each law's keeper in turn, and shows that the simulator finds it, and when.

A mutation is a change of one function's source. It is applied in memory; no file changes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import textwrap
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from simulation import laws
from simulation.world import simulate


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    target: str
    """module:function or module:Class.method"""
    old: str
    new: str
    expected: str
    """A law that it breaks; another one may say so first."""
    store: str = ""
    """Where it can show at all; empty: anywhere."""


@dataclass(frozen=True)
class Found:
    """What became of it. ``law`` is empty where it was not found."""

    law: str
    text: str
    seed: int
    num_steps: int
    """Steps that clients made before, over all seeds."""
    took_s: float


_SERVER, _CLIENT = "tenuto_server.", "tenuto_client."
MUTATIONS = (
    Mutation("a repeated step is computed again", _SERVER + "sessions:SessionTable.admit",
             "usual = (step_indices == self.next_index[slots]) &",
             "usual = ((step_indices == self.next_index[slots]) | (step_indices + 1 == self.next_index[slots])) &",
             laws.ORDER),
    Mutation("a gap is accepted", _SERVER + "sessions:SessionTable.admit",
             "usual = (step_indices == self.next_index[slots]) &", "usual = (step_indices >= self.next_index[slots]) &",
             laws.REFUSED),
    Mutation("the index moves on by two", _SERVER + "sessions:SessionTable.commit",
             "self.next_index[slots] += _ONE", "self.next_index[slots] += _ONE + _ONE", laws.ORDER),
    Mutation("the reply of another session is stored", _SERVER + "stepper:Stepper._commit",
             "replies.action[slots], replies.value[slots] = results.actions[good], results.values[good]",
             "replies.action[slots], replies.value[slots] = results.actions[good][::-1], results.values[good]",
             laws.SAME),
    Mutation("a session may step twice at once", _SERVER + "sessions:SessionTable.admit",
             "self.busy[running] = True", "self.busy[running] = False", laws.SLOT),
    Mutation("state is scattered where a result is not finite", _SERVER + "arena:StateArena.scatter",
             "torch.where(keep, slots, self.spare)", "slots", laws.SAME),
    Mutation("a step that is not finite counts as applied", _SERVER + "stepper:Stepper._commit",
             "good = slice(None) if np.count_nonzero(results.finite) == len(rows) else results.finite",
             "good = slice(None)", laws.SAME),
    Mutation("an episode begins with the state of the one before", _SERVER + "arena:StateArena.gather",
             "matrix.masked_fill_(episode_starts.unsqueeze(1), 0)", "pass", laws.SAME),
    Mutation("a session begins with the state of its slot", _SERVER + "sessions:SessionTable.admit",
             "starts = episode_starts | (step_indices == 0)", "starts = episode_starts", laws.SAME),
    Mutation("a slot is given back while its step runs", _SERVER + "sessions:SessionTable.end",
             "if self.busy[slot]:", "if False:", laws.ERROR),
    Mutation("a slot is given back twice", _SERVER + "arena:SlotPool.release",
             "self._free.append(slot)", "self._free += [slot, slot]", laws.CAPACITY),
    Mutation("a new version is used within an episode", _SERVER + "sessions:SessionTable.admit",
             "versions = np.where(starts, np.where(pinned > 0, pinned, newest_version), versions)",
             "versions = np.where(pinned > 0, pinned, newest_version)", laws.VERSION),
    Mutation("the owner of a session is not looked at", _SERVER + "sessions:SessionTable.admit",
             "others = self.owner[slots] != owners", "others = np.zeros(n, np.bool_)", laws.PRIVATE),
    Mutation("anybody may close and inspect", _SERVER + "sessions:SessionTable.has",
             "slot is not None and (owner is None or self._owner_names[self.owner[slot]] == owner)",
             "slot is not None", laws.PRIVATE),
    Mutation("everybody's sessions are listed", _SERVER + "sessions:SessionTable.session_ids",
             "if owner is None:", "if True:", laws.PRIVATE),
    Mutation("what comes after the end is dropped", _SERVER + "batcher:Batcher.submit",
             'self._fail(tickets, Refusal(pb.DRAINING, "the server has stopped"))', "pass", laws.ANSWERED),
    Mutation("a snapshot is read while a batch runs", _SERVER + "durability:Snapshotter.take",
             "return await self._engine.call_then(lambda: policy.arena.read_rows(slots), group)",
             "rows = policy.arena.read_rows(slots)\n    return await self._engine.call_then(lambda: rows, group)",
             laws.SAME),
    Mutation("a snapshot of a slot that changed hands is kept", _SERVER + "snapshots:take_group",
             "here = (sessions.pool.generation[slots] == generations) & ~sessions.closing[slots]",
             "here = np.ones(len(slots), np.bool_)", laws.SAME),
    Mutation("the generation is not looked at after a write", _SERVER + "durability:Durability._save",
             "same = sessions.pool.generation[group.slots] == group.generations",
             "same = np.ones(len(group.slots), np.bool_)", laws.DURABLE),
    Mutation("durable_step is told before the commit", _SERVER + "durability:Durability._save",
             "overtaken = await self._write(policy, group)",
             "policy.sessions.durable_index[group.slots] = group.num_steps\n"
             "    overtaken = await self._write(policy, group)",
             laws.DURABLE),
    Mutation("the store goes back", _SERVER + "store:SQLiteStore._put",
             " WHERE num_steps <= excluded.num_steps", "", laws.DURABLE, "shared file"),
    Mutation("a torn snapshot is accepted", _SERVER + "snapshots:unseal",
             "if hashlib.sha256(sealed.snapshot).digest() != sealed.sha256:", "if False:", laws.SAME),
    Mutation("other weights are accepted", _SERVER + "snapshots:check_fit",
             "if held.weights_sha256 != snapshot.weights_sha256:", "if False:", laws.SAME),
    Mutation("another memory is accepted", _SERVER + "snapshots:check_fit",
             "if snapshot.state_fingerprint != policy.state_fingerprint:", "if False:", laws.SAME),
    Mutation("a restored session has a step too many", _SERVER + "snapshots:install",
             "sessions.next_index[slot], sessions.num_episodes[slot] = snapshot.next_step_index, snapshot.num_episodes",
             "sessions.next_index[slot], sessions.num_episodes[slot] = snapshot.next_step_index + 1, 0", laws.ORDER),
    Mutation("a restored session forgets its last reply", _SERVER + "snapshots:install",
             "if snapshot.next_step_index:", "if False:", laws.REPEAT),
    Mutation("closed sessions stay in the store after a failed write", _SERVER + "durability:Durability._write",
             "self._ended = ended | self._ended", "pass", laws.SAVED),
    Mutation("a lookup that failed is an answer", _SERVER + "durability:Durability.fetch",
             "if left := [i for i, looked_for in others.items() if not looked_for.result()]:", "if left := []:",
             laws.LOST),
    Mutation("a server that still loads knows no session", _SERVER + "durability:Durability.fetch",
             "if not self._is_served(stored):", "if False:", laws.LOST),
    Mutation("a session that goes on elsewhere has expired", _SERVER + "policies:PolicyRegistry.has_reached",
             "return expired is None or expired.num_steps >= step_index", "return True", laws.LOST),
    Mutation("the client does not replay", _CLIENT + "durable:DurableSession._apply",
             "self.is_behind = cursor < step.step_index", "self.is_behind = False", laws.LIVE),
    Mutation("the client keeps one step too few", _CLIENT + "durable:StepHistory.forget",
             "kept[0][0].step_index < durable_step", "kept[0][0].step_index <= durable_step", laws.LOST),
    Mutation("the client accepts another action", _CLIENT + "durable:DurableSession._check",
             "if (again if isinstance(again, int) else again.tobytes()) != action:", "if False:", laws.SAME),
    Mutation("the client sends another observation after one in doubt", _CLIENT + "session:Session._deliver",
             "pending = self._pending", "pending = None", laws.SAME),
    Mutation("the vector client keeps one step too few", _CLIENT + "durable_rows:RowHistory.forget",
             "np.maximum(self.first_kept[rows], durable_steps)",
             "np.maximum(self.first_kept[rows], durable_steps + (durable_steps > 0))", laws.LOST),
    Mutation("the client gives up where another server was faster", _CLIENT + "durable:expected_index",
             "if maybe_applied and cursor < step_index and expected == step_index + 1:", "if False:", laws.ERROR,
             "shared"),
)  # fmt: skip


@contextmanager
def planted(mutation: Mutation) -> Generator[None]:
    """Plant a bug, for as long as this lasts."""
    module_name, _, path = mutation.target.partition(":")
    module: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutation.old) == 1, f"{mutation.name}: {source.count(mutation.old)} places in {mutation.target}"
    found: dict[str, Any] = {}
    exec(compile(_replaced(source, mutation), module.__file__, "exec"), module.__dict__, found)
    # A function may have been imported by name.
    places = [owner] if owners else [m for n, m in sys.modules.items() if n.startswith("tenuto_") and m is not None]
    places = [place for place in places if getattr(place, name, None) is original]
    for place in places:
        setattr(place, name, found[name])
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, original)


def _replaced(source: str, mutation: Mutation) -> str:
    """The new source; further lines get the indentation of the first one."""
    head, _, tail = source.partition(mutation.old)
    line = head[head.rfind("\n") + 1 :]
    indent = line[: len(line) - len(line.lstrip())]
    return "from __future__ import annotations\n" + head + mutation.new.replace("\n    ", "\n" + indent) + tail


def hunt(mutation: Mutation, max_steps: int, num_steps: int = 600) -> Found:
    """Simulate one seed after another until a law is broken, or so many steps were made."""
    began_s, steps, seed = time.monotonic(), 0, 0
    with planted(mutation):
        while steps < max_steps:
            result = simulate(seed, num_steps, store=mutation.store)
            steps += max(result.num_steps, 1)
            if result.error is not None:
                return Found(result.error.law, str(result.error), seed, steps, time.monotonic() - began_s)
            seed += 1
    return Found("", "", seed, steps, time.monotonic() - began_s)


def main() -> None:
    """Hunt all of them, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose name holds one of these")
    parser.add_argument("--steps", type=int, default=200_000, help="after which one counts as not found")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.words or any(word in m.name for word in arguments.words)]
    console = Console()
    table = Table("planted", "in", "found by the law", "seeds", "steps", "seconds", title="Mutations")
    with ProcessPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(hunt, mutation, arguments.steps) for mutation in chosen]
        rows: list[tuple[Mutation, Found]] = []
        for mutation, future in zip(chosen, futures, strict=True):
            found = future.result()
            rows.append((mutation, found))
            console.print(f"{mutation.name}: {found.text[:200] or 'NOT FOUND'}", markup=False, highlight=False)
    for mutation, found in rows:
        where = mutation.target.partition(":")[2]
        row = (mutation.name, where, found.law or "not found", str(found.seed + 1), f"{found.num_steps:,}")
        if arguments.markdown:
            print("| " + " | ".join((row[0], f"`{row[1]}`", *row[2:])) + " |")
        table.add_row(*row, f"{found.took_s:.1f}", style=None if found.law else "bold red")
    if not arguments.markdown:
        console.print(table)
    num_found = sum(bool(found.law) for _, found in rows)
    console.print(f"{num_found} of {len(rows)} found")
    sys.exit(num_found < len(rows))


if __name__ == "__main__":
    main()
