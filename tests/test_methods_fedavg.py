"""FedAvg against local training of whole networks in plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergesfl.control.selection import plan_uniform
from mergesfl.methods import METHODS
from mergesfl.methods.base import Assignment, WorkerUpdate, WorkResult, copy_state
from mergesfl.models import build_model
from mergesfl.seeding import generator_for
from tests.pretend_cluster import (
    PretendCluster,
    assert_close,
    assert_equal,
    differs,
    local_training,
    plan_of,
    settings_of,
    small_cluster,
    small_network,
)

torch.set_num_threads(1)

NUM_SAMPLES = {"a": 9, "b": 30, "c": 14}  # n_i: the weights
SIZES = {"a": 4, "b": 2, "c": 6}  # samples per step, in other proportions


def start() -> PretendCluster:
    return small_cluster("fedavg", settings_of(), NUM_SAMPLES)


def test_two_rounds_equal_local_training_averaged_by_data() -> None:
    """w = sum_i n_i / n * w_i with n = (9, 30, 14); the loss is the mean over all samples trained, not over workers."""
    cluster = start()
    net = small_network()
    for round_num in range(2):
        plan = plan_of(SIZES, num_steps=3, round_num=round_num, num_exchanges=0)
        expected_nats = local_training(net, cluster.batches_of(plan), [9, 30, 14], 0.3 * 0.9**round_num)
        assert cluster.play(plan) == pytest.approx(expected_nats, abs=1e-12)
        assert [update.num_samples for update in cluster.updates] == [12, 6, 18]
        assert_close(cluster.parameters(), net.state_dict())


def test_a_dropped_worker_is_left_out_of_model_and_loss() -> None:
    cluster = start()
    plan = plan_of(SIZES, num_steps=3, num_exchanges=0)
    net = small_network()
    first, _, third = cluster.batches_of(plan)
    expected_nats = local_training(net, [first, third], [9, 14], 0.3)
    assert cluster.play(plan, {"b": 1}) == pytest.approx(expected_nats, abs=1e-12)
    assert_close(cluster.parameters(), net.state_dict())


def test_the_loss_of_a_round_by_hand() -> None:
    """(2.0 nats * 30 samples + 0.5 nats * 10 samples) / 40 samples = 65 / 40 = 1.625 nats."""
    cluster = start()
    cluster.program.open(plan_of(SIZES, num_steps=3, num_exchanges=0), cluster.fleet())
    state = cluster.program.state_for("a")
    for name, num_samples, loss_nats in (("a", 30, 2.0), ("b", 10, 0.5)):
        cluster.program.take(WorkerUpdate(name, state, num_samples, {"loss_nats": loss_nats}))
    assert cluster.program.close() == pytest.approx(1.625)


def test_the_plan_is_uniform_and_exchanges_nothing() -> None:
    cluster = start()
    plan = cluster.program.plan(1, cluster.fleet(), generator_for(0, "plan"))
    assert plan == plan_uniform(1, cluster.fleet(), 3, 4, 3, 0, generator_for(0, "plan"))
    assert plan.num_exchanges == 0 and plan.ingress_bytes_per_step == 0
    with pytest.raises(AssertionError, match="exchanges no features"):
        cluster.program.merge(0, [])


def test_without_dropout_it_equals_splitfed_v1() -> None:
    """Where a network is cut is nothing that averaging tops and bottoms with equal weights can see."""
    federated, split = start(), small_cluster("splitfed-v1", settings_of(), NUM_SAMPLES)
    federated.play(plan_of(SIZES, num_steps=3, num_exchanges=0))
    split.play(plan_of(SIZES, num_steps=3))
    assert_close(federated.parameters(), split.parameters())


def test_dropout_follows_the_seed_of_the_worker_and_the_step() -> None:
    """The same weights and batches: only the masks can differ. Two equal steps of one round have different masks."""
    model = build_model("cnn", None, (1, 8, 8), 10, 0).eval()
    state = copy_state(model.joined_state_dict())
    batch = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6))

    def train(seed: int, num_steps: int = 1) -> WorkResult:
        assignment = Assignment(0, num_steps, 6, {"learning_rate": 1e-12}, state, seed)
        return METHODS["fedavg"].work(model, assignment, itertools.repeat(batch), lambda step, z, y: z)

    losses_nats = [train(seed).metrics["loss_nats"] for seed in (1, 1, 2)]
    assert losses_nats[0] == losses_nats[1] != pytest.approx(losses_nats[2], rel=1e-5)
    # The mean over two steps is not that of the first step: the weights hardly moved, the masks are new.
    assert train(1, num_steps=2).metrics["loss_nats"] != pytest.approx(losses_nats[0], rel=1e-5)


def test_what_was_handed_out_does_not_change_when_the_round_closes() -> None:
    cluster = start()
    sent = cluster.program.state_for("a")
    kept = {name: tensor.clone() for name, tensor in sent.items()}
    cluster.play(plan_of(SIZES, num_steps=2, num_exchanges=0))
    assert_equal(sent, kept)
    assert differs(cluster.program.state_for("a"), kept)
