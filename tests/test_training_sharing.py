"""One top shared by workers: gradients, weights of the step, and mix-ups, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergesfl.training.mixup import mix_halves, mixed_cross_entropy
from mergesfl.training.sharing import backward_share

torch.set_num_threads(1)


def test_shares_add_up_and_the_gradient_that_goes_back_has_none() -> None:
    """top.grad = 0.25 * gradient of the one + 0.75 * gradient of the other; dL/dz is that of the mean loss alone."""
    top = nn.Linear(3, 2).double()
    generator = torch.Generator().manual_seed(0)
    zs = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (2, 5)]  # (d, F)
    ys = [torch.tensor([0, 1]), torch.tensor([1, 1, 0, 1, 0])]
    results = [backward_share(top, z, y, share) for z, y, share in zip(zs, ys, (0.25, 0.75), strict=True)]
    expected = torch.zeros_like(top.weight)
    for z, y, share, result in zip(zs, ys, (0.25, 0.75), results, strict=True):
        leaf = z.clone().requires_grad_()
        loss = functional.cross_entropy(top(leaf), y)
        of_weight, of_z = torch.autograd.grad(loss, [top.weight, leaf])
        expected += share * of_weight
        assert torch.allclose(result.gradient, of_z, rtol=0, atol=1e-14)
        assert result.loss_nats == pytest.approx(loss.item(), abs=1e-14)
    assert top.weight.grad is not None and torch.allclose(top.weight.grad, expected, rtol=0, atol=1e-14)
    assert all(z.grad is None and not z.requires_grad for z in zs)  # what arrived is left alone


def test_mixing_halves_by_hand() -> None:
    """Three samples with two: the first two of each, (1 + 5) / 2 = 3 and (2 + 8) / 2 = 5."""
    own, other = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[5.0], [8.0]])
    assert mix_halves(own, other).tolist() == mix_halves(other, own).tolist() == [[3.0], [5.0]]


def test_mixed_cross_entropy_is_that_of_the_soft_label() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # (m, C)
    own, other = torch.tensor([0, 3, 1]), torch.tensor([2, 3])
    soft = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(mixed_cross_entropy(logits, own, other), functional.cross_entropy(logits, soft))


def test_mixed_cross_entropy_by_hand() -> None:
    """Logits (ln 3, 0): p = (3/4, 1/4); half on each label: -0.5 ln(3/4) - 0.5 ln(1/4) = 0.5 ln(16/3)."""
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    loss = mixed_cross_entropy(logits, torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(0.5 * math.log(16 / 3))
