"""MergeSFL: one round against joint training, against a reference in plain torch, and its switches.

Legend: d_i samples of worker i in one step, D their sum, F... shape of a sample at the cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.control.selection import plan_round, plan_uniform
from mergesfl.control.settings import ControlSettings
from mergesfl.methods.base import MethodSettings, WorkerUpdate
from mergesfl.models.initial import build_seeded
from mergesfl.seeding import generator_for
from mergesfl.training.split import SplitModel
from tests.pretend_cluster import (
    Batch,
    PretendCluster,
    assert_close,
    assert_equal,
    average_into,
    descend,
    differs,
    local_training,
    plan_of,
    settings_of,
    small_cluster,
    small_network,
)

torch.set_num_threads(1)

NUM_SAMPLES = {"a": 9, "b": 30, "c": 14}  # n_i, in other proportions than the d_i
SIZES = {"a": 1, "b": 3, "c": 7}  # d_i; D = 11


def merged_training(
    net: nn.Sequential,
    batches: Mapping[str, Sequence[Batch]],
    rate: float,
    bottom_rates: Mapping[str, float] | None = None,
    dropped_at: Mapping[str, int] | None = None,
) -> float:
    """One round of MergeSFL in plain torch, in place; returns the mean over the steps of the merged loss.

    It never scales a slice: a worker's gradient is taken from its own mean loss (identity b), the top's from the loss
    over all samples. Weights of the average: the d_i of the workers that finished.
    """
    top, dropped_at = net[1], dropped_at or {}
    bottoms = {name: copy.deepcopy(net[0]) for name in batches}
    num_steps = len(next(iter(batches.values())))
    loss_sum = 0.0
    for step in range(num_steps):
        active = [name for name in batches if dropped_at.get(name, num_steps + 1) > step]
        joint = functional.cross_entropy(
            top(torch.cat([bottoms[name](batches[name][step][0]) for name in active])),  # (D, F...) -> (D, C)
            torch.cat([batches[name][step][1] for name in active]),
        )
        loss_sum += joint.item()
        gradients: dict[str, tuple[Tensor, ...]] = {}
        for name in active:
            x, y = batches[name][step]
            own = functional.cross_entropy(top(bottoms[name](x)), y)
            gradients[name] = torch.autograd.grad(own, list(bottoms[name].parameters()))
        descend(list(top.parameters()), torch.autograd.grad(joint, list(top.parameters())), rate)
        for name in active:
            descend(list(bottoms[name].parameters()), gradients[name], (bottom_rates or {}).get(name, rate))
    finished = [name for name in batches if dropped_at.get(name, num_steps + 1) > num_steps]
    average_into(net[0], [bottoms[name] for name in finished], [len(batches[name][0][1]) for name in finished])
    return loss_sum / num_steps


def start(settings: MethodSettings) -> PretendCluster:
    return small_cluster("mergesfl", settings, NUM_SAMPLES)


def test_one_step_equals_one_joint_step_on_the_merged_batch() -> None:
    """Identity (c), by the reference: torch's own SGD on the uncut network and the concatenated batch."""
    cluster = start(settings_of())
    plan = plan_of(SIZES, num_steps=1)
    net = small_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    merged = [torch.cat(tensors) for tensors in zip(*(b[0] for b in cluster.batches_of(plan)), strict=True)]
    loss = functional.cross_entropy(net(merged[0]), merged[1])  # D = 11
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    before = cluster.parameters()
    loss_nats = cluster.play(plan)
    assert loss_nats == pytest.approx(loss.item(), abs=1e-12)
    assert differs(before, net.state_dict(), "0") and differs(before, net.state_dict(), "1")
    assert_close(cluster.parameters(), net.state_dict())


def test_three_steps_and_two_rounds_equal_a_reference_without_the_project() -> None:
    """Round h has the rate 0.3 * 0.9 ** h, for the top and for every bottom."""
    cluster = start(settings_of())
    net = small_network()
    for round_num in range(2):
        plan = plan_of(SIZES, num_steps=3, round_num=round_num)
        batches = dict(zip(plan.worker_ids, cluster.batches_of(plan), strict=True))
        rate = 0.3 * 0.9**round_num
        expected_nats = merged_training(net, batches, rate)
        assert cluster.play(plan) == pytest.approx(expected_nats, abs=1e-12)
        assert cluster.rates == dict.fromkeys("abc", rate)
        assert_close(cluster.parameters(), net.state_dict())


def test_proportional_rates_of_the_bottoms() -> None:
    """eta * d_i / mean d with d = (2, 4, 6), mean 4 and eta = 0.3: 0.15, 0.3, 0.45."""
    settings = settings_of(bottom_learning_rate="proportional")
    cluster = start(settings)
    plan = plan_of({"a": 2, "b": 4, "c": 6}, num_steps=3)
    net = small_network()
    batches = dict(zip(plan.worker_ids, cluster.batches_of(plan), strict=True))
    rates = {"a": 0.15, "b": 0.3, "c": 0.45}
    merged_training(net, batches, 0.3, rates)
    cluster.play(plan)
    assert cluster.rates == pytest.approx(rates)
    assert_close(cluster.parameters(), net.state_dict())


