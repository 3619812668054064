"""Small changes to messages and JSON values, which keep most of what they are and so get past the first check."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

_INTEGERS = (0, 1, 2, 3, 7, 63, 64, 65, 100, 1000, 1001, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1,
             2**63, 2**64 - 1)  # fmt: skip
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "0", "1", "2", "policy", "observation", "..", "\x00", "\ud7ff", "a/b", "é" * 40, "x" * 2000)
_BITS = {
    Field.TYPE_INT32: (32, True), Field.TYPE_SINT32: (32, True), Field.TYPE_SFIXED32: (32, True),
    Field.TYPE_INT64: (64, True), Field.TYPE_SINT64: (64, True), Field.TYPE_SFIXED64: (64, True),
    Field.TYPE_UINT32: (32, False), Field.TYPE_FIXED32: (32, False), Field.TYPE_ENUM: (31, False),
    Field.TYPE_UINT64: (64, False), Field.TYPE_FIXED64: (64, False),
}  # fmt: skip


def integer(rng: random.Random, bits: int, signed: bool) -> int:
    value = rng.choice(_INTEGERS) if rng.random() < 0.7 else rng.getrandbits(rng.randint(1, bits))
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def blob(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes, or the length."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0 or not changed:
        changed[rng.randint(0, len(changed)) : 0] = rng.randbytes(rng.choice((1, 4, 8, 100)))
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        at = rng.randrange(len(changed))
        del changed[at : at + rng.choice((1, 4, 8))]
    elif kind == 3:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 4:
        at = rng.randrange(len(changed))
        special = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\x7f\x7f"))
        changed[at : at + len(special)] = special
    else:
        return data * rng.choice((0, 2, 3))
    return bytes(changed)


def mutate_message(message: Message, rng: random.Random, depth: int = 0) -> None:
    """Change one field somewhere in a message, in place."""
    inner = [
        (field, child)
        for field, value in message.ListFields()
        if field.message_type is not None and not field.message_type.GetOptions().map_entry
        for child in (value if field.is_repeated else [value])
    ]
    if inner and rng.random() < 0.7:
        field, child = rng.choice(inner)
        mutate_message(child, rng, depth + 1)
        return
    field = rng.choice(list(message.DESCRIPTOR.fields))
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    if field.is_repeated:
        _mutate_list(message, field, rng)
    elif field.message_type is not None:
        if message.HasField(field.name) and rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), rng))


def _mutate_list(message: Message, field: Any, rng: random.Random) -> None:
    values = getattr(message, field.name)
    kind = rng.randrange(5)
    if kind == 0 or not len(values):
        if field.message_type is not None:
            added = values.add()
            if len(values) > 1:
                added.CopyFrom(values[rng.randrange(len(values) - 1)])
        else:
            values.append(rng.choice(values) if len(values) and rng.random() < 0.5 else _scalar(field, 0, rng))
    elif kind == 1:
        del values[rng.randrange(len(values))]
    elif kind == 2 and len(values) < 64:
        values.extend(list(values))
    elif kind == 3 and len(values) > 1 and field.message_type is None:
        first, second = rng.randrange(len(values)), rng.randrange(len(values))
        values[first], values[second] = values[second], values[first]
    elif field.message_type is None:
        at = rng.randrange(len(values))
        values[at] = _scalar(field, values[at], rng)
    else:
        message.ClearField(field.name)


def _scalar(field: Any, old: Any, rng: random.Random) -> Any:
    if field.type == Field.TYPE_BYTES:
        return blob(rng, old or b"")
    if field.type == Field.TYPE_STRING:
        return rng.choice(_TEXTS) if rng.random() < 0.8 or not old else str(old) + rng.choice(_TEXTS)
    if field.type == Field.TYPE_BOOL:
        return not old
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return rng.choice(_FLOATS) if rng.random() < 0.8 else rng.gauss(0, 1)
    bits, signed = _BITS[field.type]
    if rng.random() < 0.4:
        value = int(old) + rng.choice((-1, 1))
        return value if _fits(value, bits, signed) else old
    return integer(rng, bits, signed)


def _fits(value: int, bits: int, signed: bool) -> bool:
    return -(1 << (bits - 1)) <= value < 1 << (bits - 1) if signed else 0 <= value < 1 << bits


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value that differs in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {rng.choice((*_TEXTS[:-1], key + "_")): value[key]}
        return value | {key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        changes: Sequence[Callable[[], list[Any]]] = (
            lambda: value[:at] + value[at + 1 :],
            lambda: [*value, value[at]],
            lambda: [*value[:at], mutate_json(value[at], rng), *value[at + 1 :]],
        )
        return changes[min(rng.randrange(6), 2)]()
    return _json_scalar(value, rng)


def _json_scalar(value: Any, rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind == 2:
        return rng.choice(_TEXTS[:-1])
    if kind == 3:
        return rng.choice(([], {}, [value], {"low": value}, [[[[[[]]]]]]))
    if kind == 4:
        return rng.choice(_FLOATS)
    if isinstance(value, str):
        return value + rng.choice(("0", " ", "é")) if rng.random() < 0.3 else value[: rng.randint(0, len(value))]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2**31, 2**63))
    if isinstance(value, float) and rng.random() < 0.5:
        return value * rng.choice((-1.0, 0.0, 1e300))
    return rng.choice((-1, *_INTEGERS, 10**30))
