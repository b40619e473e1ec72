"""SplitFed-V1: split learning in parallel, one top per worker, bottoms and tops averaged.

Thapa, Chamikara, Camtepe, Sun. "SplitFed: When Federated Learning Meets Split Learning." AAAI 2022, Algorithm 1 and 2.
https://arxiv.org/abs/2004.12088

    for every step, in parallel:  worker i sends z_i; its own top_i steps on its own mean loss; dL_i/dz_i goes back
    at the end of a round:        bottom = sum_i n_i / n * bottom_i,  top = sum_i n_i / n * top_i

n_i are the samples of worker i's data set, n the sum over the participants [paper]. Workers are drawn at random and all
have the same batch size (capped by what a worker has [ours]). What is uncertain: the paper averages after a local
epoch; here after tau local steps, the same for all methods, so that rounds compare [ours].
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import plan_uniform
from mergesfl.methods.base import Method, MethodSettings, StepFeatures, streams_always
from mergesfl.methods.split_program import SplitProgram, seed_of_turn, work
from mergesfl.training.aggregation import weighted_mean
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.merging import OpenStep
from mergesfl.training.schedule import make_sgd
from mergesfl.training.split import SplitModel


class TopPerWorker:
    """One copy of the top per worker, averaged at the end of the round (`TopTrainer` and `StreamingTop`)."""

    def __init__(self, top: nn.Module) -> None:
        self._top = top
        self._tops: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._batch_sizes: dict[str, int] = {}  # worker_id -> d_i of the step, in plan order
        self._seed = 0
        self._open_steps: dict[str, OpenStep] = {}  # of the workers that were fed
        self._num_fed: dict[str, int] = {}  # worker_id -> samples fed

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """Every worker's top starts from the global one."""
        self._tops = {worker_id: copy.deepcopy(self._top) for worker_id in worker_ids}
        self._optimizers = {worker_id: make_sgd(top.parameters(), rate) for worker_id, top in self._tops.items()}

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """One step of each top on its own worker's features; the loss is the mean over all samples."""
        self.begin_step({one.worker_id: len(one.labels) for one in arrived}, seed, in_order=True)
        gradients = self.feed(arrived)
        return gradients, self.end_step()

    def begin_step(self, batch_sizes: Mapping[str, int], seed: int, in_order: bool) -> None:
        """Opens a step. No sum over workers is made in it but that of the losses, and that always in plan order."""
        self._batch_sizes, self._seed, self._open_steps, self._num_fed = dict(batch_sizes), seed, {}, {}

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Forward and backward of the tops of these workers."""
        gradients = []
        for one in arrived:
            top, batch_size = self._tops[one.worker_id], self._batch_sizes[one.worker_id]
            if one.worker_id not in self._open_steps:
                self._open_steps[one.worker_id] = OpenStep(top, self._optimizers[one.worker_id], batch_size)
            seed_dropout(top, seed_of_turn(self._seed, one.worker_id, len(self._batch_sizes), one.part))
            step = self._open_steps[one.worker_id]
            gradients += step.feed([one.features], [one.labels], batch_sizes=[batch_size])
            self._num_fed[one.worker_id] = self._num_fed.get(one.worker_id, 0) + len(one.labels)
        return gradients

    def end_step(self) -> float:
        """One step of each top that was fed; the mean loss over all samples."""
        loss_sum_nats, num_samples = 0.0, 0
        for worker_id in self._fed_ids():
            size = self._num_fed[worker_id]
            loss_sum_nats += self._open_steps[worker_id].close() * size
            num_samples += size
        return loss_sum_nats / num_samples

    def _fed_ids(self) -> list[str]:
        """Those that were fed in this step, in plan order."""
        return [worker_id for worker_id in self._batch_sizes if worker_id in self._num_fed]

    def close(self, weights: dict[str, float]) -> None:
        """top = weighted mean of the tops of the workers that finished."""
        states = [self._tops[worker_id].state_dict() for worker_id in weights]
        self._top.load_state_dict(weighted_mean(states, list(weights.values())))
        self._tops, self._optimizers = {}, {}


class UniformSplitProgram(SplitProgram):
    """Random selection, same batch size, data-weighted bottoms; the base of the SplitFed methods."""

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Draws the participants at random."""
        s = self._settings
        return plan_uniform(
            round_num, fleet, s.participants_per_round, s.batch_size, s.num_steps, s.num_steps, generator
        )

    def weight_of(self, worker_id: str) -> int:
        """n_i, the samples of its data set."""
        return self._num_samples[worker_id]


class SplitFedV1Program(UniformSplitProgram):
    """The server's side of SplitFed-V1 (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, TopPerWorker(network.top))


METHOD = Method(
    "one top per worker, bottoms and tops averaged (AAAI 2022)", SplitFedV1Program, work, check_streaming=streams_always
)