@pytest.mark.parametrize("dropped_at", [{"b": 1}, {"a": 0, "c": 2}, {"c": 3}])
def test_the_round_goes_on_without_a_dropped_worker(dropped_at: dict[str, int]) -> None:
    """From its last step on it is in no merge, and it is not in the average (step 3: only its update)."""
    cluster = start(settings_of())
    plan = plan_of(SIZES, num_steps=3)
    net = small_network()
    batches = dict(zip(plan.worker_ids, cluster.batches_of(plan), strict=True))
    expected_nats = merged_training(net, batches, 0.3, dropped_at=dropped_at)
    assert cluster.play(plan, dropped_at) == pytest.approx(expected_nats, abs=1e-12)
    assert_close(cluster.parameters(), net.state_dict())


def test_plan_order_not_name_order_is_the_order_of_the_merged_sequence() -> None:
    cluster = start(settings_of())
    cluster.play(plan_of({"c": 7, "a": 1, "b": 3}, num_steps=2))
    for step in cluster.steps:
        assert [one.worker_id for one in step.arrived] == ["c", "a", "b"]
        assert [tuple(gradient.shape) for gradient in step.gradients] == [(7, 3, 2, 2), (1, 3, 2, 2), (3, 3, 2, 2)]


def test_without_merging_every_worker_has_a_top_averaged_by_its_batch_size() -> None:
    """Local training of whole copies, averaged with d_i / D (not n_i / n): the reference cuts nothing."""
    cluster = start(settings_of(merging=False))
    plan = plan_of(SIZES, num_steps=3)
    net = small_network()
    expected_nats = local_training(net, cluster.batches_of(plan), list(SIZES.values()), 0.3)
    assert cluster.play(plan) == pytest.approx(expected_nats, abs=1e-12)
    assert_close(cluster.parameters(), net.state_dict())
    merged = start(settings_of())
    merged.play(plan)
    assert not torch.allclose(merged.parameters()["1.1.weight"], net.state_dict()["1.1.weight"], rtol=0, atol=1e-6)


def test_without_merging_a_dropped_worker_leaves_no_trace() -> None:
    """Bottom and top of the dropped one are left out: only the other two are averaged, with d = (1, 7)."""
    cluster = start(settings_of(merging=False))
    plan = plan_of(SIZES, num_steps=3)
    net = small_network()
    first, _, third = cluster.batches_of(plan)
    local_training(net, [first, third], [1, 7], 0.3)
    cluster.play(plan, {"b": 2})
    assert_close(cluster.parameters(), net.state_dict())


def uneven_fleet(cluster: PretendCluster) -> FleetView:
    """Speeds 1 : 2 : 4, so that Eq. 9 gives d = (4, 2, 1) for D_max = 4."""
    seconds = {"a": 0.1, "b": 0.2, "c": 0.4}
    fleet = cluster.fleet()
    workers = tuple(
        replace(w, compute_seconds_per_sample=seconds[w.worker_id], transfer_seconds_per_sample=0.0)
        for w in fleet.workers
    )
    return replace(fleet, workers=workers)


def test_regulation_follows_algorithm_1_within_the_budget_and_in_fleet_order() -> None:
    """The budget of 480 bytes is 10 samples of 48 bytes. Every setting of the method must reach the control module."""
    settings = settings_of(
        ingress_budget_bytes=480, kl_epsilon_nats=0.2, fill_budget=True, allow_above_max=False, num_steps=5
    )
    cluster = start(settings)
    fleet = uneven_fleet(cluster)
    plan = cluster.program.plan(4, fleet, generator_for(0, "plan"))
    control = ControlSettings(
        max_batch_size=4,
        ingress_budget_bytes=480,
        num_steps=5,
        num_exchanges=5,
        kl_epsilon_nats=0.2,
        fill_budget=True,
        allow_above_max=False,
    )
    assert plan == plan_round(4, fleet, control, generator_for(0, "plan"))
    assert plan.worker_ids == tuple(sorted(plan.worker_ids)) and len(plan.worker_ids) >= 2
    assert sum(plan.batch_sizes) * 48 == plan.ingress_bytes_per_step <= plan.ingress_budget_bytes == 480
    assert max(plan.batch_sizes) <= 4
    assert (plan.round_num, plan.num_steps, plan.num_exchanges) == (4, 5, 5)


def test_regulation_without_filling_gives_equation_9() -> None:
    """d_i = floor(4 * 0.1 / t_i) = 4, 2, 1 while the KL is allowed to be what it is."""
    cluster = start(settings_of(fill_budget=False, kl_epsilon_nats=100.0))
    plan = cluster.program.plan(0, uneven_fleet(cluster), generator_for(0, "plan"))
    by_equation_9 = {"a": 4, "b": 2, "c": 1}
    assert dict(zip(plan.worker_ids, plan.batch_sizes, strict=True)) == {
        name: by_equation_9[name] for name in plan.worker_ids
    }


