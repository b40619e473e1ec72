"""The CNN of the HAR task [code], for any (channels, height, width): HAR (1, 128, 9), Fashion-MNIST, digits.

Three convolutions 3x3 of 12, 32, 64 channels with ReLU, max-pool 2 after the first and the second (no third pool
in the public code), FC 1024, dropout, FC C.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

CHANNELS = (12, 32, 64)  # [code]
HIDDEN_UNITS = 1024  # [code]
DROPOUT = 0.5  # [code]


def build_cnn(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Samples (channels, height, width) -> logits (C,). A pool leaves alone a dimension that is 1 already [ours].

    The tensor at the default cut "conv2" is (32, height // 4, width // 4); for HAR (32, 32, 2), 8192 bytes in fp32.
    """
    channels, height, width = sample_shape
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for index, num_filters in enumerate(CHANNELS):
        layers: list[nn.Module] = [nn.Conv2d(channels, num_filters, kernel_size=3, padding=1), nn.ReLU()]
        if index < 2:
            pool = (min(2, height), min(2, width))
            layers.append(nn.MaxPool2d(pool))
            height, width = height // pool[0], width // pool[1]
        blocks[f"conv{index + 1}"] = nn.Sequential(*layers)
        channels = num_filters
    blocks["flatten"] = nn.Flatten()
    blocks["classifier"] = nn.Sequential(
        nn.Linear(channels * height * width, HIDDEN_UNITS),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN_UNITS, num_classes),
    )
    return nn.Sequential(blocks)
