"""Functions compiled by numba: inner ones, and kernels, which Python calls and whose code is kept on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from llvmlite import binding
from numba import config, njit

log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function) -> _Function:
    """Compile on the first call, for the types of its arguments.

    The flags let sums be reordered, so that they use vector instructions; NaN stays NaN.
    """
    return cast(Any, njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})(function))


class Kernel:
    """A compiled function that Python calls. Its code is kept on disk, where there is a place for it and it is sound.

    numba forgets what it kept when the kernel's own file has changed, not when a function of another file has that the
    kernel calls: a kernel that calls such functions closes over :func:`digest` of their modules, which numba does heed.
    """

    def __init__(self, function: Callable[..., Any], name: str = "") -> None:
        """``name``: for the log; empty: the function's."""
        functools.update_wrapper(self, function)
        self._name = name or function.__name__
        self.inner = jit(function)
        """For kernels that call this one: compiled into them."""
        self._function, self._call, self._used = function, jit(function), False
        # No folder to write to, or numba is told to compile nothing.
        with suppress(RuntimeError, AttributeError):
            cast(Any, self._call).enable_caching()

    def __call__(self, *arguments: Any) -> None:
        """Run it."""
        began = time.monotonic()
        try:
            self._call(*arguments)
        except Exception:  # noqa: BLE001 (kernels raise nothing: what was kept is damaged, or the disk is full)
            self._call = jit(self._function)
            self._call(*arguments)
        if not self._used:
            self._used = True
            # Without it numba was told to compile nothing.
            stats = getattr(self._call, "stats", None)
            if stats is not None and not stats.cache_hits:
                seconds = time.monotonic() - began
                log.info("compiled %s in %.1f s, once on this machine", self._name, seconds)


def digest(*modules: ModuleType) -> str:
    """Return a hash of what the files of modules hold, and this one, which says how they are compiled."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for module in modules:
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()


def cpu_features() -> dict[str, bool]:
    """Return LLVM's names of what the CPU can do that is compiled for: this one, if numba is not told another."""
    named = getattr(config, "CPU_FEATURES", None)
    if named is None:
        return dict(binding.get_host_cpu_features())
    return {feature[1:]: feature[0] == "+" for feature in str(named).split(",") if feature}
