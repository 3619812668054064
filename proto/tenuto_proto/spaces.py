"""Gymnasium spaces on the wire. Gymnasium is imported only when a space is converted, never to read the message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tenuto_proto.errors import WireError
from tenuto_proto.tensors import DTYPES, WIRE_DTYPES, array_from_wire, array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb

if TYPE_CHECKING:
    from gymnasium import Space


def space_to_wire(space: Space[Any]) -> pb.Space:
    """Describe a gymnasium space. Raises WireError (OBSERVATION_FIELDS) for a kind without a fixed size."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return pb.Space(box=pb.BoxSpace(low=array_to_wire(space.low), high=array_to_wire(space.high)))
    if isinstance(space, spaces.Discrete):
        dtype = WIRE_DTYPES[np.dtype(space.dtype)]
        return pb.Space(discrete=pb.DiscreteSpace(n=int(space.n), start=int(space.start), dtype=dtype))
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = array_to_wire(space.nvec), array_to_wire(space.start)
        dtype = WIRE_DTYPES[np.dtype(space.dtype)]
        return pb.Space(multi_discrete=pb.MultiDiscreteSpace(nvec=nvec, start=start, dtype=dtype))
    if isinstance(space, spaces.MultiBinary):
        return pb.Space(multi_binary=pb.MultiBinarySpace(shape=space.shape))
    if isinstance(space, spaces.Tuple):
        return pb.Space(tuple=pb.TupleSpace(spaces=[space_to_wire(s) for s in space.spaces]))
    if isinstance(space, spaces.Dict):
        entries = [pb.DictSpace.Entry(key=str(k), space=space_to_wire(s)) for k, s in space.spaces.items()]
        return pb.Space(dict=pb.DictSpace(entries=entries))
    raise WireError(
        pb.OBSERVATION_FIELDS,
        f"space: got {type(space).__name__}, expected Box, Discrete, MultiDiscrete, MultiBinary, Tuple or Dict",
    )


def space_from_wire(space: pb.Space) -> Space[Any]:
    """Rebuild the gymnasium space. Raises WireError (OBSERVATION_FIELDS) for an empty message."""
    from gymnasium import spaces

    kind = space.WhichOneof("kind")
    if kind == "box":
        low, high = array_from_wire(space.box.low), array_from_wire(space.box.high)
        return spaces.Box(low, high, low.shape, low.dtype.type)
    if kind == "discrete":
        d = space.discrete
        return spaces.Discrete(d.n, start=d.start, dtype=DTYPES[d.dtype].type)
    if kind == "multi_discrete":
        m = space.multi_discrete
        return spaces.MultiDiscrete(array_from_wire(m.nvec), dtype=DTYPES[m.dtype].type, start=array_from_wire(m.start))
    if kind == "multi_binary":
        shape = list(space.multi_binary.shape)
        # A one-dimensional MultiBinary equals only one that was made from a number.
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "tuple":
        return spaces.Tuple([space_from_wire(s) for s in space.tuple.spaces])
    if kind == "dict":
        return spaces.Dict([(e.key, space_from_wire(e.space)) for e in space.dict.entries])
    raise WireError(pb.OBSERVATION_FIELDS, "space: got an empty message, expected one kind of space")
