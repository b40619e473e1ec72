"""VGG16 with batch-norm for IMAGE-100 [code]: thirteen convolutions 3x3, five pools, three fully connected layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

# Output channels of the convolutions before each pool [code].
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
PADDED_STAGE = 3  # the fourth pool has padding 1 [code]: 18 -> 10 -> 5, which is how 144x144 comes to 5x5
HIDDEN_UNITS = 4096  # [code]
DROPOUT = 0.5  # [code]


def pooled_size(size: int) -> int:
    """Height or width after the five pools: 144 -> 5; 0 when the image is too small."""
    for stage in range(len(STAGES)):
        size = size // 2 + 1 if stage == PADDED_STAGE else size // 2
    return size


def build_vgg16(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Samples (channels, height, width), height and width at least 16 -> logits (C,).

    The tensor at the default cut "features" is (512, 5, 5) for (3, 144, 144): 51200 bytes in fp32.
    """
    channels, height, width = sample_shape
    size = (pooled_size(height), pooled_size(width))
    if min(size) < 1:
        raise ValueError("height and width must be at least 16 for five pools")
    features: list[nn.Module] = []
    for stage, widths in enumerate(STAGES):
        for num_filters in widths:
            features += [
                nn.Conv2d(channels, num_filters, kernel_size=3, padding=1),
                nn.BatchNorm2d(num_filters),
                nn.ReLU(inplace=True),
            ]
            channels = num_filters
        features.append(nn.MaxPool2d(2, padding=1 if stage == PADDED_STAGE else 0))
    classifier = nn.Sequential(
        nn.Linear(channels * size[0] * size[1], HIDDEN_UNITS),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN_UNITS, num_classes),
    )
    named = OrderedDict(features=nn.Sequential(*features), flatten=nn.Flatten(), classifier=classifier)
    return nn.Sequential(OrderedDict(named))
