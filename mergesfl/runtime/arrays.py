"""Between torch (what we compute with) and numpy (what the wire carries)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergesfl.errors import ConfigError

Array = NDArray[np.generic]


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


def state_to_arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """`to_array` of every entry."""
    return {name: to_array(tensor) for name, tensor in state.items()}


def arrays_to_state(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """`to_tensor` of every entry, in main memory."""
    cpu = torch.device("cpu")
    return {name: to_tensor(array, cpu) for name, array in arrays.items()}
