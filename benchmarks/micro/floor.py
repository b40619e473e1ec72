"""The floor: the steps of a split run back to back in one process, in plain torch, without any framework.

The same bottoms, top, batches, dropout masks and steps as a run of `minibatch-sfl` (one merged step of the top, bottoms
averaged with the weights d_i), and nothing else: no messages, sessions, threads, checks, clock or records. The
parameters that come out are those of the run to the bit (tests/test_benchmarks_floor.py): nothing was left out.
Legend: D merged samples, d_i samples of worker i in one step, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
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
from mergesfl.training.split import SplitModel
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


class BottomSide:
    """What one worker computes, in plain torch."""

    def __init__(self, config: RunConfig, dataset: Dataset, bottom: nn.Module) -> None:
        self._config, self._dataset = config, dataset
        self.bottom = bottom
        self._features: Tensor

    def begin(self, round_num: int, name: str, rows: NDArray[np.int64], d: int) -> None:
        """A round of this worker, whose bottom has been loaded; its samples are those rows."""
        config, train = self._config, self._dataset.train
        generator = generator_for(config.seed, "batches", name, round_num)
        self._batches = Batches(train.x[rows], train.y[rows], d, generator, self._dataset.scale, True)
        self._seed = seed_for(config.seed, "worker", name, round_num)
        self._optimizer = make_sgd(self.bottom.parameters(), rate_of(config, round_num))

    def forward(self, step: int) -> tuple[Tensor, Tensor]:
        """Features (d, F...) and labels (d,) of the next batch."""
        x, y = next(self._batches)  # (d, *sample), (d,)
        seed_dropout(self.bottom, seed_for(self._seed, "step", step))
        self._features = self.bottom(x)
        return self._features.detach(), y

    def backward(self, gradient: Tensor) -> None:
        """A step with the gradient (d, F...) of the mean loss over these features."""
        self._optimizer.zero_grad(set_to_none=True)
        self._features.backward(gradient)  # type: ignore[no-untyped-call]
        self._optimizer.step()


class TopSide:
    """What the server computes, in plain torch."""

    def __init__(self, config: RunConfig, top: nn.Module) -> None:
        self._config, self._top = config, top

    def begin(self, round_num: int) -> None:
        """A round."""
        self._round_num = round_num
        self._optimizer = make_sgd(self._top.parameters(), rate_of(self._config, round_num))

    def step(self, step: int, features: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """One merged step; per worker the gradient (d_i, F...) of its own mean loss."""
        merged = torch.cat(list(features)).requires_grad_()  # (D, F...)
        seed_dropout(self._top, seed_for(self._config.seed, "top", self._round_num, step))
        self._optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self._top(merged), torch.cat(list(labels)))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        assert merged.grad is not None
        slices = torch.split(merged.grad, [len(z) for z in features])  # (d_i, F...) each
        return [gradient * (len(merged) / len(gradient)) for gradient in slices]


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
    network = fresh_network(config, dataset)
    rows_of = shares(config, dataset)
    num_sides = max(len(played.worker_ids) for played in rounds)
    all_sides = [BottomSide(config, dataset, copy.deepcopy(network.bottom)) for _ in range(num_sides)]
    top = TopSide(config, network.top)
    for round_num, played in enumerate(rounds):
        sides = all_sides[: len(played.worker_ids)]
        for side, name, d in zip(sides, played.worker_ids, played.batch_sizes, strict=True):
            side.bottom.load_state_dict(network.bottom.state_dict())
            side.begin(round_num, name, rows_of[name], d)
        top.begin(round_num)
        for step in range(config.training.local_steps):
            features, labels = zip(*[side.forward(step) for side in sides], strict=True)  # (d_i, F...), (d_i,)
            for side, gradient in zip(sides, top.step(step, features, labels), strict=True):
                side.backward(gradient)
        network.bottom.load_state_dict(mean([side.bottom.state_dict() for side in sides], played.batch_sizes))
        after_round()
    return {name: tensor.detach().clone() for name, tensor in network.joined_state_dict().items()}


def fresh_network(config: RunConfig, dataset: Dataset) -> SplitModel:
    """As every run of this configuration begins."""
    network = place(build_network(config, dataset), torch.device("cpu"))
    network.train()
    return network


def shares(config: RunConfig, dataset: Dataset) -> dict[str, NDArray[np.int64]]:
    """The rows of every worker by its name."""
    assignments = draw_partition(config, dataset).assignments
    return {worker_name(index): rows for index, rows in enumerate(assignments)}


def rate_of(config: RunConfig, round_num: int) -> float:
    """The learning rate of a round."""
    training = config.training
    return learning_rate(round_num, training.learning_rate, training.learning_rate_decay, training.learning_rate_min)


def mean(states: Sequence[Mapping[str, Tensor]], batch_sizes: Sequence[int]) -> dict[str, Tensor]:
    """sum_i d_i / D * state_i of what is floating point, summed in float64; of the rest the first state's."""
    return {name: _mean_of([state[name] for state in states], batch_sizes) for name in states[0]}


def _mean_of(tensors: Sequence[Tensor], batch_sizes: Sequence[int]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = tensors[0].double() * batch_sizes[0]
    for tensor, d in zip(tensors[1:], batch_sizes[1:], strict=True):
        total.add_(tensor.double() * d)
    return (total / sum(batch_sizes)).to(tensors[0].dtype)
