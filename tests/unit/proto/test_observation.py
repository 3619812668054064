"""Any space of fixed size survives the wire, and its rows flatten exactly as gymnasium flattens them."""

import contextlib
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from tenuto_proto import ObservationCodec, WireError, array_from_wire, space_from_wire, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb

LEAF_SPACES = st.one_of(
    st.builds(
        lambda shape, dtype: spaces.Box(-3, 5, shape, dtype),
        st.lists(st.integers(1, 3), max_size=2).map(tuple),
        st.sampled_from([np.float32, np.float64, np.int32]),
    ),
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 6), st.integers(-3, 3)),
    st.builds(
        lambda nvec: spaces.MultiDiscrete(nvec, start=[2] * len(nvec)),
        st.lists(st.integers(1, 5), min_size=1),
    ),
    st.builds(lambda: spaces.MultiDiscrete([[2, 3], [4, 1]])),
    st.builds(spaces.MultiBinary, st.sampled_from([3, [2, 2]])),
)
SPACES = st.recursive(
    LEAF_SPACES,
    lambda inner: st.one_of(
        st.builds(spaces.Tuple, st.lists(inner, min_size=1, max_size=3)),
        st.builds(spaces.Dict, st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@given(SPACES, st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=150)
def test_rows_flatten_as_gymnasium_flattens(space: spaces.Space[Any], seed: int) -> None:
    wire = pb.Space.FromString(space_to_wire(space).SerializeToString())
    assert space_from_wire(wire) == space
    codec = ObservationCodec(wire)
    space.seed(seed)
    for _ in range(3):
        sample = space.sample()
        rows = codec.unpack(codec.pack(sample), None)
        assert codec.refused_rows(rows) == {}
        expected = np.asarray(spaces.flatten(space, sample), np.float32)
        np.testing.assert_array_equal(codec.flatten(rows)[0], expected)


def codec_of(space: spaces.Space[Any]) -> ObservationCodec:
    return ObservationCodec(space_to_wire(space))


PAIR = spaces.Dict({"image": spaces.Box(0, 1, (2,), np.float32), "mode": spaces.Discrete(3, start=1)})
GOOD = {"image": np.zeros(2, np.float32), "mode": 1}


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ({"image": np.zeros(2)}, pb.OBSERVATION_FIELDS),
        (np.zeros(2), pb.OBSERVATION_FIELDS),
        ({**GOOD, "extra": 1}, pb.OBSERVATION_FIELDS),
        ({**GOOD, "mode": 1.5}, pb.OBSERVATION_DTYPE),
        ({**GOOD, "image": "dark"}, pb.OBSERVATION_DTYPE),
        ({**GOOD, "image": np.zeros(3)}, pb.OBSERVATION_SHAPE),
        ({**GOOD, "mode": [1]}, pb.OBSERVATION_SHAPE),
    ],
)
def test_packing_refuses_what_is_not_of_the_space(observation: Any, reason: int) -> None:
    with pytest.raises(WireError) as caught:
        codec_of(PAIR).pack(observation)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ({**GOOD, "image": np.array([0.5, np.nan])}, pb.OBSERVATION_NOT_FINITE),
        ({**GOOD, "image": np.array([0.5, np.inf])}, pb.OBSERVATION_NOT_FINITE),
        ({**GOOD, "image": np.array([0.5, 1.5])}, pb.OBSERVATION_OUT_OF_SPACE),
        ({**GOOD, "mode": 0}, pb.OBSERVATION_OUT_OF_SPACE),
        ({**GOOD, "mode": 4}, pb.OBSERVATION_OUT_OF_SPACE),
    ],
)
def test_values_outside_the_space_are_refused_row_by_row(observation: Any, reason: int) -> None:
    codec = codec_of(PAIR)
    good, bad = codec.unpack(codec.pack(GOOD), None), codec.unpack(codec.pack(observation), None)
    rows = {name: np.concatenate([good[name], bad[name], good[name]]) for name in good}
    refused = codec.refused_rows(rows)
    assert {row: error.reason for row, error in refused.items()} == {1: reason}


