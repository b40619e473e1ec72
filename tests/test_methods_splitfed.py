"""SplitFed-V1 and V2 against references in plain torch.

Legend: d_i samples of worker i in one step, n_i of its data set, F... shape of a sample at the cut.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.control.selection import plan_uniform
from mergesfl.methods.base import StepFeatures
from mergesfl.models import build_model
from mergesfl.seeding import generator_for, seed_for
from tests.pretend_cluster import (
    Batch,
    PretendCluster,
    Step,
    assert_close,
    average_into,
    descend,
    local_training,
    plan_of,
    settings_of,
    small_cluster,
    small_network,
)

torch.set_num_threads(1)

NUM_SAMPLES = {"a": 9, "b": 30, "c": 14}  # n_i: the weights
SIZES = {"a": 4, "b": 2, "c": 6}  # d_i, in other proportions
SEED = 7  # of settings_of()


def start(method: str, **changes: int | float | str | bool) -> PretendCluster:
    return small_cluster(method, settings_of(**changes), NUM_SAMPLES)


def test_v1_equals_local_training_of_whole_copies_averaged_by_data() -> None:
    """Bottoms and tops are averaged with n_i / n; the rate of round h is 0.3 * 0.9 ** h."""
    cluster = start("splitfed-v1")
    net = small_network()
    for round_num in range(2):
        plan = plan_of(SIZES, num_steps=3, round_num=round_num)
        expected_nats = local_training(net, cluster.batches_of(plan), list(NUM_SAMPLES.values()), 0.3 * 0.9**round_num)
        assert cluster.play(plan) == pytest.approx(expected_nats, abs=1e-12)
        assert_close(cluster.parameters(), net.state_dict())


def test_v1_leaves_a_dropped_worker_out_of_both_averages() -> None:
    cluster = start("splitfed-v1")
    plan = plan_of(SIZES, num_steps=3)
    net = small_network()
    first, _, third = cluster.batches_of(plan)
    local_training(net, [first, third], [9, 14], 0.3)
    cluster.play(plan, {"b": 1})
    assert_close(cluster.parameters(), net.state_dict())


def sequential_training(
    net: nn.Sequential,
    batches: Mapping[str, Sequence[Batch]],
    orders: Sequence[Sequence[int]],
    rate: float,
    dropped_at: Mapping[str, int] | None = None,
) -> float:
    """One round of SplitFed-V2 in plain torch, in place: in every step the top takes one worker after the other.

    `orders` are positions among the workers that still take part, step by step. Returns the mean loss of the round.
    """
    top, dropped_at = net[1], dropped_at or {}
    bottoms = {name: copy.deepcopy(net[0]) for name in batches}
    losses_nats = []
    for step, order in enumerate(orders):
        active = [name for name in batches if dropped_at.get(name, len(orders) + 1) > step]
        loss_sum_nats, num_samples = 0.0, 0
        for position in order:
            name = active[position]
            x, y = batches[name][step]
            bottom = bottoms[name]
            loss = functional.cross_entropy(top(bottom(x)), y)
            parameters = [*bottom.parameters(), *top.parameters()]
            descend(parameters, torch.autograd.grad(loss, parameters), rate)  # the next worker meets the stepped top
            loss_sum_nats += loss.item() * len(y)
            num_samples += len(y)
        losses_nats.append(loss_sum_nats / num_samples)
    finished = [name for name in batches if dropped_at.get(name, len(orders) + 1) > len(orders)]
    average_into(net[0], [bottoms[name] for name in finished], [NUM_SAMPLES[name] for name in finished])
    return sum(losses_nats) / len(losses_nats)


def order_of(seed: int, round_num: int, step: int, num_workers: int) -> list[int]:
    """The documented stream: ("top", round, step), and of that ("order")."""
    drawn = generator_for(seed_for(seed, "top", round_num, step), "order").permutation(num_workers)
    return [int(position) for position in drawn]


def test_v2_equals_a_reference_with_the_same_random_order() -> None:
    cluster = start("splitfed-v2")
    net = small_network()
    for round_num in range(2):
        plan = plan_of(SIZES, num_steps=3, round_num=round_num)
        batches = dict(zip(plan.worker_ids, cluster.batches_of(plan), strict=True))
        orders = [order_of(SEED, round_num, step, 3) for step in range(3)]
        expected_nats = sequential_training(net, batches, orders, 0.3 * 0.9**round_num)
        assert cluster.play(plan) == pytest.approx(expected_nats, abs=1e-12)
        assert_close(cluster.parameters(), net.state_dict())


@pytest.mark.parametrize("dropped_at", [{"b": 1}, {"c": 3}])
def test_v2_goes_on_without_a_dropped_worker(dropped_at: dict[str, int]) -> None:
    """The top keeps what it learnt from the dropped one; the bottoms of the others are averaged with their n_i."""
    cluster = start("splitfed-v2")
    plan = plan_of(SIZES, num_steps=3)
    net = small_network()
    batches = dict(zip(plan.worker_ids, cluster.batches_of(plan), strict=True))
    num_active = [sum(dropped_at.get(name, 4) > step for name in SIZES) for step in range(3)]
    orders = [order_of(SEED, 0, step, num_active[step]) for step in range(3)]
    sequential_training(net, batches, orders, 0.3, dropped_at)
    cluster.play(plan, dropped_at)
    assert_close(cluster.parameters(), net.state_dict())


def found_orders(top: nn.Module, step: Step) -> list[tuple[int, ...]]:
    """All orders that explain the gradients of one step: tries each on a copy of the top as it was before."""
    found = []
    for order in itertools.permutations(range(len(step.arrived))):
        tried, gradients = copy.deepcopy(top), dict[int, Tensor]()
        for position in order:
            one = step.arrived[position]
            z = one.features.clone().requires_grad_()  # (d_i, F...)
            loss = functional.cross_entropy(tried(z), one.labels)
            gradients[position], *of_top = torch.autograd.grad(loss, [z, *tried.parameters()])
            descend(list(tried.parameters()), of_top, 0.3)
        if all(torch.allclose(gradients[i], g, rtol=0, atol=1e-12) for i, g in enumerate(step.gradients)):
            found.append(order)
    return found


def test_v2_returns_gradients_in_plan_order_whatever_the_random_order() -> None:
    """Exactly one order explains each step's gradients when they are taken to be in plan order."""
    orders = set()
    for seed in range(6):
        cluster = start("splitfed-v2", seed=seed)
        top = copy.deepcopy(cluster.program.network.top)
        cluster.play(plan_of(SIZES, num_steps=1))
        assert [one.worker_id for one in cluster.steps[0].arrived] == ["a", "b", "c"]
        (order,) = found_orders(top, cluster.steps[0])
        assert list(order) == order_of(seed, 0, 0, 3)
        orders.add(order)
    assert len(orders) > 2  # it is random, not the plan's order


