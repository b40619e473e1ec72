"""M5 for raw audio [code]: Dai et al., Very deep convolutional neural networks for raw waveforms, arXiv 1610.00087."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

# (output channels, kernel, stride) of the four blocks [code]; each is followed by batch-norm, ReLU, max-pool 4.
BLOCKS = ((32, 80, 16), (32, 3, 1), (64, 3, 1), (64, 3, 1))
POOL = 4  # [code]


def build_m5(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Samples (channels, num_steps) -> logits (C,); at least 6848 steps, else nothing is left after the last pool.

    The tensor at the default cut "block3" is (64, 14) for 16,000 steps: 3584 bytes in fp32. The network returns logits;
    the public code appends a log-softmax, which cross-entropy does itself.
    """
    channels, _ = sample_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (num_filters, kernel, stride) in enumerate(BLOCKS):
        layers[f"block{index + 1}"] = nn.Sequential(
            nn.Conv1d(channels, num_filters, kernel_size=kernel, stride=stride),
            nn.BatchNorm1d(num_filters),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(POOL),
        )
        channels = num_filters
    layers["average"] = nn.AdaptiveAvgPool1d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
