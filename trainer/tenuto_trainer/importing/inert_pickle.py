"""Reads pickles without trusting them: nothing in them is imported, called or run.

Of what a pickle names, only plain containers and numpy arrays are built, the arrays by ``numpy.frombuffer`` on plain
bytes; every other class or function becomes a :class:`Placeholder`, which remembers its name and its attributes and
does nothing. This is the only file of tenuto that reads pickles; none writes one.

Python's own unpickler is not used: it sets attributes of what it builds, allots memory for whatever index a pickle
names, and hashes tuples so deep that the process dies. The opcodes are carried out here one by one instead, and what
no checkpoint needs is refused.
"""

from __future__ import annotations

import pickletools
import re
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_trainer.errors import ImportedError

# What reading raises where the bytes are no pickle, or one that does nonsense.
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, MemoryError, OverflowError, RecursionError)

# Far above what any checkpoint has, and low enough that reading takes seconds and some hundred megabytes.
_MOST_OPCODES = 2_000_000
_MOST_CLASSES = 10_000
_MOST_BITS = 2048  # Of a whole number; Python refuses to print one of 4300 digits.
# Containers within each other, and all of their items as often as they occur. Deeper ones overflow the stack when they
# are hashed, compared or printed, larger ones take years: a list that holds another twice may hold that one's twice.
_MOST_NESTED = 50
_MOST_ITEMS = 2_000_000
_MOST_ITEMS_OF_A_KEY = 1000
_TOO_MUCH = f"containers in each other more than {_MOST_NESTED} deep, or more than {_MOST_ITEMS} items"


def loads(payload: bytes) -> Any:
    """Read a pickle; its arrays are :class:`Array`. Raises ImportedError if it is not one that can be read."""
    try:
        value = _Machine(payload).run()
    except _BROKEN as error:
        text = " ".join(str(error).split())[:200]
        raise ImportedError(f"got a pickle that cannot be read ({type(error).__name__}: {text})") from error
    _require_bounded(value)
    return value


