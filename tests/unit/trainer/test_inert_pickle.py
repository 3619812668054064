"""A pickle that is made to hurt its reader is refused in one line, at once; an honest one is read."""

import io
import os
import pickle
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing import inert_pickle, rllib_checkpoint
from tenuto_trainer.importing.inert_pickle import Array, Placeholder

DATA = Path(__file__).parents[2] / "data" / "popgym"
ORDERED = b"ccollections\nOrderedDict\n)R"
LATIN1 = b"X\x06\x00\x00\x00latin1"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def in_itself(times: int, first: bytes, twice: bytes) -> bytes:
    """Something that holds another twice, that one another twice and so on."""
    return first + (b"2" + twice) * times


ATTACKS: dict[str, tuple[bytes, str]] = {
    "a tuple as deep as the stack": (b"}N" + b"\x85" * 2_000_000 + b"Ns.", "more than 50 deep"),
    "the same in a set": (b"\x8f(N" + b"\x85" * 2_000_000 + b"\x90.", "more than 50 deep"),
    "the same, not hashed here": (b"N" + b"\x85" * 2_000_000 + b".", "more than 50 deep"),
    "the same through the memo": (b"N" + b"\x85q\x000h\x00" * 100 + b".", "more than 50 deep"),
    "deep lists": (b"]" * 100_000 + b"a" * 99_999 + b".", "more than 50 deep"),
    "a deep list as an attribute": (b"cx\nC\n)\x81" + b"]" * 60 + b"a" * 59 + b"b.", "more than 50 deep"),
    "a list in itself": (b"]q\x00h\x00a.", "a container in itself"),
    "a tuple that takes years to hash": (b"}" + in_itself(49, b"N", b"\x86") + b"Ns.", "more than 2000000 items"),
    "a key that takes long to hash": (b"}" + in_itself(12, b"N", b"\x86") + b"Ns.", "a key of more than 1000 items"),
    "a list that takes years to print": (
        b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)) + b".",
        "more than 2000000 items",
    ),
    "more bytes than there are": (b"\x8e" + struct.pack("<Q", 2**40) + b"x.", "expected 1099511627776 bytes"),
    "more bytearray than there is": (b"\x96" + struct.pack("<Q", 2**40) + b"x.", "expected 1099511627776 bytes"),
    "copies of copies of a list": (
        b"](" + b"N" * 1000 + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R" * 50 + b".",
        "copies",
    ),
    "copies of copies of a text": (
        text("x" * 1000) + b"q\x00" + (b"c_codecs\nencode\nh\x00" + LATIN1 + b"\x86R") * 50 + b".",
        "copies of copies",
    ),
    "too many opcodes": (b"N" * 2_000_001 + b".", "more than 2000000 opcodes"),
    "too many classes": (b"".join(b"cx\nC%d\n0" % n for n in range(10_001)) + b"N.", "more than 10000 classes"),
    "a number that nobody can print": (b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".", "bits"),
    "digits without end": (b"I" + b"9" * 5000 + b"\n.", "ValueError"),
    "attributes of a plain value": (b"N}" + text("items") + b"Nsb.", "attributes for a NoneType"),
    "attributes of a class": (b"ccollections\nOrderedDict\n}" + text("items") + b"Nsb.", "attributes for a type"),
    "a state that is none": (b"cnumpy\nndarray\n)RNb.", "TypeError"),
    "a call of a method's name": (text("join") + b")R.", "a call of a str"),
    "a call with no tuple": (b"cbuiltins\nset\nNR.", "a call of a type"),
    "keys of a list": (b"]NNs.", "keys for a list"),
    "items of a dictionary": (b"}Na.", "items for a dict"),
    "half a pair": (b"}(Nu.", "a key without its value"),
    "pairs that are none": (b"ccollections\nOrderedDict\n]Na\x85R.", "TypeError"),
    "a list as a key": (b"}]Ns.", "unhashable"),
    "nothing at all on the stack": (b".", "IndexError"),
    "no mark": (b"t.", "IndexError"),
    "an extension": (b"\x82\x01.", "the opcode EXT1"),
    "a persistent id": (b"Pabc\n.", "the opcode PERSID"),
    "a buffer elsewhere": (b"\x97.", "the opcode NEXT_BUFFER"),
    "no end": (b"N", "before seeing STOP"),
    "lines in an error": (b"I" + b"\x1b[31m\rx\n.", "ValueError"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_in_one_line(attack: str) -> None:
    payload, message = ATTACKS[attack]
    with pytest.raises(ImportedError, match=message) as refused:
        inert_pickle.loads(b"\x80\x05" + payload)
    assert len(str(refused.value)) < 300
    assert str(refused.value).isprintable()


def test_a_memos_index_costs_nothing() -> None:
    """Python's own reader takes 4 GB for the first of these, and ends at the second."""
    for index in (0x0FFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
        assert inert_pickle.loads(b"\x80\x04K\x07r" + struct.pack("<I", index) + b".") == 7


def test_attributes_of_a_container_are_not_set() -> None:
    """Those of a torch state_dict are honest; an ``items`` of its own made its reader fail."""
    made = inert_pickle.loads(b"\x80\x04" + ORDERED + b"}" + text("items") + b"cos\nsystem\nsb.")
    assert (made, list(made.items()), vars(made)) == (OrderedDict(), [], {})
    read = inert_pickle.loads(pickle.dumps(nn.Linear(2, 3).state_dict()))
    assert list(read) == ["weight", "bias"]


def test_an_array_without_its_state_is_no_array() -> None:
    for pickled in (b"cnumpy\nndarray\n)R.", b"cnumpy\nndarray\n)\x81.", b"cnumpy.core.multiarray\n_reconstruct\n)R."):
        made = inert_pickle.loads(b"\x80\x04" + pickled)
        assert isinstance(made, Array)
        assert made.resolve() is None


@pytest.mark.parametrize("name", ["a\nb", "x" * 1000, "\x1b[31m", "a b", ""])
def test_names_of_classes_are_fit_to_be_shown(name: str) -> None:
    made = inert_pickle.loads(b"\x80\x04" + text("module") + text(name) + b"\x93)\x81.")
    assert isinstance(made, Placeholder)
    assert type(made).__name__ == "unnamed"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_an_honest_pickle_holds_is_read_in_every_protocol(protocol: int) -> None:
    shared = ["x", 1]
    plain = {
        "numbers": [1, -1, 255, 65535, 2**31, -(2**80), 0.5, True, False, None],
        "texts": ("", "äöü", "a'b\n", "x" * 300),
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        ("a", ("key", 1)): OrderedDict(a=shared, b=shared),
    }
    read = inert_pickle.loads(pickle.dumps(plain, protocol))
    assert read == plain
    assert read["a", ("key", 1)]["a"] is read["a", ("key", 1)]["b"]
    more = {"bytes": b"\xff" * 300, "none": b"", "set": {1, "a"}, "frozen": frozenset({2})}
    assert inert_pickle.loads(pickle.dumps(more, protocol)) == more


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8", "u1", "?", "f2"])
def test_arrays_of_numbers_are_read_in_every_protocol(dtype: str, protocol: int) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for given in (array, np.asfortranarray(array), array[0, 0, 0], array[:0]):
        read = inert_pickle.loads(pickle.dumps([given], protocol))[0]
        found = read.resolve() if isinstance(read, Array) else read
        np.testing.assert_array_equal(found, given)
        assert found.dtype == given.dtype


def test_framed_pickles_of_a_stream_are_read() -> None:
    """Frames of 64 KiB, and large bytes between them."""
    value = {f"key {n}": [n, "x" * 100, b"y" * (100_000 if n == 7 else 1)] for n in range(2000)}
    file = io.BytesIO()
    pickle.Pickler(file, 4).dump(value)
    assert inert_pickle.loads(file.getvalue()) == value


def test_a_torch_module_keeps_the_names_of_its_parts() -> None:
    read = inert_pickle.loads(pickle.dumps(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.2))))
    parts = read.attributes["_modules"]
    assert [type(part).__name__ for part in parts.values()] == ["Linear", "LeakyReLU"]
    assert parts["1"].attributes["negative_slope"] == 0.2


