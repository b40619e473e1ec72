"""Numpy array <-> one raw frame: the elements, little-endian, in C order or channels last, and nothing else. [ours]

Channels last: of an array (n, c, h, w) the elements in the order of (n, h, w, c), as torch's convolutions on a CPU
leave them. Sent as they lie they need not be put in order, and back again at the other end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mergesfl.protocol.limits import Limits
from mergesfl.protocol.messages import Array
from mergesfl.protocol.rules import IllegalValue, shape, shown

# No object and no complex arrays. bfloat16 is unknown to numpy: its codec sends the bits.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # axes of (n, h, w, c) in (n, c, h, w), and back
_NAME_OF = {order: name for name, dtype in DTYPES.items() for order in (dtype, dtype.newbyteorder())}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """numpy's name of a dtype, whatever its byte order; looked up, because numpy makes it anew every time."""
    return _NAME_OF.get(dtype) or dtype.name


def checked(what: str, array: object, limits: Limits) -> Array:
    """The array, if it may be sent."""
    if not isinstance(array, np.ndarray):
        raise IllegalValue(f"{what} is {shown(array)}, expected a numpy array (torch: tensor.detach().cpu().numpy())")
    if dtype_name(array.dtype) not in DTYPES:
        raise IllegalValue(f"{what} has the type {array.dtype}, legal are {', '.join(DTYPES)}")
    if array.ndim > limits.max_tensor_rank:
        raise IllegalValue(f"{what} has {array.ndim} dimensions, the limit is {limits.max_tensor_rank}")
    _extent_bytes(array.shape, array.dtype, limits)
    return array


def is_channels_last(array: Array) -> bool:
    """Whether the memory of this array (n, c, h, w) is that of a C-contiguous (n, h, w, c), and not C-contiguous."""
    return array.ndim == 4 and not array.flags.c_contiguous and array.transpose(_LAST).flags.c_contiguous


def lent(array: Array) -> tuple[memoryview, bool]:
    """The memory of the array as bytes, and whether its channels come last in it.

    Copied only if it is neither C-contiguous nor channels last, or not little-endian.
    """
    channels_last = is_channels_last(array)
    plain = array.transpose(_LAST) if channels_last else array
    plain = np.ascontiguousarray(plain, dtype=DTYPES[dtype_name(array.dtype)])
    return plain.reshape(-1).view(np.uint8).data, channels_last


class Extent(NamedTuple):
    """What a tensor frame holds, as it was announced and found legal."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    memory_shape: tuple[int, ...]  # (n, h, w, c) if channels_last
    channels_last: bool
    num_bytes: int


def extent_of(type_name: object, dimensions: object, channels_last: object, limits: Limits) -> Extent:
    """The extent that a spec announces, of which nothing is known yet."""
    if type(type_name) is not str or type_name not in DTYPES:
        raise IllegalValue(f"tensor of type {shown(type_name)}, legal are {', '.join(DTYPES)}")
    dtype = DTYPES[type_name]
    extent = shape(dimensions, limits)
    num_bytes = _extent_bytes(extent, dtype, limits)
    if type(channels_last) is not bool or (channels_last and len(extent) != 4):
        raise IllegalValue(
            f"tensor {type_name} {list(extent)} with channels last {shown(channels_last)}, "
            "expected a bool, and True only of 4 dimensions"
        )
    memory_shape = tuple(extent[axis] for axis in _LAST) if channels_last else extent
    return Extent(dtype, extent, memory_shape, channels_last, num_bytes)


def viewed(frame: memoryview, extent: Extent) -> Array:
    """The read-only array of this extent in a frame of which nothing is known yet."""
    dtype, shape, memory_shape, channels_last, num_bytes = extent
    if frame.nbytes != num_bytes:
        raise IllegalValue(f"tensor {dtype} {list(shape)} needs {num_bytes} bytes, its frame has {frame.nbytes}")
    array: Array = np.ndarray(memory_shape, dtype, buffer=frame)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    if dtype is DTYPES["bool"] and array.view(np.uint8).max(initial=0) > 1:
        raise IllegalValue("tensor of type bool with an element that is neither 0 nor 1")
    return array.transpose(_FIRST) if channels_last else array


def _extent_bytes(extent: tuple[int, ...], dtype: np.dtype[Any], limits: Limits) -> int:
    """What the elements take, if a message may be so large. Python ints: no overflow.

    Empty dimensions count as 1 in the check, because numpy's own size check also skips them.
    """
    num_elements = math.prod(extent)
    checked_elements = num_elements or math.prod([max(dimension, 1) for dimension in extent])
    if checked_elements * dtype.itemsize > limits.max_message_bytes:
        raise IllegalValue(f"tensor {dtype} {list(extent)} exceeds {limits.max_message_bytes} bytes")
    return num_elements * dtype.itemsize
