"""Between torch (what we compute with) and numpy (what the wire carries)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergesfl.errors import ConfigError
from mergesfl.protocol.arrays import is_channels_last

Array = NDArray[np.generic]
ALIGNMENT_BYTES = 64  # of memory that torch allocates (c10/core/alignment.h)


def to_array(tensor: Tensor) -> Array:
    """An array with the values of the tensor, C-contiguous or, if the tensor (n, c, h, w) is so, channels last.

    It shares memory with such a tensor in main memory. Raises ConfigError for a dtype that numpy lacks (bfloat16,
    float8).
    """
    tensor = tensor.detach().to("cpu")
    if not (tensor.is_contiguous() or _is_channels_last(tensor)):
        tensor = tensor.contiguous()
    try:
        array: Array = tensor.numpy()
    except TypeError:
        raise ConfigError(f"a tensor of {tensor.dtype} cannot be sent: convert the model to float32") from None
    return array


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """A tensor that owns its memory, aligned by torch: the bytes of a received frame may begin anywhere, and kernels
    that choose their path by alignment would make the last bit depend on the transport. Channels last where the array
    is so."""
    tensor = _empty(array.shape, array.dtype, is_channels_last(array))
    np.copyto(tensor.numpy(), array)
    return tensor.to(device)


def borrowed_tensor(array: Array, device: torch.device) -> Tensor:
    """`to_tensor` of what is only read: it shares the array's memory where that is aligned as torch aligns its own."""
    view = array.view()
    try:
        view.flags.writeable = True  # torch knows no read-only tensors, and warns of a read-only array
    except ValueError:
        return to_tensor(array, device)
    tensor = torch.from_numpy(view)
    return to_tensor(array, device) if tensor.data_ptr() % ALIGNMENT_BYTES else tensor.to(device)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...], dtype: np.dtype[np.generic], channels_last: bool) -> Tensor:
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=_torch_type(dtype), memory_format=order)


@functools.cache
def _torch_type(dtype: np.dtype[np.generic]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def state_to_arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """`to_array` of every entry."""
    return {name: to_array(tensor) for name, tensor in state.items()}


def borrowed_state(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`borrowed_tensor` of every entry, in main memory."""
    cpu = torch.device("cpu")
    return {name: borrowed_tensor(array, cpu) for name, array in arrays.items()}


def arrays_to_state(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`to_tensor` of every entry, in main memory."""
    cpu = torch.device("cpu")
    return {name: to_tensor(array, cpu) for name, array in arrays.items()}
