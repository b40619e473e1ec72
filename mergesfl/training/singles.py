"""A batch of one sample through batch-norm.

Regulation gives slow workers batches of one, and non-IID workers may hold a single sample; batch-norm after a layer
that leaves one value per channel refuses to train on that. Legend: d samples, F... shape of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def forward_any(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), x (d, F...), also where d = 1 and the module trains with batch-norm: then the sample goes in twice.

    Mean loss and gradient are those of the one sample: both copies are normalised with their common statistics. [ours]
    """
    if x.shape[0] != 1 or not _has_training_batch_norm(module):
        return _tensor(module(x))
    return _tensor(module(torch.cat([x, x])))[:1]


def layer_with_batch_statistics(module: nn.Module) -> tuple[str, str] | None:
    """Name and kind of its first layer that computes something else when a batch comes in parts, if there is one.

    Batch-norm makes samples depend on each other; instance-norm does not, but its running statistics, if it has any,
    move once per forward.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False):
            return name, type(layer).__name__
    return None


def _has_training_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) and part.training for part in module.modules())


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor), f"a network returns one tensor, not {type(value).__name__}"
    return value
