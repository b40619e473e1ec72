"""Between torch (what we compute with) and numpy (what the wire carries)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergesfl.errors import ConfigError

Array = NDArray[np.generic]
ALIGNMENT_BYTES = 64  # of memory that torch allocates (c10/core/alignment.h)


def to_array(tensor: Tensor) -> Array:
    """A contiguous array with the values of the tensor; it shares memory with a contiguous tensor in main memory.

    Raises ConfigError for a dtype that numpy lacks (bfloat16, float8).
    """
    try:
        array: Array = tensor.detach().to("cpu").contiguous().numpy()
    except TypeError:
        raise ConfigError(f"a tensor of {tensor.dtype} cannot be sent: convert the model to float32") from None
    return array


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """A tensor that owns its memory, aligned by torch: the bytes of a received frame may begin anywhere, and kernels
    that choose their path by alignment would make the last bit depend on the transport."""
    tensor = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
    np.copyto(tensor.numpy(), array)
    return tensor.to(device)


def to_tensors(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """`to_tensor` of each, (d_i, F...) with equal F... and dtype: consecutive slices of ONE new tensor (D, F...).

    Whoever joins them again along the first dimension has nothing to copy: see training/merging.py. Where a slice would
    not be aligned as torch aligns, every tensor has memory of its own: the last bit must not depend on its neighbours.
    """
    if not arrays or any(array.nbytes % ALIGNMENT_BYTES for array in arrays):
        return [to_tensor(array, device) for array in arrays]
    num_rows = sum(len(array) for array in arrays)
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    whole = torch.empty((num_rows, *arrays[0].shape[1:]), dtype=dtype)  # (D, F...)
    np.concatenate(arrays, out=whole.numpy())
    return list(torch.split(whole.to(device), [len(array) for array in arrays]))


def state_to_arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """`to_array` of every entry."""
    return {name: to_array(tensor) for name, tensor in state.items()}


def arrays_to_state(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`to_tensor` of every entry, in main memory."""
    cpu = torch.device("cpu")
    return {name: to_tensor(array, cpu) for name, array in arrays.items()}
