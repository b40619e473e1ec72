"""The floor: the steps of a split run back to back in one process, in plain torch, without any framework.

The same bottoms, top, batches, dropout masks and steps as a run of `minibatch-sfl` (one merged step of the top, bottoms
averaged with the weights d_i), and nothing else: no messages, sessions, threads, checks, clock or records. The
parameters that come out are those of the run to the bit (tests/test_benchmarks_floor.py): nothing was left out.
Legend: D merged samples, d_i samples of worker i in one step, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.cluster import draw_partition
from mergesfl.config import RunConfig
from mergesfl.data.dataset import Dataset
from mergesfl.data.sampling import Batches
from mergesfl.processes import worker_name
from mergesfl.runtime.journal import read_journal
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.placement import place
from mergesfl.training.schedule import learning_rate, make_sgd
from ps.run import build_network

METHOD = "minibatch-sfl"  # whose steps these are


@dataclass(frozen=True)
class PlayedRound:
    """Who took part in a round, in plan order, and with which batch sizes d_i."""

    worker_ids: tuple[str, ...]
    batch_sizes: tuple[int, ...]


def played_rounds(run_folder: Path) -> list[PlayedRound]:
    """The rounds that a run has left in its journal."""
    lines = read_journal(run_folder / "journal.jsonl")
    return [PlayedRound(tuple(line["worker_ids"]), tuple(line["batch_sizes"])) for line in lines]


def run_floor(
    config: RunConfig, dataset: Dataset, rounds: Sequence[PlayedRound], after_round: Callable[[], None]
) -> dict[str, Tensor]:
    """Trains these rounds; the joined parameters and buffers.

    Args:
        config: of the run: model, seed, partition, learning rate and local steps.
        dataset: of the run.
        rounds: who took part; nobody was lost.
        after_round: called at the end of every round.
    """
    network = place(build_network(config, dataset), torch.device("cpu"))
    network.train()
    assignments = draw_partition(config, dataset).assignments
    share_of = {worker_name(index): rows for index, rows in enumerate(assignments)}
    data = {name: (dataset.train.x[rows], dataset.train.y[rows]) for name, rows in share_of.items()}
    bottoms = [copy.deepcopy(network.bottom) for _ in range(max(len(played.worker_ids) for played in rounds))]
    for round_num, played in enumerate(rounds):
        streams = [
            Batches(*data[name], d, generator_for(config.seed, "batches", name, round_num), dataset.scale, True)
            for name, d in zip(played.worker_ids, played.batch_sizes, strict=True)
        ]
        seeds = [seed_for(config.seed, "worker", name, round_num) for name in played.worker_ids]
        trained = bottoms[: len(streams)]
        for bottom in trained:
            bottom.load_state_dict(network.bottom.state_dict())
        _train_round(config, network.top, trained, streams, seeds, round_num)
        network.bottom.load_state_dict(_mean([bottom.state_dict() for bottom in trained], played.batch_sizes))
        after_round()
    return {name: tensor.detach().clone() for name, tensor in network.joined_state_dict().items()}


def _train_round(
    config: RunConfig,
    top: nn.Module,
    bottoms: Sequence[nn.Module],
    streams: Sequence[Iterator[tuple[Tensor, Tensor]]],
    seeds: Sequence[int],
    round_num: int,
) -> None:
    """tau merged steps."""
    training = config.training
    rate = learning_rate(round_num, training.learning_rate, training.learning_rate_decay, training.learning_rate_min)
    top_optimizer = make_sgd(top.parameters(), rate)
    optimizers = [make_sgd(bottom.parameters(), rate) for bottom in bottoms]
    for step in range(training.local_steps):
        drawn = [next(stream) for stream in streams]  # x (d_i, *sample), y (d_i,)
        for bottom, seed in zip(bottoms, seeds, strict=True):
            seed_dropout(bottom, seed_for(seed, "step", step))
        features = [bottom(x) for bottom, (x, _) in zip(bottoms, drawn, strict=True)]  # (d_i, F...)
        merged = torch.cat([z.detach() for z in features]).requires_grad_()  # (D, F...)
        seed_dropout(top, seed_for(config.seed, "top", round_num, step))
        top_optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(top(merged), torch.cat([y for _, y in drawn]))
        loss.backward()  # type: ignore[no-untyped-call]
        top_optimizer.step()
        assert merged.grad is not None
        slices = torch.split(merged.grad, [len(z) for z in features])  # (d_i, F...) each
        for z, gradient, optimizer in zip(features, slices, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            z.backward(gradient * (len(merged) / len(z)))
            optimizer.step()


def _mean(states: Sequence[Mapping[str, Tensor]], batch_sizes: Sequence[int]) -> dict[str, Tensor]:
    """sum_i d_i / D * state_i of what is floating point; the first state's of the rest (counters of batch-norm)."""
    shares = [d / sum(batch_sizes) for d in batch_sizes]
    mean = {name: tensor * shares[0] if tensor.is_floating_point() else tensor for name, tensor in states[0].items()}
    for state, share in zip(states[1:], shares[1:], strict=True):
        for name, tensor in mean.items():
            if tensor.is_floating_point():
                tensor.add_(state[name] * share)
    return mean
