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
from mergesfl.methods.base import Assignment, MethodSettings, StepFeatures
from mergesfl.methods.merged_top import MergedTop
from mergesfl.methods.smofi import FusedMomentumTops
from mergesfl.methods.split_program import (
    StreamingTop,
    TopTrainer,
    check_parts,
    seed_of_part,
    seed_of_turn,
    work,
)
from mergesfl.methods.splitfed_v1 import TopPerWorker
from mergesfl.parts import part_sizes
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


@pytest.mark.parametrize(
    ("in_order", "elsewhere", "num_forwards"),
    [(False, False, 6), (True, False, 9), (False, True, 9)],  # of three steps in two groups, of three workers
)
def test_what_is_there_goes_through_the_top_together_with_dropout_too(
    in_order: bool, elsewhere: bool, num_forwards: int
) -> None:
    """All ways come to the same numbers; only in order, or on several ranks, one by one."""
    results, counts = [], []
    for dropout, one_by_one in ((0.5, in_order), (0.5, True)):
        top = SplitModel(nn.Sequential(nn.Linear(4, 4), small_top(dropout)), "0").top.train()
        lengths: list[int] = []
        top.register_forward_pre_hook(lambda _, inputs, lengths=lengths: lengths.append(len(inputs[0])))
        if elsewhere:
            top.train_through(top.compute)
        results.append(streamed(top, MergedTop(top), ORDERS[1], one_by_one))
        counts.append(len(lengths))
    assert counts == [num_forwards, 9]
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


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


def network_below(layer: nn.Module) -> SplitModel:
    return SplitModel(nn.Sequential(nn.Sequential(nn.Linear(4, 6), layer), nn.Linear(6, 3)), "0")


STREAMING = {"mergesfl", "mergesfl+", "minibatch-sfl", "gpsl", "splitfed-v1", "smofi"}


@pytest.mark.parametrize("method", METHODS)
def test_who_streams(method: str) -> None:
    if method in STREAMING:
        check_streaming(method, network(), SETTINGS)
        return
    expected = f"'{method}' needs all features .* training.merge = 'barrier'.*: gpsl, mergesfl, mergesfl\\+, minibatch"
    with pytest.raises(ConfigError, match=expected):
        check_streaming(method, network(), SETTINGS)


def instance_norm(track_running_stats: bool) -> nn.Module:
    """One channel of six values: (d, 6) -> (d, 6)."""
    norm = nn.InstanceNorm1d(1, track_running_stats=track_running_stats)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), norm, nn.Flatten())


MIXING = [(nn.BatchNorm1d(6), "BatchNorm1d"), (instance_norm(True), "InstanceNorm1d")]


@pytest.mark.parametrize("method", ["mergesfl", "mergesfl+", "minibatch-sfl", "gpsl"])
@pytest.mark.parametrize(("layer", "kind"), MIXING)
def test_batch_statistics_in_a_merged_top_are_refused_with_the_next_step(
    method: str, layer: nn.Module, kind: str
) -> None:
    text = rf"cut '0' holds the layer '1.*' \({kind}\), .* set training.merge = 'barrier', or cut behind"
    with pytest.raises(ConfigError, match=text):
        check_streaming(method, network(layer), SETTINGS)


def test_instance_norm_without_running_statistics_is_no_obstacle() -> None:
    check_streaming("mergesfl", network(instance_norm(False)), SETTINGS)
    check_parts(network_below(instance_norm(False)), 2)


def test_batch_norm_in_a_top_for_each_worker_is_no_obstacle() -> None:
    check_streaming("splitfed-v1", network(nn.BatchNorm1d(6)), SETTINGS)
    check_streaming("mergesfl", network(nn.BatchNorm1d(6)), MethodSettings(0, 2, 8, 3, 0.1, 0.99, 0.005, (4,), False))


def test_logit_adjustment_by_the_merged_batch_is_refused() -> None:
    adjusted = MethodSettings(0, 2, 8, 3, 0.1, 0.99, 0.005, (4,), logit_adjustment=True)
    with pytest.raises(ConfigError, match=r"method.logit_adjustment = true .* set training.merge = 'barrier'"):
        check_streaming("mergesfl+", network(), adjusted)


# Batches in parts.


