"""Finite or not, where the sum is no proof too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergesfl.training.finite import all_finite

INFINITE, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(0), True),
        (torch.tensor([1, 2]), True),
        (torch.tensor(True), True),
        (torch.full((1000,), LARGEST), True),  # their sum is infinite
        (torch.tensor([LARGEST, LARGEST, -LARGEST]), True),
        (torch.full((70_000,), 60_000.0, dtype=torch.float16), True),
        (torch.tensor([INFINITE, -INFINITE]), False),
        (torch.tensor([LARGEST, LARGEST, NAN]), False),
    ],
)
def test_by_hand(tensor: Tensor, expected: bool) -> None:
    assert all_finite(tensor) is expected


@pytest.mark.parametrize("wrong", [INFINITE, -INFINITE, NAN])
@pytest.mark.parametrize("place", [0, 1, 4098])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_wrong_element_is_found_wherever_it_is(wrong: float, place: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 1367, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[min(place, 4100)] = wrong
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())
