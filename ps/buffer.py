"""The memory in which a step's features are merged: one for a run, kept from step to step and from round to round.

Features are decoded to their place in it when they arrive. Where places lie one behind the other, whoever joins them
(mergesfl/training/merging.py) has the merged batch already and copies nothing.

Every place begins at a multiple of 64 bytes, as memory does that torch allocates: kernels choose their path by
alignment, and the last bit must not depend on neighbours. So behind features that end elsewhere there is a gap, and
they are joined by a copy. And every place lies in the order in which its own features came, in C order or channels
last: joined with others of another order they are copied, to C order, whoever came first.

Legend: d_i samples of worker i in one step, or in one part of it, F... shape of one sample at the cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergesfl.methods.base import StepFeatures
from mergesfl.runtime.arrays import ALIGNMENT_BYTES

ALIGNMENT = ALIGNMENT_BYTES // torch.float32.itemsize  # in numbers


def room_of(shape: tuple[int, ...]) -> int:
    """Numbers from the begin of a place of this shape (d_i, F...) to where the next may begin."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


class MergeBuffer:
    """Float32 numbers in main memory. Nobody reads a place after its step, and no worker is sent one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32)

    def reserve(self, num_numbers: int) -> None:
        """Grows to so many, if there are fewer; nothing of what is in it is kept then."""
        if self._memory.numel() < num_numbers:
            self._memory = torch.empty(0, dtype=torch.float32)  # the old one goes first
            self._memory = torch.empty(num_numbers, dtype=torch.float32)

    def place(self, begin: int, shape: tuple[int, ...], channels_last: bool) -> Tensor:
        """(d_i, F...) from this number on, a multiple of ALIGNMENT; channels_last: of (n, c, h, w)."""
        assert begin + math.prod(shape) <= self._memory.numel(), "what a plan takes was reserved"
        return self._memory.as_strided(shape, _strides_of(shape[1:], channels_last), begin)


@functools.cache
def _strides_of(sample_shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Of (d_i, F...) in memory, whatever d_i."""
    size = math.prod(sample_shape)
    if channels_last:
        channels, _, width = sample_shape
        return size, 1, width * channels, channels
    return size, *(math.prod(sample_shape[axis:]) for axis in range(1, len(sample_shape) + 1))


def on_device(arrived: Sequence[StepFeatures], device: torch.device) -> list[StepFeatures]:
    """What lies in places of one buffer, on a device: moved there at once, with what lies between them."""
    if device.type == "cpu" or not arrived:
        return list(arrived)
    places, sizes = [one.features for one in arrived], [len(one.labels) for one in arrived]
    begin = min(place.storage_offset() for place in places)
    end = max(place.storage_offset() + place.numel() for place in places)
    whole = places[0].as_strided((end - begin,), (1,), begin).to(device)
    features = [whole.as_strided(place.shape, place.stride(), place.storage_offset() - begin) for place in places]
    labels = torch.split(torch.cat([one.labels for one in arrived]).to(device), sizes)
    return [StepFeatures(one.worker_id, z, y, one.part) for one, z, y in zip(arrived, features, labels, strict=True)]
