"""From stored numbers (uint8 pixels, int16 sound, float32 signals) to the float32 input of a network.

Legend: d samples of a batch, K channels (first axis of a sample), H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Scale:
    """input = (stored / divisor - mean) / std, per channel; and how training batches are augmented before that.

    Attributes:
        divisor: 255 for pixels, 32,768 for 16-bit sound, 1 for numbers that are used as they are.
        mean: (K,) subtracted per channel after the division; () subtracts nothing.
        std: (K,) divides after that; () divides by nothing. Given exactly when mean is.
        flip: training images are mirrored left-right with probability 1/2.
        crop_padding_pixels: training images are padded with zeros on all four sides and cut back at a random place.
    """

    divisor: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    crop_padding_pixels: int = 0

    @property
    def augments(self) -> bool:
        """Whether training batches are augmented at all."""
        return self.flip or self.crop_padding_pixels > 0

    def to_input(self, stored: Array) -> torch.Tensor:
        """The network's input, float32 of the same shape; owns its memory.

        Args:
            stored: (d, *sample_shape), any of the dtypes of Split.x.
        """
        x = torch.from_numpy(np.array(stored, dtype=np.float32, order="C"))  # (d, *sample_shape), a copy
        if self.divisor != 1.0:
            x.div_(self.divisor)
        if self.mean:
            per_channel = (1, len(self.mean)) + (1,) * (x.ndim - 2)
            mean = torch.tensor(self.mean, dtype=torch.float32).view(per_channel)  # (1, K, 1, ...)
            std = torch.tensor(self.std, dtype=torch.float32).view(per_channel)  # (1, K, 1, ...)
            x.sub_(mean).div_(std)
        return x

    def augmented(self, stored: Array, generator: np.random.Generator) -> Array:
        """A randomly cropped and mirrored copy of a batch of stored images, each sample with its own draw.

        The padding is zero in stored numbers, i.e. black, as torchvision's RandomCrop pads before it normalises.

        Args:
            stored: (d, K, H, W).
            generator: the only source of chance; draws d tops, d lefts and d coins when both are switched on.
        """
        num_samples, num_channels, height, width = stored.shape
        pad = self.crop_padding_pixels
        rows: Array = np.tile(np.arange(height), (num_samples, 1))  # (d, H)
        columns: Array = np.tile(np.arange(width), (num_samples, 1))  # (d, W)
        if pad:
            rows += generator.integers(0, 2 * pad + 1, size=(num_samples, 1))
            columns += generator.integers(0, 2 * pad + 1, size=(num_samples, 1))
            stored = np.pad(stored, ((0, 0), (0, 0), (pad, pad), (pad, pad)))  # (d, K, H + 2 pad, W + 2 pad)
        if self.flip:
            mirrored = np.asarray(generator.random((num_samples, 1)) < 0.5)  # (d, 1)
            columns = np.where(mirrored, columns[:, ::-1], columns)
        sample = np.arange(num_samples)[:, None, None, None]
        channel = np.arange(num_channels)[None, :, None, None]
        return stored[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]  # (d, K, H, W)


IDENTITY = Scale()
PIXELS = Scale(divisor=255.0)
SOUND = Scale(divisor=32768.0)  # full scale of 16-bit PCM


def scale_of(dtype: np.dtype[Any]) -> Scale:
    """The scale of numbers nothing else is known about: pixels when uint8, sound when int16, else as is. [ours]"""
    if dtype == np.uint8:
        return PIXELS
    return SOUND if dtype == np.int16 else IDENTITY
