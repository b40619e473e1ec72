"""SplitFed-V2: one top, trained with one worker after the other; bottoms averaged.

Thapa, Chamikara, Camtepe, Sun. "SplitFed: When Federated Learning Meets Split Learning." AAAI 2022, section on SFLV2.
https://arxiv.org/abs/2004.12088

    for every step:         for i in a random order: top steps on z_i's own mean loss; dL_i/dz_i goes back
    at the end of a round:  bottom = sum_i n_i / n * bottom_i;  the top is never averaged

What is uncertain: the paper lets the top see one worker's whole local epoch before the next one's; here the workers run
in step, so the top takes one batch of every worker in turn, in an order drawn anew for each step [ours]. That forgets
less than the paper's order; for one local step per round both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergesfl.methods.base import Method, MethodSettings, StepFeatures
from mergesfl.methods.split_program import seed_of_turn, work
from mergesfl.methods.splitfed_v1 import UniformSplitProgram
from mergesfl.seeding import generator_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.merging import single_step
from mergesfl.training.schedule import make_sgd
from mergesfl.training.split import SplitModel


class SequentialTop:
    """One top that steps once per worker and step."""

    def __init__(self, top: nn.Module) -> None:
        self._top = top
        self._optimizer: torch.optim.Optimizer

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """A new round has a new learning rate."""
        self._optimizer = make_sgd(self._top.parameters(), rate)

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """One step per worker, in a random order; gradients are returned in plan order."""
        gradients: list[Tensor] = [one.features for one in arrived]  # every place is overwritten below
        loss_sum_nats = 0.0
        for i in generator_for(seed, "order").permutation(len(arrived)):
            one = arrived[int(i)]
            seed_dropout(self._top, seed_of_turn(seed, one.worker_id, len(arrived)))
            result = single_step(self._top, self._optimizer, one.features, one.labels)
            gradients[int(i)] = result.gradient
            loss_sum_nats += result.loss_nats * len(one.labels)
        return gradients, loss_sum_nats / sum(len(one.labels) for one in arrived)

    def close(self, weights: dict[str, float]) -> None:
        """The top is never averaged."""


class SplitFedV2Program(UniformSplitProgram):
    """The server's side of SplitFed-V2 (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, SequentialTop(network.top))


METHOD = Method("one top, one worker after the other; bottoms averaged (AAAI 2022)", SplitFedV2Program, work)
