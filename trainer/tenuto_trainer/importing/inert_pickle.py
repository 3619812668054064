"""Reads pickles without trusting them: nothing in them is imported, called or run.

Of what a pickle names, only plain containers and numpy arrays are built, the arrays by ``numpy.frombuffer`` on plain
bytes; every other class or function becomes a :class:`Placeholder`, which remembers its name and its attributes and
does nothing. This is the only file of tenuto that reads pickles; none writes one.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_trainer.errors import ImportedError

# What reading raises where the bytes are no pickle, or one that does nonsense.
_BROKEN = (
    pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, MemoryError,
    OverflowError, RecursionError,
)  # fmt: skip


def loads(payload: bytes) -> Any:
    """Read a pickle; its arrays are :class:`Array`. Raises ImportedError if it is not one that can be read."""
    try:
        return _Reader(io.BytesIO(payload)).load()
    except _BROKEN as error:
        raise ImportedError(f"got a pickle that cannot be read ({type(error).__name__}: {error})") from error


class _Inert(type):
    """Makes a class whose call gives the class itself, so that whatever a pickle does with it comes to nothing."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __setitem__(cls, key: Any, value: Any) -> None:
        pass


class Placeholder(metaclass=_Inert):
    """Stands for an object whose class is not built; one subclass for each class that a pickle names."""

    attributes: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Take any arguments and keep none."""
        placeholder = super().__new__(cls)
        placeholder.attributes = {}
        return placeholder

    def __setstate__(self, state: Any = None) -> None:
        # A pickle may also set the state of the class itself, which is nobody's.
        if isinstance(self, Placeholder):
            self.attributes = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any = None) -> None:
        """Take nothing."""

    extend = append
    add = append


class _Dtype:
    """A numpy dtype while a checkpoint is read; only plain numbers become one."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def resolve(self) -> np.dtype[Any] | None:
        """Return the dtype; None for any but numbers and truth values."""
        if not isinstance(self.code, str) or not re.fullmatch("f[248]|[iu][1248]|b1", self.code):
            return None
        return np.dtype(self.code).newbyteorder(self.order) if self.order in ("<", ">", "=", "|") else None


class Array:
    """A numpy array while a checkpoint is read, made of plain bytes and nothing else."""

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.parts = (raw, dtype, shape, "F" if is_fortran else "C")

    def resolve(self) -> NDArray[Any] | None:
        """Return the array; None if it is none of numbers. It may be read-only."""
        match self.parts:
            case (bytes() | bytearray() as raw, _Dtype() as dtype, tuple() as shape, "C" | "F" as order):
                plain = dtype.resolve()
                with suppress(ValueError, TypeError):
                    return None if plain is None else np.frombuffer(raw, plain).reshape(shape, order=order)
            case _:
                pass
        return None


class _FromBuffer(Array):
    """An array as pickle protocol 5 writes one: ``(bytes, dtype, shape, order)``."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class _Scalar:
    """A numpy scalar ``(dtype, bytes)``: becomes the number, or None."""

    def __new__(cls, dtype: Any = None, raw: Any = None) -> Any:
        array = numbers_from(raw, dtype, ()).resolve()
        return None if array is None else array[()]

    def __setstate__(self, state: Any) -> None:
        pass


class _Encoded:
    """Bytes as pickle protocols below 3 write them: ``(text, "latin1")``."""

    def __new__(cls, text: Any = None, encoding: Any = None) -> Any:
        return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else None

    def __setstate__(self, state: Any) -> None:
        pass


def numbers_from(raw: Any, dtype: Any, shape: Any) -> Array:
    """Return the array of a shape that bytes and a dtype, "<f4" or one out of a pickle, stand for."""
    if isinstance(dtype, str):
        order, dtype = dtype[:1], _Dtype(dtype[1:])
        dtype.order = order
    return _FromBuffer(raw, dtype, shape, "C")


# Classes only, and each either built in or with a __setstate__: what a pickle writes to one of them changes none.
_ALLOWED: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): Array,
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")
        for module, name, made in [
            ("multiarray", "_reconstruct", Array),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _FromBuffer),
        ]
    },
}


class _Reader(pickle.Unpickler):
    """Builds what _ALLOWED names and placeholders for all else; imports nothing."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what stands for a class or function that the pickle names."""
        return _ALLOWED.get((module, name)) or _Inert(name, (Placeholder,), {"__module__": module})
