"""AlexNet for small images [code]: five convolutions 3x3, three pools, three fully connected layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

# Output channels of each convolution (with ReLU), "pool" for a max-pool 2 [code].
FEATURES: tuple[int | str, ...] = (64, "pool", 192, "pool", 384, 256, 256, "pool")
HIDDEN_UNITS = 4096  # [code]
DROPOUT = 0.5  # [code]


def build_alexnet(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Samples (channels, height, width), height and width at least 8 -> logits (C,).

    The tensor at the default cut "features" is (256, height // 8, width // 8): for CIFAR-10 (256, 4, 4), 16384 bytes in
    fp32. Returns logits; the public code appends a log-softmax, which cross-entropy does itself.
    """
    channels, height, width = sample_shape
    if min(height, width) < 8:
        raise ValueError("height and width must be at least 8 for three pools")
    features: list[nn.Module] = []
    for entry in FEATURES:
        if isinstance(entry, str):
            features.append(nn.MaxPool2d(2))
        else:
            features += [nn.Conv2d(channels, entry, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            channels = entry
    classifier = nn.Sequential(
        nn.Dropout(DROPOUT),
        nn.Linear(channels * (height // 8) * (width // 8), HIDDEN_UNITS),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS),
        nn.ReLU(),
        nn.Linear(HIDDEN_UNITS, num_classes),
    )
    named = OrderedDict(features=nn.Sequential(*features), flatten=nn.Flatten(), classifier=classifier)
    return nn.Sequential(OrderedDict(named))