def test_absurd_shapes_and_values_are_refused_without_being_computed() -> None:
    codec = codec_of(spaces.Box(-np.inf, np.inf, (2,), np.float64))
    for shape in ([2**32 - 1] * 100_000, [0, 2**32 - 1], [0] + [2**32 - 1] * 31, [1] * 70, [2, 1], []):
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT64, shape=shape)
        with pytest.raises(WireError) as caught:
            codec.unpack([pb.NamedTensor(name="observation", tensor=tensor)], None)
        assert caught.value.reason == pb.OBSERVATION_SHAPE and len(str(caught.value)) < 1000
        with contextlib.suppress(WireError):  # An empty array of a strange shape is no error yet; nothing else may be.
            array_from_wire(tensor)
    (refused,) = codec.refused_rows(codec.unpack(codec.pack(np.array([0, 1e300])), None)).values()
    assert refused.reason == pb.OBSERVATION_NOT_FINITE and "1e+300" in str(refused)


def test_a_space_with_two_leaves_of_one_name_is_refused() -> None:
    with pytest.raises(WireError, match="several leaves named"):
        codec_of(spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}))


def test_a_list_of_observations_is_not_taken_for_columns() -> None:
    codec = codec_of(spaces.Tuple([spaces.Discrete(4), spaces.Discrete(2), spaces.Discrete(2)]))
    columns = (np.array([0, 2, 1]), np.array([1, 1, 0]), np.array([1, 0, 0]))
    assert len(codec.pack(columns, 3)) == 3
    with pytest.raises(WireError, match="got list, expected a tuple") as caught:
        codec.pack([(0, 1, 1), (2, 1, 0), (1, 0, 0)], 3)
    assert caught.value.reason == pb.OBSERVATION_FIELDS


def test_unpacking_refuses_unknown_repeated_and_missing_leaves() -> None:
    codec = codec_of(PAIR)
    image, mode = codec.pack(GOOD)
    other = pb.NamedTensor(name="other", tensor=image.tensor)
    for tensors in ([image, mode, other], [image, image, mode], [image]):
        with pytest.raises(WireError) as caught:
            codec.unpack(tensors, None)
        assert caught.value.reason == pb.OBSERVATION_FIELDS


def test_unpacking_refuses_truncated_bytes_and_wrong_row_counts() -> None:
    codec = codec_of(PAIR)
    image, mode = codec.pack(GOOD)
    cut = pb.NamedTensor(name="image", tensor=pb.Tensor(dtype=image.tensor.dtype, shape=[2], data=b"1234567"))
    for tensors, num_rows in (([cut, mode], None), ([image, mode], 2)):
        with pytest.raises(WireError) as caught:
            codec.unpack(tensors, num_rows)
        assert caught.value.reason == pb.OBSERVATION_SHAPE


def test_a_row_of_bytes_is_the_observation_without_its_names() -> None:
    codec = codec_of(PAIR)
    row = codec.pack_row(GOOD)
    assert codec.tensors(row, None) == codec.pack(GOOD)
    other = {**GOOD, "image": np.array([0.5, 0.25], np.float32)}
    columns = [a + b for a, b in zip(row, codec.pack_row(other), strict=True)]
    stacked = {name: np.stack([np.asarray(GOOD[name]), np.asarray(other[name])]) for name in GOOD}
    assert codec.tensors(columns, 2) == codec.pack(stacked, 2)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i4"])
def test_an_array_is_packed_by_value_whatever_its_dtype_and_layout(dtype: str) -> None:
    array = np.arange(6).reshape(3, 2).astype(dtype).T
    [data] = codec_of(spaces.Box(0, 9, (2, 3))).pack_row(array)
    assert data == np.array([[0, 2, 4], [1, 3, 5]], np.float32).tobytes()


def test_a_packed_array_is_not_the_callers() -> None:
    array = np.zeros(2, np.float32)
    [tensor] = codec_of(spaces.Box(-1, 1, (2,))).pack(array)
    array[:] = 1
    assert array_from_wire(tensor.tensor).tolist() == [0, 0]
