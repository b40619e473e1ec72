"""The top on two ranks: equal to one rank to the last digits, whatever the batch and the loss.

Rank 0 is this process, rank 1 another one. Legend: D merged samples, d_i samples of worker i.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError, MergeSFLError
from mergesfl.training.dropout import SeededDropout, seed_dropout
from mergesfl.training.logit_adjustment import log_prior
from mergesfl.training.merging import MergedStep, merged_step
from mergesfl.training.momentum import make_momentum_sgd
from mergesfl.training.placement import place
from mergesfl.training.split import Half, SplitModel
from ps.following import follow
from ps.ranks import END, Ranks
from ps.shards import Shard, ShardedTop, require_shardable, rows_of
from tests.processes import free_port

torch.set_num_threads(1)

FEATURES = (4, 6, 6)
CPU = torch.device("cpu")
ATOL = 1e-10
MASKS = ("element", "channel", "sample", "batch")


def make_top(mask: str) -> Half:
    """Two convolutions and a linear layer, dropout of one kind between them, in float64."""
    torch.manual_seed(0)
    below = nn.Conv2d(1, 4, 3, padding=1)
    above = nn.Sequential(
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), SeededDropout(0.3, mask)),
        *(nn.Conv2d(6, 2, 3, padding=1), nn.Flatten(), SeededDropout(0.5), nn.Linear(72, 3)),
    )
    return place(SplitModel(nn.Sequential(below, above).double(), "0"), CPU).top


def join(rank: int, port: int) -> Ranks:
    place_of = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place_of.items()})
    return Ranks.join()


def rank_1(port: int) -> None:
    torch.set_num_threads(1)
    with join(1, port) as ranks:
        ranks.open("cpu")
        while (description := ranks.hear_description()) is not None:
            follow(ranks, make_top(description["mask"]), FEATURES, CPU)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    before = dict(os.environ)
    port = free_port()
    other = multiprocessing.get_context("spawn").Process(target=rank_1, args=(port,), daemon=True)
    other.start()
    with join(0, port) as joined:
        joined.open("cpu")
        yield joined
    other.join(30)
    os.environ.clear()
    os.environ.update(before)
    assert other.exitcode == 0


def train(top: Half, sizes: tuple[int, ...], momentum: float, adjusts: bool) -> tuple[list[MergedStep], list[Tensor]]:
    """Three merged steps; what they returned, and the parameters after them."""
    optimizer = make_momentum_sgd(top.parameters(), 0.1, momentum)
    generator = torch.Generator().manual_seed(1)
    top.train()
    steps = []
    for step in range(3):
        z = [torch.randn(d, *FEATURES, generator=generator, dtype=torch.float64) for d in sizes]  # (d_i, F...)
        y = [torch.randint(0, 3, (d,), generator=generator) for d in sizes]  # (d_i,)
        seed_dropout(top, step)
        own = [log_prior(torch.tensor([1.0, 2.0, 3.0 + d])) for d in sizes]
        priors = (log_prior(torch.tensor([3.0, 2.0, 1.0])), own) if adjusts else (None, None)
        steps.append(merged_step(top, optimizer, z, y, *priors))
    return steps, [parameter.detach().clone() for parameter in top.parameters()]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 3, 7, 2, 16)], ids=lambda sizes: f"D={sum(sizes)}")
@pytest.mark.parametrize(("momentum", "adjusts"), [(0.0, False), (0.9, False), (0.9, True)])
def test_two_ranks_are_one(ranks: Ranks, mask: str, sizes: tuple[int, ...], momentum: float, adjusts: bool) -> None:
    """Losses, gradients at the cut and, after three steps, all parameters; with SCALA's two backwards (`adjusts`)."""
    alone, shared = make_top(mask), make_top(mask)
    expected_steps, expected = train(alone, sizes, momentum, adjusts)
    ranks.describe({"mask": mask})
    ShardedTop(ranks, shared)
    steps, parameters = train(shared, sizes, momentum, adjusts)
    for step, wanted in zip(steps, expected_steps, strict=True):
        assert step.loss_nats == pytest.approx(wanted.loss_nats, abs=ATOL)
        for gradient, other in zip(step.gradients, wanted.gradients, strict=True):
            assert torch.allclose(gradient, other, rtol=0, atol=ATOL)
    for parameter, other, initial in zip(parameters, expected, make_top(mask).parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=ATOL)
        assert not torch.allclose(parameter, initial, rtol=0, atol=1e-6)
    copied = copy.deepcopy(shared)  # a copy, and evaluation, are no business of the others
    train(copied, sizes, momentum, adjusts)
    z = torch.randn(5, *FEATURES, dtype=torch.float64)
    assert torch.allclose(shared.eval()(z), alone.eval()(z), rtol=0, atol=ATOL)
    ranks.command(END)


def test_parameters_that_were_set_by_hand_reach_the_other_rank(ranks: Ranks) -> None:
    """As a void round, a resumed run and the average of other methods set them."""
    alone, shared = make_top("element"), make_top("element")
    ranks.describe({"mask": "element"})
    ShardedTop(ranks, shared)
    for top in (alone, shared):
        train(top, (3, 2), 0.0, False)
        top.load_state_dict(make_top("element").state_dict())
        top.get_parameter("1.0.bias").data.fill_(0.25)
    for step, wanted in zip(train(shared, (3, 2), 0.0, False)[0], train(alone, (3, 2), 0.0, False)[0], strict=True):
        assert step.loss_nats == pytest.approx(wanted.loss_nats, abs=ATOL)
    ranks.command(END)


def test_a_seed_is_used_once(ranks: Ranks) -> None:
    shared = make_top("element")
    ranks.describe({"mask": "element"})
    ShardedTop(ranks, shared)
    z = torch.randn(2, *FEATURES, dtype=torch.float64)
    with pytest.raises(MergeSFLError, match="its seed is missing"):
        shared.train()(z)
    seed_dropout(shared, 0)
    shared(z)
    with pytest.raises(MergeSFLError, match="its seed is used up"):
        shared(z)
    assert not ranks.in_step
    ranks.command(END)


def test_a_dropout_that_drops_nothing_needs_no_seed() -> None:
    """As in torchvision's networks with p = 0: whoever streams seeds only where masks are drawn."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), SeededDropout(0.0), nn.Linear(5, 2)))
    assert Shard(SplitModel(network, "0").top).unused_seeds() == []


def test_rows_are_shared_out_evenly() -> None:
    for num_ranks in (1, 2, 3, 7):
        for num_rows in range(1, 20):
            shares = [rows_of(rank, num_ranks, num_rows) for rank in range(num_ranks)]
            assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])]
            sizes = [end - begin for begin, end in shares]
            assert sum(sizes) == num_rows and max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_batch_norm_in_the_top_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"the top holds the layer '1' \(BatchNorm1d\).*behind the last such layer"):
        require_shardable(SplitModel(net, "0").top)
    require_shardable(SplitModel(copy.deepcopy(net), "1").top)  # behind it
