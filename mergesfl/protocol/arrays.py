"""Numpy array <-> raw bytes: the elements, little-endian, in C order or channels last, and nothing else. [ours]

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
BOOL = DTYPES["bool"]

_LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # axes of (n, h, w, c) in (n, c, h, w), and back


class Extent(NamedTuple):
    """What a tensor holds, as it was announced and found legal."""

    dtype: np.dtype[Any]  # little-endian
    shape: tuple[int, ...]
    memory_shape: tuple[int, ...]  # (n, h, w, c) if channels_last
    channels_last: bool
    num_bytes: int


def is_channels_last(array: Array) -> bool:
    """Whether the memory of this array (n, c, h, w) is that of a C-contiguous (n, h, w, c), and not C-contiguous."""
    return array.ndim == 4 and not array.flags.c_contiguous and array.transpose(_LAST).flags.c_contiguous


def legal_extent(
    what: str, dtype: np.dtype[Any], shape: tuple[int, ...], channels_last: bool, limits: Limits
) -> Extent:
    """The extent of an array of ours, if it may be sent. Raises IllegalValue."""
    if dtype.name not in DTYPES:
        raise IllegalValue(f"{what} has the type {dtype}, legal are {', '.join(DTYPES)}")
    if len(shape) > limits.max_tensor_rank:
        raise IllegalValue(f"{what} has {len(shape)} dimensions, the limit is {limits.max_tensor_rank}")
    return _extent(DTYPES[dtype.name], shape, channels_last, limits)


def extent_of(type_name: object, dimensions: object, channels_last: object, limits: Limits) -> Extent:
    """The extent that a spec announces, of which nothing is known yet. Raises IllegalValue."""
    if type(type_name) is not str or type_name not in DTYPES:
        raise IllegalValue(f"tensor of type {shown(type_name)}, legal are {', '.join(DTYPES)}")
    checked_shape = shape(dimensions, limits)
    if type(channels_last) is not bool or (channels_last and len(checked_shape) != 4):
        raise IllegalValue(
            f"tensor {type_name} {list(checked_shape)} with channels last {shown(channels_last)}, "
            "expected a bool, and True only of 4 dimensions"
        )
    return _extent(DTYPES[type_name], checked_shape, channels_last, limits)


def is_in_order(array: Array, extent: Extent) -> bool:
    """Whether the array's memory is what is sent of it: follows from its type, shape and strides."""
    return array.flags.c_contiguous and array.dtype == extent.dtype


def as_it_lies(array: Array, extent: Extent) -> Array:
    """The array as a C-contiguous one of the memory shape, little-endian; copied only if it is not already so."""
    plain = array.transpose(_LAST) if extent.channels_last else array
    return np.ascontiguousarray(plain, dtype=extent.dtype)


def framed(frame: bytes | bytearray | memoryview, extent: Extent) -> Array:
    """The read-only array of the memory shape in a frame of which nothing is known yet. Raises IllegalValue."""
    view = memoryview(frame).toreadonly()
    if view.nbytes != extent.num_bytes:
        found = f"tensor {extent.dtype} {list(extent.shape)} needs {extent.num_bytes} bytes"
        raise IllegalValue(f"{found}, its frame has {view.nbytes}")
    array: Array = np.ndarray(extent.memory_shape, extent.dtype, view)
    if not array.flags.aligned:
        array = array.copy()
        array.setflags(write=False)
    return array


def check_bools(array: Array) -> None:
    """Raises IllegalValue for a byte that is no bool."""
    if array.view(np.uint8).max(initial=0) > 1:
        raise IllegalValue("tensor of type bool with an element that is neither 0 nor 1")


def _extent(dtype: np.dtype[Any], shape: tuple[int, ...], channels_last: bool, limits: Limits) -> Extent:
    """Raises IllegalValue for what no message holds. Python ints: no overflow.

    Empty dimensions count as 1 in the check, because numpy's own size check also skips them.
    """
    num_elements = math.prod(shape)
    checked_elements = num_elements or math.prod([max(dimension, 1) for dimension in shape])
    if checked_elements * dtype.itemsize > limits.max_message_bytes:
        raise IllegalValue(f"tensor {dtype} {list(shape)} exceeds {limits.max_message_bytes} bytes")
    memory_shape = tuple(shape[axis] for axis in _LAST) if channels_last else shape
    return Extent(dtype, shape, memory_shape, channels_last, num_elements * dtype.itemsize)
