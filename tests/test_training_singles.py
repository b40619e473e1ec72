"""Batches of one through batch-norm: no crash, and the identity for everything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mergesfl.models import build_model
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.merging import single_step
from mergesfl.training.schedule import make_sgd
from mergesfl.training.singles import forward_any


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_plain_torch_refuses_one_sample_and_we_do_not() -> None:
    net, x = normed(), torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(x)
    y = forward_any(net, x)
    assert y.shape == (1, 2)
    # Both copies are the mean, so batch-norm gives its bias (0) and the output is the bias of the last layer.
    torch.testing.assert_close(y[0], net[2].bias)


def test_larger_batches_evaluation_and_networks_without_batch_norm_are_left_alone() -> None:
    net, x = normed(), torch.randn(2, 3, dtype=torch.float64)
    reference = normed()
    assert torch.equal(forward_any(net, x), reference(x))
    assert torch.equal(forward_any(net.eval(), x[:1]), reference.eval()(x[:1]))
    plain, seen = nn.Linear(3, 2).double(), []
    plain.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    forward_any(plain, x[:1])
    assert seen == [1]


def test_a_residual_top_steps_on_one_sample() -> None:
    """The case that matters: resnet18 cut at layer2, 3 x 32 x 32, where layer4 leaves 1 x 1."""
    model = build_model("torchvision:resnet18@layer2", None, (3, 32, 32), 10, seed=0)
    model.train()
    seed_dropout(model.top, 0)
    z = torch.randn(1, *model.feature_shape((3, 32, 32)))
    step = single_step(model.top, make_sgd(model.top.parameters(), 0.1), z, torch.tensor([3]))
    assert step.gradient.shape == z.shape
    assert torch.isfinite(step.gradient).all()
