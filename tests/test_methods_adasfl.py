"""AdaSFL against copies that are averaged step by step, its plan by hand, and over memory.

Legend: d_i samples of worker i in one step, D their sum, n_i of its data set.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.control.speed_shares import plan_by_speed
from mergesfl.errors import ConfigError
from mergesfl.methods.adasfl import LOSSES, adapted_num_steps
from mergesfl.models.initial import build_seeded
from mergesfl.seeding import generator_for
from mergesfl.training.split import SplitModel
from tests.memory_cluster import MEASURED, checkpoint_of, journal_of, play_daemons, same_tensors, small_config, without
from tests.pretend_cluster import (
    PretendCluster,
    assert_close,
    assert_equal,
    average_into,
    descend,
    plan_of,
    settings_of,
    small_cluster,
    small_shares,
)

torch.set_num_threads(1)

NUM_SAMPLES = {"a": 9, "b": 30, "c": 14}
SIZES = {"a": 4, "b": 2, "c": 6}  # d_i: the weights, in other proportions than n_i


def network_with_batch_norm() -> nn.Sequential:
    """float64, samples (1, 4, 4), features (3, 2, 2), batch-norm above the cut."""

    def build() -> nn.Module:
        below = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2))
        above = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        return nn.Sequential(below, above)

    net = build_seeded(build, 0).double()
    assert isinstance(net, nn.Sequential)
    return net


def copies_round(net: nn.Sequential, cluster: PretendCluster, round_num: int, rate: float) -> float:
    """One round of three steps with a real copy of the top per worker, in place; the mean loss in nats."""
    batches = cluster.batches_of(plan_of(SIZES, 3, round_num))
    sizes = list(SIZES.values())
    bottoms, top, losses_nats = [copy.deepcopy(net[0]) for _ in sizes], net[1], []
    for step in range(3):
        tops, loss_nats = [copy.deepcopy(top) for _ in sizes], 0.0
        for i, (bottom, own) in enumerate(zip(bottoms, tops, strict=True)):
            x, y = batches[i][step]
            loss = functional.cross_entropy(own(bottom(x)), y)
            parameters = [*bottom.parameters(), *own.parameters()]
            descend(parameters, torch.autograd.grad(loss, parameters), rate)
            loss_nats += loss.item() * sizes[i] / 12  # D = 12
        counted = tops[0].state_dict()["2.num_batches_tracked"]
        average_into(top, tops, sizes)
        top.load_state_dict({"2.num_batches_tracked": counted}, strict=False)  # an integer is not averaged
        losses_nats.append(loss_nats)
    average_into(net[0], bottoms, sizes)
    return sum(losses_nats) / 3


def test_two_rounds_equal_copies_that_are_averaged_in_every_step() -> None:
    """Also the running means of batch-norm: those of the copies, averaged with d_i / D."""
    net = network_with_batch_norm()
    cluster = PretendCluster("adasfl", SplitModel(copy.deepcopy(net), "0"), settings_of(), small_shares(NUM_SAMPLES))
    for round_num in range(2):
        expected_nats = copies_round(net, cluster, round_num, 0.3 * 0.9**round_num)
        assert cluster.play(plan_of(SIZES, 3, round_num)) == pytest.approx(expected_nats, abs=1e-12)
        assert_close(cluster.parameters(), net.state_dict())
    assert int(cluster.parameters()["1.2.num_batches_tracked"]) == 6  # steps, not steps times workers


def test_without_batch_norm_it_trains_as_on_the_merged_batch() -> None:
    """sum_i d_i / D * (w - eta g_i) = w - eta * gradient of the mean loss over all D samples."""
    averaged, merged = (small_cluster(name, settings_of(), NUM_SAMPLES) for name in ("adasfl", "mergesfl"))
    for round_num in range(2):
        plan = plan_of(SIZES, 3, round_num)
        assert averaged.play(plan) == pytest.approx(merged.play(plan), abs=1e-12)
        assert_close(averaged.parameters(), merged.parameters())


def test_a_dropped_worker_is_left_out_of_the_average_from_then_on() -> None:
    """With b gone before its second step, the rest equals a round that the merged top finishes without it."""
    averaged, merged = (small_cluster(name, settings_of(), NUM_SAMPLES) for name in ("adasfl", "mergesfl"))
    for cluster in (averaged, merged):
        cluster.play(plan_of(SIZES, 3), {"b": 1})
    assert_close(averaged.parameters(), merged.parameters())


# The plan.


def fleet_of_speeds(milliseconds: dict[str, float | None], num_samples: int = 100) -> FleetView:
    workers = [
        WorkerView(name, num_samples, (num_samples, 0, 0), None if t is None else 0.75e-3 * t, 0.25e-3 * (t or 0.0))
        for name, t in milliseconds.items()
    ]
    return FleetView(tuple(workers), 48)


def test_batch_sizes_by_hand() -> None:
    """t = 2, 3, 11, 2 ms: 16 * 2/2 = 16, 16 * 2/3 = 10.67, 16 * 2/11 = 2.9, and 16 again."""
    fleet = fleet_of_speeds({"a": 2.0, "b": 3.0, "c": 11.0, "d": 2.0})
    plan = plan_by_speed(3, fleet, 4, 16, 5, generator_for(0, "plan"))
    assert plan.worker_ids == ("a", "b", "c", "d") and plan.batch_sizes == (16, 10, 2, 16)
    assert (plan.round_num, plan.num_steps, plan.num_exchanges) == (3, 5, 5)
    assert plan.predicted_seconds == pytest.approx((0.160, 0.150, 0.110, 0.160))  # 5 steps * d_i * t_i
    assert plan.ingress_bytes_per_step == 44 * 48


def test_the_fastest_of_those_drawn_gets_the_largest_batch() -> None:
    fleet = fleet_of_speeds({f"w{i}": float(i + 1) for i in range(8)})
    drawn = set()
    for seed in range(20):
        plan = plan_by_speed(0, fleet, 3, 16, 5, generator_for(seed, "plan"))
        times = [int(name[1:]) + 1 for name in plan.worker_ids]
        assert list(plan.batch_sizes) == [max(1, 16 * min(times) // t) for t in times]
        drawn |= set(plan.worker_ids)
    assert len(drawn) == 8


def test_a_worker_without_samples_is_never_drawn_and_no_batch_exceeds_the_data() -> None:
    fleet = fleet_of_speeds({"a": 1.0, "b": 1.0, "c": None})
    poor = (replace(fleet.workers[0], num_samples=3, label_counts=(3, 0, 0)), fleet.workers[1])
    none = replace(fleet.workers[2], num_samples=0, label_counts=(0, 0, 0))
    plan = plan_by_speed(0, FleetView((*poor, none), 48), 3, 16, 5, generator_for(0, "plan"))
    assert plan.worker_ids == ("a", "b") and plan.batch_sizes == (3, 16)
    with pytest.raises(ConfigError, match="0 participants, expected at least 1"):
        plan_by_speed(0, fleet, 0, 16, 5, generator_for(0, "plan"))


# The number of local steps.


@pytest.mark.parametrize(
    ("first_nats", "last_nats", "expected"),
    [
        (2.0, 2.0, 10),
        (2.0, 0.5, 5),  # sqrt(1/4) = 1/2
        (2.0, 1.0, 8),  # 10 * 0.7071 = 7.07, rounded up
        (2.0, 8.0, 10),  # never more than asked for
        (2.0, 1e-9, 1),
        (2.0, 0.0, 1),
        (0.0, 1.0, 10),  # nothing to measure by
    ],
)
def test_the_number_of_steps_by_hand(first_nats: float, last_nats: float, expected: int) -> None:
    assert adapted_num_steps(first_nats, last_nats, 10) == expected


def test_steps_adapt_only_when_asked_and_survive_a_void_round_and_a_restart() -> None:
    """Losses of 2.0 and 0.5 nats: half of three steps, rounded up."""
    adapting, fixed = (small_cluster("adasfl", settings_of(adapt_local_steps=on), NUM_SAMPLES) for on in (True, False))
    assert adapting.plan(0).num_steps == 3  # nothing is known yet
    assert LOSSES not in adapting.program.state_dict()
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
    for cluster in (adapting, fixed):
        cluster.program.load_state_dict({**cluster.program.state_dict(), LOSSES: losses})
    assert (adapting.plan(1).num_steps, adapting.plan(1).num_exchanges, fixed.plan(1).num_steps) == (2, 2, 3)

    saved = adapting.program.state_dict()
    loss_nats = adapting.play(adapting.plan(1))
    assert adapting.program.state_dict()[LOSSES].tolist() == [2.0, loss_nats]
    restarted = small_cluster("adasfl", settings_of(adapt_local_steps=True), NUM_SAMPLES)
    for cluster in (adapting, restarted):
        cluster.program.load_state_dict(saved)
        assert_equal(cluster.program.state_dict(), saved)
        assert cluster.play(cluster.plan(1)) == loss_nats
    assert_equal(adapting.program.state_dict(), restarted.program.state_dict())


SHARES = [np.arange(0, 24), np.arange(24, 44), np.arange(44, 60)]


def test_two_rounds_over_memory_repeat_to_the_bit(tmp_path: Path) -> None:
    """Declared are 1.5, 2.5 and 3.5 ms per sample: from the second round 8, 8 * 1.5/2.5 = 4.8 and 8 * 1.5/3.5 = 3.4."""
    configs = [
        small_config(tmp_path, f"name={name}", "method.name=adasfl", "training.num_rounds=2")
        for name in ("first", "again")
    ]
    for config in configs:
        play_daemons(config, SHARES)
    assert same_tensors(*(checkpoint_of(config) for config in configs))
    first, again = (without(journal_of(config), *MEASURED) for config in configs)
    assert first == again
    assert [line["batch_sizes"] for line in first] == [[8, 8, 8], [8, 4, 3]]


def test_adapted_rounds_over_memory_are_shorter_and_resume_alike(tmp_path: Path) -> None:
    """Eight steps of a falling loss; a run that is cut after three rounds goes on as the whole one does."""
    settings = ("method.name=adasfl", "method.adapt_local_steps=true", "training.local_steps=8")
    whole = small_config(tmp_path, "name=whole", *settings, "training.num_rounds=5")
    play_daemons(whole, SHARES)
    begun = small_config(tmp_path, "name=parts", *settings, "training.num_rounds=3")
    play_daemons(begun, SHARES)
    play_daemons(small_config(tmp_path, "name=parts", *settings, "training.num_rounds=5"), SHARES, resume=True)
    lines = journal_of(whole)
    num_steps = [line["samples_trained"] // sum(line["batch_sizes"]) for line in lines]
    first_nats = lines[0]["train_loss_nats"]
    expected = [8, *(adapted_num_steps(first_nats, line["train_loss_nats"], 8) for line in lines[:-1])]
    assert num_steps == expected and min(num_steps) < 8
    assert same_tensors(checkpoint_of(whole), checkpoint_of(begun))