def test_epsilon_decides_whether_batch_sizes_are_fine_tuned() -> None:
    """Two workers, one class each, speeds 1 : 4: Eq. 9 gives d = (80, 20), KL = 0.8 ln 1.6 + 0.2 ln 0.4 = 0.193 nats.

    Below 0.2 that stays; for 0.05 it is tuned, and rounding to whole samples may leave it slightly above.
    """
    counts = ((400, 0), (0, 400))
    workers = (WorkerView(name, 400, n, s, 0.0) for name, n, s in zip("ab", counts, (0.1, 0.4), strict=True))
    fleet = FleetView(tuple(workers), 48)
    plans = {}
    for epsilon_nats in (0.2, 0.05):
        settings = settings_of(batch_size=80, participants_per_round=2, fill_budget=False, kl_epsilon_nats=epsilon_nats)
        plans[epsilon_nats] = start(settings).program.plan(0, fleet, generator_for(0, "plan"))
    assert plans[0.2].batch_sizes == (80, 20)
    assert plans[0.2].kl_after_nats == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert plans[0.05].kl_before_nats == plans[0.2].kl_after_nats
    assert plans[0.05].kl_after_nats < 0.053


def test_the_default_budget_is_that_of_an_unregulated_round() -> None:
    """participants * D_max * c = 3 * 4 * 48 = 576 bytes."""
    cluster = start(settings_of())
    assert cluster.plan(0).ingress_budget_bytes == 576


def test_without_regulation_workers_are_drawn_at_random_with_equal_batches() -> None:
    cluster = start(settings_of(regulation=False, participants_per_round=2))
    fleet = uneven_fleet(cluster)
    plans = [cluster.program.plan(h, fleet, generator_for(0, "plan", h)) for h in range(20)]
    assert plans[3] == plan_uniform(3, fleet, 2, 4, 3, 3, generator_for(0, "plan", 3))
    assert all(plan.batch_sizes == (4, 4) for plan in plans)
    # Three pairs, each missed in 20 draws with probability (2/3)**20 = 0.0003; the seeds are fixed.
    assert {plan.worker_ids for plan in plans} == {("a", "b"), ("a", "c"), ("b", "c")}


def norm_network() -> SplitModel:
    """Batch-norm right at the input, so that its running mean can be computed by hand; samples (2,)."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4)), nn.Sequential(nn.Linear(4, 3)))

    return SplitModel(build_seeded(build, 0).double(), "0")


def norm_cluster() -> PretendCluster:
    generator = torch.Generator().manual_seed(2)
    shares = {
        name: (
            torch.randn(count, 2, generator=generator, dtype=torch.float64) + shift,
            torch.randint(0, 3, (count,), generator=generator),
        )
        for name, count, shift in (("a", 12, 0.0), ("b", 20, 5.0))
    }
    return PretendCluster("mergesfl", norm_network(), settings_of(), shares)


def test_float_buffers_of_batch_norm_are_averaged_by_batch_size() -> None:
    """One step, momentum 0.1: running_i = 0.9 * start + 0.1 * batch_i; global = sum_i d_i / D * running_i."""
    cluster = norm_cluster()
    plan = plan_of({"a": 3, "b": 9}, num_steps=1)
    (xa, _), (xb, _) = (worker[0] for worker in cluster.batches_of(plan))  # (3, 2), (9, 2)
    cluster.play(plan)
    state = cluster.parameters()
    # The weighted mean of the batches' means is the mean of the merged batch.
    mean = 0.1 * torch.cat([xa, xb]).mean(0)
    var = 0.9 + 0.1 * (xa.var(0, unbiased=True) * 3 / 12 + xb.var(0, unbiased=True) * 9 / 12)
    assert torch.allclose(state["0.0.running_mean"], mean, rtol=0, atol=1e-12)
    assert torch.allclose(state["0.0.running_var"], var, rtol=0, atol=1e-12)
    assert int(state["0.0.num_batches_tracked"]) == 1


def test_integer_buffers_are_those_of_the_first_worker_that_finished() -> None:
    """A plain mean of 7 and 3 would be 5, one weighted by d = (3, 9) would be 4."""
    cluster = norm_cluster()
    cluster.program.open(plan_of({"a": 3, "b": 9}, num_steps=1), cluster.fleet())
    for name, tracked in (("b", 3), ("a", 7)):  # first is who is first in the plan
        state = dict(cluster.program.state_for(name))
        state["0.0.num_batches_tracked"] = torch.tensor(tracked)
        cluster.program.take(WorkerUpdate(name, state, 1, {}))
    assert cluster.program.close() is None  # no step was merged: there is no loss
    assert int(cluster.parameters()["0.0.num_batches_tracked"]) == 7


def test_planning_and_closing_leave_what_was_handed_out_alone() -> None:
    """The bottoms that were sent may still be on their way when the round closes: they must not change."""
    cluster = start(settings_of())
    sent = cluster.program.state_for("a")
    kept = {name: tensor.clone() for name, tensor in sent.items()}
    cluster.play(plan_of(SIZES, num_steps=2))
    assert_equal(sent, kept)
    assert differs(cluster.program.state_for("a"), kept)