def test_a_placeholder_may_hold_itself() -> None:
    """As an algorithm's objects do; it prints as its name."""
    read = inert_pickle.loads(b"\x80\x04cx\nC\n)\x81q\x00}" + text("me") + b"h\x00sb.")
    assert read.attributes["me"] is read


def test_nothing_that_a_pickle_calls_is_called(tmp_path: Path) -> None:
    class Calls:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> Any:
            return self.call[0], self.call[1:]

    marker = tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        inert_pickle.loads(
            pickle.dumps([Calls(os.mkdir, str(marker)), Calls(eval, f"open({str(marker)!r}, 'w')")], protocol)
        )
    instance = b"(X" + struct.pack("<I", len(str(marker))) + str(marker).encode()
    inert_pickle.loads(instance + b"ios\nmkdir\n.")
    inert_pickle.loads(b"(cos\nmkdir\n" + instance[1:] + b"o.")
    assert not marker.exists()


@pytest.mark.parametrize("cls", ["DiffNC", "Frameconv"])
def test_a_checkpoint_with_broken_bytes_is_read_or_refused_in_one_line(cls: str, tmp_path: Path) -> None:
    whole = (DATA / cls / "policies" / "default_policy" / "policy_state.pkl").read_bytes()
    expected = rllib_checkpoint.read(DATA / cls)
    (tmp_path / "policy_state.pkl").write_bytes(whole)
    assert rllib_checkpoint.read(tmp_path).weights.keys() == expected.weights.keys()
    draw, refused = random.Random(1), 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 30)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            inert_pickle.loads(bytes(broken))
        except ImportedError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 20


def test_a_large_checkpoint_is_read() -> None:
    """20 MB of weights, as much again of Adam's, and a long history."""
    weights = {f"layer.{n}": np.full((1000, 500), n, np.float32) for n in range(10)}
    state = {"weights": weights, "_optimizer_variables": [{"state": torch.zeros(1)}], "history": [0.5] * 100_000}
    read = inert_pickle.loads(pickle.dumps(state))
    assert read["history"] == state["history"]
    for name, array in weights.items():
        np.testing.assert_array_equal(read["weights"][name].resolve(), array)
