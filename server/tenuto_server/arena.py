"""Where sessions' state lives on the device: one packed row per slot, and the pool that leases the slots.

Legend: C capacity, B rows of a batch. Slot C is the spare row: it takes the padding and is never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenuto_models import StateSpec
from tenuto_server.errors import CapacityError

Slots = NDArray[np.int64]


class SlotPool:
    """Leases slot numbers 0..C-1. A slot's generation changes whenever it is leased or released, so that a batch
    can prove that its slots are still the sessions' they were taken for. Owned by the event loop.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.generation = np.zeros(capacity + 1, np.int64)
        self.leased = np.zeros(capacity + 1, np.bool_)
        # Last in, first out: the most recently used rows are the warmest.
        self._free: list[int] = []
        self.num_touched = 0
        """Slots from this one on have never been leased."""

    @property
    def num_leased(self) -> int:
        """Slots in use."""
        return self.num_touched - len(self._free)

    def lease(self) -> int | None:
        """Take a free slot; None when there is none."""
        if self._free:
            slot = self._free.pop()
        elif self.num_touched < self.capacity:
            slot = self.num_touched
            self.num_touched += 1
        else:
            return None
        self._turn(slot, leased=True)
        return slot

    def release(self, slot: int) -> None:
        """Give a leased slot back."""
        self._turn(slot, leased=False)
        self._free.append(slot)

    def _turn(self, slot: int, *, leased: bool) -> None:
        assert self.leased[slot] != leased, f"slot {slot} is {'already' if leased else 'not'} leased"
        self.leased[slot] = leased
        self.generation[slot] += 1

    def require_current(self, slots: Slots, generations: NDArray[np.int64]) -> None:
        """Assert that no slot changed hands since ``generations`` were read: the law of every gather and scatter."""
        changed = np.count_nonzero(self.generation[slots] != generations)
        assert not changed, "a slot changed hands while its step was running"


class StateArena:
    """The state of all sessions of one policy. Tensors of one dtype are packed side by side in one matrix
    ``[C + 1, row]``, so that moving a batch's state is one gather and one scatter. Owned by the engine.

    Raises CapacityError where the device has no memory for it.
    """

    def __init__(self, spec: StateSpec, capacity: int, device: torch.device) -> None:
        self.spec, self.spare, self.device = spec, capacity, device
        self.matrices: dict[torch.dtype, Tensor] = {}
        """The memory itself, ``[C + 1, row]``, by dtype."""
        self._columns: dict[str, slice] = {}
        for dtype in dict.fromkeys(t.dtype for t in spec):
            width = 0
            for tensor in (t for t in spec if t.dtype == dtype):
                self._columns[tensor.name] = slice(width, width + tensor.num_elements)
                width += tensor.num_elements
            try:
                self.matrices[dtype] = torch.zeros((capacity + 1, width), dtype=dtype, device=device)
            except RuntimeError as error:
                # The CPU's allocator raises no class of its own.
                if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                    raise
                gigabytes = (capacity + 1) * width * dtype.itemsize / 1e9
                message = f"capacity: got {capacity}, whose state takes {gigabytes:,.1f} GB on {device}, which has less"
                raise CapacityError(message) from error

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return sum(m.numel() * m.element_size() for m in self.matrices.values())

    def on_host(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The memory itself of an arena on the CPU: the core's state ``[C + 1, S]``, in the order of its spec, and the
        steps of the episodes so far ``[C + 1]``.
        """
        state, counters = self.matrices[torch.float32], self.matrices[torch.int64]
        assert {t.dtype for t in self.spec[:-1]} == {torch.float32} and counters.shape[1] == 1
        return state.numpy(), counters.view(-1).numpy()

    def gather(self, slots: Tensor, episode_starts: Tensor) -> dict[str, Tensor]:
        """Copy out the state of ``slots [B]``, zeroed where ``episode_starts [B]``: name -> ``[B, *shape]``."""
        rows = {dtype: matrix.index_select(0, slots) for dtype, matrix in self.matrices.items()}
        for matrix in rows.values():
            matrix.masked_fill_(episode_starts.unsqueeze(1), 0)
        return {t.name: rows[t.dtype][:, self._columns[t.name]].view(-1, *t.shape) for t in self.spec}

    def scatter(self, slots: Tensor, state: Mapping[str, Tensor], keep: Tensor) -> None:
        """Store the state of ``slots [B]`` where ``keep [B]``; other rows stay as they are."""
        target = torch.where(keep, slots, self.spare)
        # All is there before anything is stored: no row is half a new one.
        rows = [torch.cat([state[t.name].flatten(1) for t in self.spec if t.dtype == d], dim=1) for d in self.matrices]
        for matrix, row in zip(self.matrices.values(), rows, strict=True):
            matrix.index_copy_(0, target, row)

    @property
    def row_layout(self) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each part of a row of :meth:`read_rows`."""
        return [(np.dtype(str(d).removeprefix("torch.")), (m.shape[1],)) for d, m in self.matrices.items()]

    def read_rows(self, slots: Slots) -> list[NDArray[Any]]:
        """Copy the state of some slots to the host: by dtype, in the order of the matrices, ``[slots, row]``."""
        index = torch.from_numpy(slots).to(self.device)
        return [matrix.index_select(0, index).cpu().numpy() for matrix in self.matrices.values()]

    def write_row(self, slot: int, row: Sequence[NDArray[Any]]) -> None:
        """Set the state of a slot from the host: by dtype, as a row of :meth:`read_rows`."""
        for matrix, values in zip(self.matrices.values(), row, strict=True):
            matrix[slot] = torch.tensor(values, device=self.device)

    def read(self, slot: int) -> dict[str, NDArray[Any]]:
        """Copy one session's state to the host: name -> ``[*shape]``."""
        return {
            t.name: self.matrices[t.dtype][slot, self._columns[t.name]].view(t.shape).cpu().numpy().copy()
            for t in self.spec
        }
