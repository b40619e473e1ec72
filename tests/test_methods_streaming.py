"""Tops that take features as they arrive, against the same tops with all features at once; who may, and who may not.

Legend: d_i samples of worker i, D their sum, F features of a sample, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError
from mergesfl.methods import METHODS, check_streaming
from mergesfl.methods.base import MethodSettings, StepFeatures
from mergesfl.methods.merged_top import MergedTop
from mergesfl.methods.smofi import FusedMomentumTops
from mergesfl.methods.split_program import StreamingTop, TopTrainer
from mergesfl.methods.splitfed_v1 import TopPerWorker
from mergesfl.training.dropout import replace_dropout
from mergesfl.training.split import SplitModel

torch.set_num_threads(1)

BATCH_SIZES = {"a": 1, "b": 4, "c": 2}
ORDERS = ([["a", "b", "c"]], [["c"], ["a", "b"]], [["b"], ["c"], ["a"]])
SETTINGS = MethodSettings(0, 2, 8, 3, 0.1, 0.99, 0.005, (4,))


def small_top(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
    return replace_dropout(nn.Sequential(*layers)).train()


def features_of(step: int) -> dict[str, StepFeatures]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: StepFeatures(
            name, torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)
        )
        for name, size in BATCH_SIZES.items()
    }


def streamed(
    top: nn.Module, trainer: StreamingTop, groups: Sequence[Sequence[str]], in_order: bool = False
) -> list[Tensor]:
    """Three steps in these groups; every gradient by worker, all losses, the top."""
    trainer.open(list(BATCH_SIZES), 0.3)
    results = []
    for step in range(3):
        trainer.begin_step(BATCH_SIZES, seed=step, in_order=in_order)
        features, gradients = features_of(step), {}
        for group in groups:
            gradients |= dict(zip(group, trainer.feed([features[name] for name in group]), strict=True))
        results += [gradients[name] for name in BATCH_SIZES]
        results.append(torch.tensor(trainer.end_step(), dtype=torch.float64))
    trainer.close(dict.fromkeys(BATCH_SIZES, 1.0))
    return [*results, *top.state_dict().values()]


def at_once(top: nn.Module, trainer: TopTrainer) -> list[Tensor]:
    """The same with the features of each step all at once."""
    trainer.open(list(BATCH_SIZES), 0.3)
    results = []
    for step in range(3):
        gradients, loss_nats = trainer.step(list(features_of(step).values()), seed=step)
        results += [*gradients, torch.tensor(loss_nats, dtype=torch.float64)]
    trainer.close(dict.fromkeys(BATCH_SIZES, 1.0))
    return [*results, *top.state_dict().values()]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("groups", ORDERS)
@pytest.mark.parametrize("in_order", [False, True])
def test_the_merged_top_streams_to_the_same_step(
    groups: Sequence[Sequence[str]], momentum: float, in_order: bool
) -> None:
    tops = [small_top(dropout=0.0), small_top(dropout=0.0)]
    expected = at_once(tops[0], MergedTop(tops[0], momentum))
    found = streamed(tops[1], MergedTop(tops[1], momentum), groups, in_order)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


TOPS: dict[str, Callable[[nn.Module], MergedTop | TopPerWorker]] = {
    "merged": MergedTop,
    "momentum": lambda top: MergedTop(top, 0.9),
    "per worker": TopPerWorker,
    "fused": lambda top: FusedMomentumTops(top, 0.9),
}


@pytest.mark.parametrize("kind", TOPS)
def test_in_order_the_order_of_arrival_leaves_no_bit_with_dropout_too(kind: str) -> None:
    results = []
    for groups in ORDERS:
        top = small_top(dropout=0.5)
        results.append(streamed(top, TOPS[kind](top), groups, in_order=True))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_dropout_masks_do_not_depend_on_who_has_arrived() -> None:
    """Not in order either: what a worker gets back in the first step is the same, whatever the groups."""
    results = []
    for groups in ORDERS:
        top = small_top(dropout=0.5)
        results.append(streamed(top, MergedTop(top), groups)[:3])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    top = small_top(dropout=0.5)
    assert not same_bits(results[0], at_once(top, MergedTop(top))[:3])  # these are drawn over the merged batch


@pytest.mark.parametrize("kind", ["per worker", "fused"])
def test_a_top_for_each_worker_streams_to_the_same_bits(kind: str) -> None:
    """Dropout included: their masks were drawn per worker always."""
    tops = [small_top(dropout=0.5), small_top(dropout=0.5)]
    assert same_bits(at_once(tops[0], TOPS[kind](tops[0])), streamed(tops[1], TOPS[kind](tops[1]), ORDERS[2]))


def test_a_lone_worker_streams_to_the_bits_of_the_merged_step_with_dropout() -> None:
    tops = [small_top(dropout=0.5), small_top(dropout=0.5)]
    one, other = MergedTop(tops[0]), MergedTop(tops[1])
    lone = features_of(0)["b"]
    for trainer in (one, other):
        trainer.open(["b"], 0.3)
    gradients, loss_nats = one.step([lone], seed=5)
    other.begin_step({"b": 4}, seed=5, in_order=False)
    assert torch.equal(other.feed([lone])[0], gradients[0])
    assert other.end_step() == loss_nats
    assert same_bits(list(tops[0].state_dict().values()), list(tops[1].state_dict().values()))


def network(*above: nn.Module) -> SplitModel:
    return SplitModel(nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Sequential(*above, nn.Linear(6, 3))), "0")


STREAMING = {"mergesfl", "mergesfl+", "minibatch-sfl", "gpsl", "splitfed-v1", "smofi"}


@pytest.mark.parametrize("method", METHODS)
def test_who_streams(method: str) -> None:
    if method in STREAMING:
        check_streaming(method, network(), SETTINGS)
        return
    expected = f"'{method}' needs all features .* training.merge = 'barrier'.*: gpsl, mergesfl, mergesfl\\+, minibatch"
    with pytest.raises(ConfigError, match=expected):
        check_streaming(method, network(), SETTINGS)


@pytest.mark.parametrize("method", ["mergesfl", "mergesfl+", "minibatch-sfl", "gpsl"])
def test_batch_norm_in_a_merged_top_is_refused_with_the_next_step(method: str) -> None:
    with pytest.raises(
        ConfigError, match=r"cut '0' holds batch-norm, .* set training.merge = 'barrier', or cut behind"
    ):
        check_streaming(method, network(nn.BatchNorm1d(6)), SETTINGS)


def test_batch_norm_in_a_top_for_each_worker_is_no_obstacle() -> None:
    check_streaming("splitfed-v1", network(nn.BatchNorm1d(6)), SETTINGS)
    check_streaming("mergesfl", network(nn.BatchNorm1d(6)), MethodSettings(0, 2, 8, 3, 0.1, 0.99, 0.005, (4,), False))


def test_logit_adjustment_by_the_merged_batch_is_refused() -> None:
    adjusted = MethodSettings(0, 2, 8, 3, 0.1, 0.99, 0.005, (4,), logit_adjustment=True)
    with pytest.raises(ConfigError, match=r"method.logit_adjustment = true .* set training.merge = 'barrier'"):
        check_streaming("mergesfl+", network(), adjusted)
