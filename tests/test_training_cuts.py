"""Sizes at the cuts, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError
from mergesfl.training.cuts import CutSize, cut_table, output_shape


def test_table_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 2))
    # conv: 4 * 9 + 4 = 40 parameters; linear: 36 * 5 + 5 = 185; last: 5 * 2 + 2 = 12. 8x8 -> 6x6 -> 3x3.
    assert cut_table(net, (1, 8, 8)) == [
        CutSize("0", (4, 6, 6), 576, 40, 197),
        CutSize("1", (4, 3, 3), 144, 40, 197),
        CutSize("2", (36,), 144, 40, 197),
        CutSize("3", (5,), 20, 225, 12),
    ]


def test_tables_leave_no_trace() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    cut_table(net, (3,))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(not module._forward_hooks for module in net.modules())
    assert net.training and not net[1].training
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


def test_a_sample_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sample of shape \(4,\) does not fit Linear"):
        output_shape(nn.Linear(3, 2), (4,))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_two_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="returns a tuple, expected one tensor"):
        output_shape(Pair(), (4,))