def in_parts_of(one: StepFeatures, parts_per_step: int) -> list[StepFeatures]:
    sizes = list(part_sizes(len(one.labels), parts_per_step))
    pieces = zip(torch.split(one.features, sizes), torch.split(one.labels, sizes), strict=True)
    return [StepFeatures(one.worker_id, z, y, part) for part, (z, y) in enumerate(pieces)]


def streamed_in_parts(
    top: nn.Module, trainer: StreamingTop, order: Callable[[StepFeatures], object], in_order: bool, group: int = 1
) -> list[Tensor]:
    """As `streamed`, each batch in up to three parts, in this order and in groups of so many parts."""
    trainer.open(list(BATCH_SIZES), 0.3)
    results = []
    for step in range(3):
        trainer.begin_step(BATCH_SIZES, seed=step, in_order=in_order)
        pieces = sorted((piece for one in features_of(step).values() for piece in in_parts_of(one, 3)), key=order)
        gradients: dict[str, list[Tensor]] = {name: [] for name in BATCH_SIZES}
        for begin in range(0, len(pieces), group):
            fed = pieces[begin : begin + group]
            for piece, gradient in zip(fed, trainer.feed(fed), strict=True):
                gradients[piece.worker_id].append(gradient)
        results += [torch.cat(gradients[name]) for name in BATCH_SIZES]
        results.append(torch.tensor(trainer.end_step(), dtype=torch.float64))
    trainer.close(dict.fromkeys(BATCH_SIZES, 1.0))
    return [*results, *top.state_dict().values()]


# Parts of one worker always come in their order.
PART_ORDERS: tuple[Callable[[StepFeatures], object], ...] = (
    lambda one: (one.worker_id, one.part),
    lambda one: (one.part, one.worker_id),
    lambda one: (one.part, -ord(one.worker_id)),
)


@pytest.mark.parametrize("kind", TOPS)
@pytest.mark.parametrize("order", PART_ORDERS)
@pytest.mark.parametrize(("in_order", "group"), [(False, 1), (False, 4), (True, 1)])
def test_in_parts_every_top_trains_what_it_trains_at_once(
    kind: str, order: Callable[[StepFeatures], object], in_order: bool, group: int
) -> None:
    """Gradients, losses, tops, momentum; without dropout."""
    tops = [small_top(dropout=0.0), small_top(dropout=0.0)]
    expected = at_once(tops[0], TOPS[kind](tops[0]))
    found = streamed_in_parts(tops[1], TOPS[kind](tops[1]), order, in_order, group)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TOPS)
def test_in_parts_and_in_order_the_order_of_arrival_leaves_no_bit_with_dropout_too(kind: str) -> None:
    results = []
    for order in PART_ORDERS:
        top = small_top(dropout=0.5)
        results.append(streamed_in_parts(top, TOPS[kind](top), order, in_order=True))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    unsplit = small_top(dropout=0.5)
    assert not same_bits(results[0], streamed(unsplit, TOPS[kind](unsplit), ORDERS[0], in_order=True))  # other masks


def test_a_top_of_its_own_counts_what_was_fed_of_a_lost_worker_by_hand() -> None:
    """Of b's four samples only the first part of two comes: the mean loss is over the 1 + 2 + 2 samples that came."""
    tops = [small_top(dropout=0.0), small_top(dropout=0.0)]
    trainer, reference = TopPerWorker(tops[0]), TopPerWorker(tops[1])
    features = features_of(0)
    half = in_parts_of(features["b"], 2)[0]
    for one in (trainer, reference):
        one.open(list(BATCH_SIZES), 0.3)
    trainer.begin_step(BATCH_SIZES, seed=0, in_order=False)
    trainer.feed([features["a"], half, features["c"]])
    alone = StepFeatures("b", half.features, half.labels)
    _, loss_nats = reference.step([features["a"], alone, features["c"]], seed=0)
    assert trainer.end_step() == pytest.approx(loss_nats, abs=1e-6)