class _Inert(type):
    """Makes a class whose call gives the class itself, so that whatever a pickle does with it comes to nothing."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls


class Placeholder(metaclass=_Inert):
    """Stands for an object whose class is not built; one subclass for each class that a pickle names."""

    attributes: Any


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


class _Encoded:
    """Bytes as pickle protocols below 3 write them: ``(text, "latin1")``, and no arguments for none."""

    def __new__(cls, text: Any = "", encoding: Any = "latin1") -> Any:
        return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else None


def numbers_from(raw: Any, dtype: Any, shape: Any) -> Array:
    """Return the array of a shape that bytes and a dtype, "<f4" or one out of a pickle, stand for."""
    if isinstance(dtype, str):
        order, dtype = dtype[:1], _Dtype(dtype[1:])
        dtype.order = order
    return _FromBuffer(raw, dtype, shape, "C")


_ALLOWED: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): Array,
    **{
        (builtins, name): made
        for builtins in ("builtins", "__builtin__")
        for name, made in [("set", set), ("frozenset", frozenset), ("bytes", _Encoded)]
    },
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

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
# fmt: off
_LITERALS = frozenset([
    "INT", "LONG", "FLOAT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
])
# fmt: on
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Carries out the opcodes of one pickle; builds what _ALLOWED names, and placeholders for all else."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        """What lay below each mark."""
        self._memo: dict[int, Any] = {}
        self._classes: dict[tuple[str, str], type] = {}
        self._nested: dict[int, tuple[Any, int, int]] = {}
        """id -> the tuple or frozen set itself, which keeps the id its own, and what :meth:`_measure` says of it."""
        # An honest pickle copies nothing twice, but for short names such as "latin1".
        self._may_copy = 1000 + 2 * len(payload)

    def run(self) -> Any:
        """Return what the pickle describes. Raises ImportedError or one of _BROKEN."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._payload)):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if count >= _MOST_OPCODES:
                raise _refusal(f"more than {_MOST_OPCODES} opcodes")
            if name in _LITERALS:
                if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                    raise _refusal(f"a number of {argument.bit_length()} bits")
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _CONTAINERS:
                self._stack.append(_CONTAINERS[name]())
            elif name in _TUPLES:
                self._stack.append(self._hashable(tuple(self._pop(_TUPLES[name]))))
            else:
                self._do(name, argument)
        raise ValueError("no STOP")  # pickletools itself says so before.

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                items = self._pop_mark()
                self._stack.append(self._hashable(tuple(items)))
            case "LIST":
                items = self._pop_mark()
                self._stack.append(items)
            case "DICT":
                items = self._pop_mark()
                self._stack.append({})
                self._set_items(items)
            case "FROZENSET":
                items = self._pop_mark()
                self._stack.append(self._set(frozenset, items))
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS":
                self._extend(self._pop_mark())
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_mark())
            case "ADDITEMS":
                self._add_items(self._pop_mark())
            case "GLOBAL":
                stack.append(self._class(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._class(*self._pop(2)))
            case "REDUCE":
                made, arguments = self._pop(2)
                stack.append(made if isinstance(made, _Inert) else self._call(made, arguments))
            case "NEWOBJ":
                stack.append(self._new(*self._pop(2)))
            case "NEWOBJ_EX":
                made, arguments, named = self._pop(3)
                if named and not isinstance(made, _Inert):
                    raise _refusal("named arguments")
                stack.append(self._new(made, arguments))
            case "INST":
                items = self._pop_mark()
                self._stack.append(self._new(self._class(*argument.split(" ", 1)), tuple(items)))
            case "OBJ":
                made, *items = self._pop_mark()
                self._stack.append(self._new(made, tuple(items)))
            case "BUILD":
                (state,) = self._pop(1)
                _build(self._stack[-1], state)
            case _:
                raise _refusal(f"the opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise _refusal("an opcode without its operands")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not _is_placeholder(target):
            raise _refusal(f"items for a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise _refusal("a key without its value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[self._key(key)] = value
        elif not _is_placeholder(target):
            raise _refusal(f"keys for a {type(target).__name__}")

    def _add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(map(self._key, items))
        elif not _is_placeholder(target):
            raise _refusal(f"items for a {type(target).__name__}")

    def _class(self, module: Any, name: Any) -> type:
        """Return what stands for a class or function that the pickle names."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise _refusal("a class without a name")
        known = _ALLOWED.get((module, name)) or self._classes.get((module, name))
        if known is not None:
            return known
        if len(self._classes) >= _MOST_CLASSES:
            raise _refusal(f"more than {_MOST_CLASSES} classes")
        # Names are shown to people, in one line.
        shown = name if len(name) <= 200 and name.replace(".", "").isidentifier() else "unnamed"
        made = self._classes[module, name] = _Inert(shown, (Placeholder,), {"__module__": module})
        return made

    def _new(self, made: Any, arguments: Any) -> Any:
        if not isinstance(made, _Inert):
            return self._call(made, arguments)
        placeholder: Any = object.__new__(made)
        placeholder.attributes = {}
        return placeholder

    def _call(self, made: Any, arguments: Any) -> Any:
        """Return what one of _ALLOWED, and nothing else, makes of its arguments."""
        if not isinstance(made, type) or made not in _ALLOWED.values() or not isinstance(arguments, tuple):
            raise _refusal(f"a call of a {type(made).__name__}")
        for argument in arguments:
            if isinstance(argument, str | bytes | bytearray | list | tuple | set | frozenset | dict):
                self._may_copy -= len(argument)
        if self._may_copy < 0:
            raise _refusal("copies of copies")
        if not issubclass(made, OrderedDict | set | frozenset):
            return made(*arguments)
        (items,) = arguments or ((),)
        if not isinstance(items, list | tuple | set | frozenset):
            raise _refusal(f"a {made.__name__} of a {type(items).__name__}")
        if issubclass(made, OrderedDict):
            return OrderedDict((self._key(key), value) for key, value in items)
        return self._set(made, items)

    def _set(self, made: type[set[Any]] | type[frozenset[Any]], items: Collection[Any]) -> set[Any] | frozenset[Any]:
        found = made(map(self._key, items))
        return self._hashable(found) if isinstance(found, frozenset) else found

    def _hashable(self, made: Any) -> Any:
        """Return a new tuple or frozen set. Raises ImportedError if too much is in it."""
        nested = [self._measure(item) for item in made if isinstance(item, tuple | frozenset)]
        if nested:
            depth, size = 1 + max(d for d, _ in nested), 1 + len(made) + sum(s for _, s in nested)
            if depth > _MOST_NESTED or size > _MOST_ITEMS:
                raise _refusal(_TOO_MUCH)
            self._nested[id(made)] = made, depth, size
        return made

    def _measure(self, made: Any) -> tuple[int, int]:
        """Return how deep a tuple or frozen set is nested, and how many items it has in all."""
        return self._nested[id(made)][1:] if id(made) in self._nested else (1, 1 + len(made))

    def _key(self, value: Any) -> Any:
        """Return a key or an item of a set. Raises ImportedError if it takes long to hash and to compare."""
        if isinstance(value, tuple | frozenset) and self._measure(value)[1] > _MOST_ITEMS_OF_A_KEY:
            raise _refusal(f"a key of more than {_MOST_ITEMS_OF_A_KEY} items")
        return value


def _build(target: Any, state: Any) -> None:
    """Give an object its attributes, where that is of use; an OrderedDict of torch's has some that are not."""
    if isinstance(target, Array | _Dtype):
        target.__setstate__(state)
    elif isinstance(target, Placeholder):
        target.attributes = state
    elif not isinstance(target, _Inert | OrderedDict | set | frozenset):
        raise _refusal(f"attributes for a {type(target).__name__}")


def _require_bounded(root: Any) -> None:
    """Raise ImportedError if a container in it holds too much or itself, so that whoever prints one need not care."""
    roots, measured = [root], dict[int, tuple[int, int] | None]()  # None while what is in a container is looked at.
    while roots:
        waiting = [(roots.pop(), False)]
        while waiting:
            value, is_done = waiting.pop()
            if is_done:
                inner = [measured.get(id(item)) or (0, 1) for item in _items(value)]
                depth, size = 1 + max((d for d, _ in inner), default=0), 1 + sum(s for _, s in inner)
                if depth > _MOST_NESTED or size > _MOST_ITEMS:
                    raise _refusal(_TOO_MUCH)
                measured[id(value)] = depth, size
            elif id(value) in measured:
                if measured[id(value)] is None:
                    raise _refusal("a container in itself")
            elif isinstance(value, Placeholder):  # Prints as its name.
                measured[id(value)] = 0, 1
                roots.append(value.attributes)
            elif items := _items(value):
                measured[id(value)] = None
                waiting.append((value, True))
                waiting.extend((item, False) for item in items)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Placeholder | _Inert)


def _refusal(what: str) -> ImportedError:
    return ImportedError(f"got a pickle that cannot be read ({what})")