def test_v2_order_is_a_pure_function_of_seed_round_and_step() -> None:
    """The same features merged by a new program after other rounds: only (seed, round, step) decide."""
    settings = {"seed": 3}
    first, second = start("splitfed-v2", **settings), start("splitfed-v2", **settings)
    start_state = first.program.state_dict()
    second.play(plan_of(SIZES, num_steps=2, round_num=0))  # another past
    second.program.load_state_dict(start_state)
    for cluster in (first, second):
        cluster.play(plan_of(SIZES, num_steps=3, round_num=5))
    for one, other in zip(first.steps, second.steps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))
    drawn = {(h, k): tuple(order_of(3, h, k, 3)) for h in range(4) for k in range(4)}
    assert len(set(drawn.values())) > 2


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
def test_plans_are_uniform(method: str) -> None:
    cluster = start(method, participants_per_round=2)
    plan = cluster.program.plan(2, cluster.fleet(), generator_for(0, "plan"))
    assert plan == plan_uniform(2, cluster.fleet(), 2, 4, 3, 3, generator_for(0, "plan"))
    assert plan.num_exchanges == plan.num_steps == 3


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
def test_workers_of_one_step_get_unrelated_dropout_masks(method: str) -> None:
    """Two workers with the same features and labels differ only in the masks above the cut (learning rate tiny)."""
    network = build_model("cnn", None, (1, 8, 8), 10, 0)
    generator = torch.Generator().manual_seed(0)
    share = (torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6))
    cluster = PretendCluster(
        method, network, settings_of(learning_rate=1e-12, learning_rate_min=1e-12), dict.fromkeys("ab", share)
    )
    cluster.program.open(plan_of({"a": 6, "b": 6}, num_steps=1), cluster.fleet())
    z = torch.randn(6, 32, 2, 2, generator=generator)  # (d, F...)
    arrived = [StepFeatures(name, z, torch.arange(6)) for name in "ab"]
    ours, theirs = cluster.program.merge(0, arrived)
    again = cluster.program.merge(0, arrived)
    assert not torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert torch.allclose(ours, again[0], rtol=0, atol=1e-7) and torch.allclose(theirs, again[1], rtol=0, atol=1e-7)
