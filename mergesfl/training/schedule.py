"""Learning rate per round and the optimiser, as in the authors' public code [code]."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

INITIAL_LEARNING_RATE = 0.1  # [code]
DECAY_PER_ROUND = 0.993  # [code]
MINIMUM_LEARNING_RATE = 0.005  # [code]


def learning_rate(
    round_num: int,
    initial: float = INITIAL_LEARNING_RATE,
    decay: float = DECAY_PER_ROUND,
    minimum: float = MINIMUM_LEARNING_RATE,
) -> float:
    """max(minimum, initial * decay ** round_num); round_num counts from 0. [code]"""
    return max(minimum, initial * decay**round_num)


def make_sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.SGD:
    """Plain SGD: no momentum, no weight decay [code]. Identity (c) of the method holds for no other optimiser."""
    return torch.optim.SGD(params, lr=lr, momentum=0.0, weight_decay=0.0)
