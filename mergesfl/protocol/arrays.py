"""Numpy array <-> one raw frame: the elements, little-endian, in C order, and nothing else. [ours]"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
    _check_extent(array.shape, array.dtype, limits)
    return array


def lent(array: Array) -> memoryview:
    """The memory of the array as bytes; copied only if it is not C-contiguous or not little-endian."""
    plain = np.ascontiguousarray(array, dtype=DTYPES[dtype_name(array.dtype)])
    return plain.reshape(-1).view(np.uint8).data


def viewed(frame: memoryview, type_name: object, dimensions: object, limits: Limits) -> Array:
    """The read-only array in a frame of which nothing is known yet."""
    if type(type_name) is not str or type_name not in DTYPES:
        raise IllegalValue(f"tensor of type {shown(type_name)}, legal are {', '.join(DTYPES)}")
    dtype = DTYPES[type_name]
    extent = shape(dimensions, limits)
    _check_extent(extent, dtype, limits)
    num_bytes = math.prod(extent) * dtype.itemsize
    if frame.nbytes != num_bytes:
        raise IllegalValue(f"tensor {type_name} {list(extent)} needs {num_bytes} bytes, its frame has {frame.nbytes}")
    array: Array = np.ndarray(extent, dtype, buffer=frame)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    if type_name == "bool" and array.view(np.uint8).max(initial=0) > 1:
        raise IllegalValue("tensor of type bool with an element that is neither 0 nor 1")
    return array


def _check_extent(extent: tuple[int, ...], dtype: np.dtype[Any], limits: Limits) -> None:
    """Python ints: no overflow. Empty dimensions count as 1, because numpy's own size check also skips them."""
    num_elements = math.prod(extent) or math.prod(max(dimension, 1) for dimension in extent)
    num_bytes = num_elements * dtype.itemsize
    if num_bytes > limits.max_message_bytes:
        raise IllegalValue(f"tensor {dtype} {list(extent)} exceeds {limits.max_message_bytes} bytes")
