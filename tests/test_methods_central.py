"""Central training is the reference: one worker with all the data gives the same parameters, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergesfl.methods.central import train_round
from mergesfl.models import build_model
from mergesfl.seeding import seed_for
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from tests.pretend_cluster import (
    CPU,
    PretendCluster,
    Share,
    assert_close,
    assert_equal,
    descend,
    differs,
    draw,
    settings_of,
    small_cluster,
    small_network,
)

torch.set_num_threads(1)

NUM_ROUNDS = 3
BATCH_SIZE = 16
SEED = 7  # of settings_of()


def digits_like() -> Share:
    """24 float32 samples (1, 8, 8) of 10 classes."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(24, 1, 8, 8, generator=generator), torch.arange(24) % 10


def has_dropout(half: nn.Module) -> bool:
    return any(type(module).__name__ == "SeededDropout" for module in half.modules())


# The default cut has the CNN's dropout above it, the other one below.
@pytest.mark.parametrize("cut", ["conv2", "classifier.2"])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(
    ("method", "merging"),
    [("mergesfl", True), ("mergesfl", False), ("splitfed-v1", True), ("splitfed-v2", True)],
)
def test_one_worker_with_all_data_equals_central_training_to_the_bit(
    method: str, merging: bool, num_steps: int, cut: str
) -> None:
    """In float32, with dropout: the order of every sum is the same, slices are scaled by D / d = 1, shares are 1."""
    network = build_model("cnn", cut, (1, 8, 8), 10, seed=5)
    assert has_dropout(network.top) == (cut == "conv2") and has_dropout(network.bottom) == (cut != "conv2")
    share = digits_like()
    settings = settings_of(num_steps=num_steps, batch_size=BATCH_SIZE, participants_per_round=1, merging=merging)
    cluster = PretendCluster(method, network, settings, {"only": share})
    central = place(copy.deepcopy(network), CPU)
    start = cluster.parameters()
    for round_num in range(NUM_ROUNDS):
        plan = cluster.plan(round_num)
        assert plan.batch_sizes == (BATCH_SIZE,)
        loss_nats = cluster.play(plan)
        central_nats, num_samples = train_round(
            central,
            settings,
            round_num,
            seed_for(SEED, "worker", "only", round_num),
            draw(SEED, share, round_num, "only", BATCH_SIZE),
            CPU,
        )
        assert num_samples == num_steps * BATCH_SIZE
        assert loss_nats == pytest.approx(central_nats, rel=1e-12)  # the same numbers, divided in another order
        assert_equal(cluster.parameters(), central.joined_state_dict())
    assert differs(start, central.joined_state_dict())


def test_fedavg_with_one_worker_equals_central_training_without_dropout() -> None:
    """Above the cut its masks come from the worker's stream instead of the server's: equal only without dropout."""
    cluster = small_cluster("fedavg", settings_of(participants_per_round=1), {"only": 20})
    central = place(SplitModel(small_network(), "0"), CPU)
    for round_num in range(NUM_ROUNDS):
        cluster.play(cluster.plan(round_num))
        batches = draw(SEED, cluster.shares["only"], round_num, "only", 4)
        train_round(central, cluster.settings, round_num, seed_for(SEED, "worker", "only", round_num), batches, CPU)
        assert_equal(cluster.parameters(), central.joined_state_dict())


def test_central_training_equals_plain_sgd() -> None:
    """The reference of the references: the uncut network, by hand, with the rate 0.3 * 0.9 ** h."""
    net, central = small_network(), SplitModel(small_network(), "0")
    share = (
        torch.randn(20, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.arange(20) % 3,
    )
    for round_num in range(2):
        losses_nats = []
        stream = draw(SEED, share, round_num, "only", 6)
        for _ in range(3):
            x, y = next(stream)
            loss = functional.cross_entropy(net(x), y)
            descend(list(net.parameters()), torch.autograd.grad(loss, list(net.parameters())), 0.3 * 0.9**round_num)
            losses_nats.append(loss.item())
        loss_nats, num_samples = train_round(
            central, settings_of(), round_num, 0, draw(SEED, share, round_num, "only", 6), CPU
        )
        assert loss_nats == pytest.approx(sum(losses_nats) / 3, abs=1e-12) and num_samples == 18
        assert_close(central.joined_state_dict(), net.state_dict())
