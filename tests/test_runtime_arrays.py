"""Torch to numpy and back: values, ownership, alignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergesfl.errors import ConfigError
from mergesfl.runtime.arrays import arrays_to_state, borrowed_tensor, state_to_arrays, to_array, to_tensor

CPU = torch.device("cpu")
DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("name", DTYPES)
def test_values_survive_both_ways(name: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(name)
    tensor = to_tensor(array, CPU)
    assert tensor.dtype == getattr(torch, name) and tensor.shape == (2, 3)
    back = to_array(tensor)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("offset_bytes", [0, 1, 4, 36])
def test_a_tensor_is_aligned_wherever_the_frame_begins(offset_bytes: int) -> None:
    """torch's allocator gives multiples of 64 bytes; np.ndarray over a buffer at an odd offset is not aligned."""
    memory = np.zeros(64 + 64 + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + offset_bytes  # from here on every address is 64 * k + offset
    values = np.arange(32, dtype=np.float32)
    memory[begin : begin + 128] = values.view(np.uint8)
    array = np.ndarray((4, 8), np.dtype("<f4"), buffer=memory.data, offset=begin)
    assert array.ctypes.data % 64 == offset_bytes
    array.flags.writeable = False
    tensor = to_tensor(array, CPU)
    assert tensor.data_ptr() % 64 == 0
    assert torch.equal(tensor, torch.arange(32.0).reshape(4, 8))
    memory[:] = 0
    assert torch.equal(tensor, torch.arange(32.0).reshape(4, 8))  # it owns its memory
    tensor += 1  # and may be written to, though the frame may not


@pytest.mark.parametrize("offset_bytes", [0, 4, 32])
def test_what_is_only_read_is_borrowed_where_it_is_aligned(offset_bytes: int) -> None:
    memory = np.zeros(256, np.uint8)
    begin = -memory.ctypes.data % 64 + offset_bytes
    array = np.ndarray((4, 8), np.float32, buffer=memory.data, offset=begin)
    array[:] = np.arange(32).reshape(4, 8)
    array.flags.writeable = False
    tensor = borrowed_tensor(array, CPU)
    assert torch.equal(tensor, torch.arange(32.0).reshape(4, 8)) and tensor.data_ptr() % 64 == 0
    assert (tensor.data_ptr() == array.ctypes.data) == (offset_bytes == 0)
    assert not array.flags.writeable


def test_read_only_memory_is_not_borrowed() -> None:
    array = np.frombuffer(bytes(128), np.float32)
    assert borrowed_tensor(array, CPU).data_ptr() != array.ctypes.data


def test_channels_last_stay_so_without_a_copy() -> None:
    tensor = torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    array = to_array(tensor)
    assert array.ctypes.data == tensor.data_ptr() and array.shape == (2, 3, 4, 5)
    back = to_tensor(array, CPU)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.data_ptr() != tensor.data_ptr()


def test_scalars_and_empty_arrays_keep_their_shape() -> None:
    assert torch.equal(to_tensor(np.array(7, np.int64), CPU), torch.tensor(7))
    assert to_tensor(np.array(7, np.int64), CPU).shape == ()
    assert to_array(torch.tensor(2.5)).shape == ()
    assert to_tensor(np.empty((0, 3), np.float32), CPU).shape == (0, 3)
    assert to_array(torch.empty(2, 0)).shape == (2, 0)


def test_a_view_that_is_not_contiguous_is_copied_and_a_contiguous_one_is_lent() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    turned = to_array(tensor.T)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, [[0, 3], [1, 4], [2, 5]])
    lent = to_array(tensor)
    tensor[0, 0] = 99
    assert lent[0, 0] == 99


def test_a_strided_array_comes_over_in_order() -> None:
    array = np.arange(12.0).reshape(3, 4)[:, ::2]
    assert torch.equal(to_tensor(array, CPU), torch.tensor([[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]], dtype=torch.float64))


def test_a_tensor_with_a_history_is_cut_from_it() -> None:
    weight = torch.ones(2, requires_grad=True)
    np.testing.assert_array_equal(to_array(weight * 3), [3, 3])


def test_bfloat16_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"torch.bfloat16 cannot be sent: convert the model to float32"):
        to_array(torch.zeros(2, dtype=torch.bfloat16))


def test_states_keep_names_and_order() -> None:
    state = {"b": torch.ones(2), "a": torch.tensor(3)}
    arrays = state_to_arrays(state)
    assert list(arrays) == ["b", "a"]
    back = arrays_to_state(arrays)
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[name], state[name]) for name in state)
    state["b"] += 1
    assert torch.equal(back["b"], torch.ones(2))
