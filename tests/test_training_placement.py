"""Placing changes the order of memory, and nothing that a caller can count on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from mergesfl.config import load_config
from mergesfl.models import build_model
from mergesfl.runtime.clock import WallClock
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from ps.progress import Progress
from ps.run import set_scene

CPU = torch.device("cpu")


def model() -> SplitModel:
    return build_model("cnn", None, (1, 28, 28), 10, seed=3)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [part for part in network.modules() if isinstance(part, nn.Conv2d)]


def test_on_a_cpu_the_channels_lie_last() -> None:
    placed = place(model(), CPU)
    assert all(part.weight.is_contiguous(memory_format=torch.channels_last) for part in convolutions(placed))
    assert len(convolutions(placed)) == 3


def test_elsewhere_they_stay_first() -> None:
    placed = place(place(model(), CPU), torch.device("meta"))
    assert all(part.weight.is_contiguous() for part in convolutions(placed))


def test_other_weights_have_no_such_order() -> None:
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3))
    assert all(parameter.is_contiguous() for parameter in place(network, CPU).parameters())


def test_names_values_and_parameters_stay() -> None:
    network, before = model(), model().joined_state_dict()
    parameters = [id(parameter) for parameter in network.parameters()]
    assert place(network, CPU) is network
    assert [id(parameter) for parameter in network.parameters()] == parameters  # an optimiser still finds them
    after = network.joined_state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("num_samples", [1, 16])
def test_the_function_stays_but_for_the_last_bits(num_samples: int) -> None:
    x = torch.randn(num_samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # (d, 1, 28, 28)
    plain, placed = model().eval(), place(model(), CPU).eval()
    torch.testing.assert_close(placed(x), plain(x), rtol=1e-5, atol=1e-6)
    assert placed.bottom(x).shape == plain.bottom(x).shape


def test_what_a_run_evaluates_is_placed(tmp_path: Path) -> None:
    config = load_config(None, [f"output.folder={tmp_path}"])
    scene = set_scene(config, "iid", WallClock(), Progress(Console(quiet=True)))
    assert all(part.weight.is_contiguous(memory_format=torch.channels_last) for part in convolutions(scene.network))
