"""The contract of tenuto: the generated messages, numpy arrays and gymnasium spaces on the wire, and error reasons."""

from tenuto_proto.errors import WireError
from tenuto_proto.observation import ObservationCodec
from tenuto_proto.spaces import space_from_wire, space_to_wire
from tenuto_proto.tensors import array_from_wire, array_to_wire, write_array

__all__ = [
    "ObservationCodec",
    "WireError",
    "array_from_wire",
    "array_to_wire",
    "space_from_wire",
    "space_to_wire",
    "write_array",
]
