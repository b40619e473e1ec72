"""Learning rate and optimiser of the public code, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mergesfl.training.schedule import learning_rate, make_sgd


def test_rate_by_hand() -> None:
    assert learning_rate(0) == 0.1
    assert learning_rate(1) == pytest.approx(0.0993)
    assert learning_rate(2) == pytest.approx(0.0986049)  # 0.1 * 0.993 * 0.993
    # 0.1 * 0.993**r <= 0.005 where r >= ln 0.05 / ln 0.993 = -2.995732 / -0.0070246 = 426.46: from round 427 on.
    assert learning_rate(426) > 0.005
    assert learning_rate(427) == 0.005
    assert learning_rate(10_000) == 0.005


def test_rate_with_other_settings() -> None:
    assert [learning_rate(r, 1.0, 0.5, 0.2) for r in range(4)] == [1.0, 0.5, 0.25, 0.2]


def test_sgd_by_hand() -> None:
    """Plain steps: 1 - 0.5 * 2 = 0, then 0 - 0.5 * 2 = -1; momentum would go further the second time."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    sgd = make_sgd([parameter], 0.5)
    for expected in (0.0, -1.0):
        parameter.grad = torch.tensor([2.0])
        sgd.step()
        assert parameter.item() == expected
