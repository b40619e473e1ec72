"""torchvision networks cut at named layers: every family, both modes, equal to the bit."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import nn

from mergesfl.errors import ConfigError
from mergesfl.models import build_model, build_network
from mergesfl.training.cuts import cut_table, list_cuts
from mergesfl.training.dropout import SeededDropout, seed_dropout
from mergesfl.training.split import SplitModel

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'mergesfl[vision]'")
torch.set_num_threads(1)

EVERY_CUT = ("resnet18", "squeezenet1_1")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 64),
        ("resnet18", 33),
        ("squeezenet1_1", 33),
        ("mobilenet_v2", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_b0", 32),
        ("densenet121", 32),
        ("shufflenet_v2_x0_5", 32),
        ("googlenet", 32),
        ("regnet_y_400mf", 32),
        ("convnext_tiny", 32),
        ("mnasnet0_5", 32),
        ("swin_t", 32),
        ("vit_b_32", 32),
    ],
)
def test_equal_in_both_modes(name: str, size: int) -> None:
    """One network of each family: a cut in the middle and the last one; every cut of the two named here."""
    net = build_network(f"torchvision:{name}", (3, size, size), 4, seed=0)
    assert not any(isinstance(m, torchvision.ops.StochasticDepth) for m in net.modules())
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    cuts = list_cuts(net)
    buffers = copy.deepcopy(dict(net.named_buffers()))

    def run(model: nn.Module, parts: list[nn.Module]) -> list[torch.Tensor]:
        for part in parts:
            seed_dropout(part, 3)
        with torch.no_grad():
            for key, value in net.named_buffers():
                value.copy_(buffers[key])
            return [model.train()(x), model.eval()(x), *(value.clone() for value in net.buffers())]

    expected = run(net, [net])
    for cut in cuts if name in EVERY_CUT else (cuts[len(cuts) // 2], cuts[-1]):
        model = SplitModel(net, cut)
        found = run(model, [model.bottom, model.top])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), cut
        assert list(model.joined_state_dict()) == list(net.state_dict())


def test_stochastic_depth_is_seeded_and_has_torchvisions_rate() -> None:
    net = build_network("torchvision:convnext_tiny", (3, 32, 32), 4, seed=0)
    reference = torchvision.models.convnext_tiny(weights=None)
    rates = [m.p for m in reference.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    layers = [m for m in net.modules() if isinstance(m, SeededDropout)]
    assert [layer.p for layer in layers] == rates and max(rates) > 0
    assert {layer.mask for layer in layers} == {"sample"}


def test_weights_are_those_of_torchvision_under_that_seed() -> None:
    net = build_network("torchvision:resnet18", (3, 33, 33), 4, seed=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        reference = torchvision.models.resnet18(weights=None, num_classes=4).state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in net.state_dict().items())


def test_resnet18_sizes_by_hand() -> None:
    """layer2 of 3x64x64: 64 -> 32 (stem) -> 16 (pool) -> 16 (layer1) -> 8 (layer2), 128 channels, fp32.

    Below: conv1 9408 + bn1 128 + layer1 4 * 64*64*9 + 4 * 128 = 147968, + layer2 525568 = 683072.
    layer2: 64*128*9 + 3 * 128*128*9 + 64*128 + 5 * 256 = 73728 + 442368 + 8192 + 1280 = 525568.
    """
    net = build_network("torchvision:resnet18", (3, 64, 64), 10, seed=0)
    row = next(row for row in cut_table(net, (3, 64, 64)) if row.name == "layer2")
    assert (row.feature_shape, row.feature_bytes_per_sample) == ((128, 8, 8), 128 * 8 * 8 * 4)
    assert row.num_params_bottom == 683_072
    assert row.num_params_bottom + row.num_params_top == sum(p.numel() for p in net.parameters())


def test_any_number_of_channels() -> None:
    model = build_model("torchvision:resnet18@layer1", None, (1, 28, 28), 10, 0)
    assert model.joined_state_dict()["conv1.weight"].shape == (64, 1, 7, 7)
    assert model.feature_shape((1, 28, 28)) == (64, 7, 7)
    assert model.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "sample_shape", "message"),
    [
        ("torchvision:resnet188@layer1", (3, 32, 32), "unknown torchvision model 'resnet188': did you mean 'resnet18'"),
        ("torchvision:resnet18", (3, 32, 32), "no default cut.*legal cuts: conv1, bn1"),
        ("torchvision:resnet18@layer1.0.bn2", (3, 32, 32), "'layer1.0.bn2' of ResNet is not legal: a second value"),
        (
            "torchvision:resnet18@layer1",
            (1, 128),
            r"takes samples \(channels, height, width\).*the data has \(1, 128\)",
        ),
        ("torchvision:alexnet@features", (3, 28, 28), r"the data has \(3, 28, 28\)"),
        ("torchvision:vit_b_32@encoder.ln", (3, 32, 64), "square"),
        ("torchvision:vit_b_32@encoder.ln", (3, 40, 40), r"the data has \(3, 40, 40\)"),
        ("torchvision:maxvit_t@stem", (3, 33, 33), r"the data has \(3, 33, 33\)"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, sample_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, None, sample_shape, 10, 0)


def test_without_torchvision_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torchvision":
            raise ImportError("No module named 'torchvision'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'mergesfl\[vision\]'"):
        build_model("torchvision:resnet18@layer1", None, (3, 32, 32), 10, 0)