@pytest.mark.parametrize(("layer", "kind"), MIXING)
def test_halves_with_batch_statistics_are_refused_in_parts_with_the_next_step(layer: nn.Module, kind: str) -> None:
    check_parts(network_below(layer), 1)
    check_parts(network(layer), 1)
    below = rf"the bottom before the cut '0' holds the layer '0\.1.*' \({kind}\)"
    with pytest.raises(ConfigError, match=rf"parts_per_step = 2, but {below}, .* = 1, or cut before the first"):
        check_parts(network_below(layer), 2)
    above = rf"the top after the cut '0' holds the layer '1\.0.*' \({kind}\)"
    with pytest.raises(ConfigError, match=rf"parts_per_step = 4, but {above}, .* = 1, or cut behind the last"):
        check_parts(network(layer), 4)


def test_a_top_of_its_own_with_batch_norm_would_send_other_gradients_in_parts() -> None:
    """Why it is refused, although such a top may stream."""
    found = []
    for parts_per_step in (1, 2):
        torch.manual_seed(0)
        trainer = TopPerWorker(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
        trainer.open(["b"], 0.3)
        trainer.begin_step({"b": 4}, seed=0, in_order=False)
        pieces = in_parts_of(features_of(0)["b"], parts_per_step)
        found.append(torch.cat([trainer.feed([piece])[0] for piece in pieces]))
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_running_statistics_of_instance_norm_differ_in_parts() -> None:
    """Why they are refused: the samples do not depend on each other, but each forward moves the statistics."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    whole, parts = instance_norm(True), instance_norm(True)
    z = whole(x)
    torch.testing.assert_close(torch.cat([parts(x[:2]), parts(x[2:])]), z)
    means = [next(half.buffers()) for half in (whole, parts)]
    assert not torch.allclose(means[0], means[1], rtol=1e-3)


# The worker's side.


def worked(parts_per_step: int, dropout: float, seed: int = 3) -> tuple[dict[str, Tensor], list[int]]:
    """Two steps of `work` in float64 with a quadratic loss, 1/2 mean over the batch of |z|^2; the rows of each part.

    Its gradient is z / d: of a part its rows, divided by all d = 5.
    """
    torch.manual_seed(0)
    below = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 5))
    model = SplitModel(replace_dropout(nn.Sequential(below, nn.Linear(5, 3))).double(), "0")
    settings = {"learning_rate": 0.5, "proximal": 0.1}
    state = {name: tensor.clone() for name, tensor in model.bottom.state_dict().items()}
    rows: list[int] = []
    waiting: list[int] = []  # numbers of those that were sent and not waited for

    def exchange(step: int, z: Tensor, y: Tensor) -> Callable[[], Tensor]:
        number = len(rows)
        rows.append(len(y))
        waiting.append(number)

        def wait() -> Tensor:
            assert waiting.pop(0) == number, "waited for in the order in which they were sent"
            return z / 5

        return wait

    generator = torch.Generator().manual_seed(1)
    batches = ((torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.arange(5)) for _ in range(9))
    assignment = Assignment(0, 2, 5, settings, state, seed, parts_per_step)
    result = work(model, assignment, batches, exchange)
    assert result.num_samples == 10 and not waiting
    return result.state, rows


@pytest.mark.parametrize(("parts_per_step", "rows"), [(2, [3, 2]), (3, [2, 2, 1]), (8, [1] * 5)])
def test_the_bottom_steps_once_per_step_with_the_sum_over_its_parts(parts_per_step: int, rows: list[int]) -> None:
    expected, whole = worked(1, dropout=0.0)
    found, split = worked(parts_per_step, dropout=0.0)
    assert (whole, split) == ([5, 5], rows * 2)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-12), name


def test_masks_of_the_bottom_are_drawn_per_part_and_repeat() -> None:
    one, again, other, unsplit = (worked(parts, 0.5, seed)[0] for parts, seed in ((2, 3), (2, 3), (2, 4), (1, 3)))
    name = "0.0.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], unsplit[name])


def test_seeds_of_parts() -> None:
    """The first part has the masks of an unsplit batch; all others are unrelated to it and to each other."""
    assert seed_of_part(5, 0) == 5 and seed_of_turn(5, "a", 3, 0) == seed_of_turn(5, "a", 3)
    seeds = [seed_of_turn(5, name, num, part) for name in "ab" for num in (1, 3) for part in range(3)]
    assert len(set(seeds)) == len(seeds) - 3  # a lone worker's do not depend on its name
