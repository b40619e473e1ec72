"""SCALA: concatenated activations and logit-adjusted losses.

Yang, Liu. "SCALA: Split Federated Learning with Concatenated Activations and Logit Adjustments." 2024.
https://arxiv.org/abs/2405.04875

P_i (C,) label distribution of worker i's data, P = sum_i n_i P_i / n that of the participants' concatenated data:

    S       <- workers drawn at random; d_i = B * n_i / sum_j n_j                   plan()
    for k = 1..tau:
        z    = [z_1; z_2; ...], f = top(z)                                          LogitAdjustedTop.step()
        L    = mean over B of cross-entropy(f + ln P, y):    one step of the top
        L_i  = mean over d_i of cross-entropy(f + ln P_i, y): dL_i/dz_i goes to worker i, the top is not touched
        w_i <- w_i - eta * J_i^T dL_i/dz_i
    w        = sum_i n_i / n * w_i                                          take(), close()

ln P makes up for who happens to take part, ln P_i for the labels of one worker: the rare is not forgotten [paper].
Evaluation uses f alone.

Decided here [ours]: one forward serves both losses, so dL_i/dz_i is taken with the top before its step; the priors are
those of the data sets, not of the batches drawn, and P is of the workers that still send; a class that a worker does
not have counts as PRIOR_FLOOR; B = participants_per_round * batch_size, the merged batch of the methods beside it.
What is uncertain: only summaries of the paper were at hand, not its equations. Whether it takes the gradients of the
activations before or after the step of the top, and how it treats absent classes, are guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mergesfl.control.data_shares import plan_in_proportion
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.methods.base import Method, MethodSettings, StepFeatures
from mergesfl.methods.merged_top import MergedTop
from mergesfl.methods.split_program import SplitProgram, work
from mergesfl.training.logit_adjustment import log_prior
from mergesfl.training.split import SplitModel


class LogitAdjustedTop(MergedTop):
    """A merged step adjusted by P, and for every worker the gradient adjusted by its own P_i."""

    def __init__(self, top: nn.Module, momentum: float = 0.0) -> None:
        super().__init__(top, momentum)
        self._label_counts: dict[str, Tensor] = {}

    def know_labels(self, label_counts: Mapping[str, Sequence[int]]) -> None:
        """Learns n_i * P_i (C,), in samples, of every worker that may send features in the coming round."""
        self._label_counts = {name: torch.tensor(counts, dtype=torch.float64) for name, counts in label_counts.items()}

    def priors_of(self, arrived: Sequence[StepFeatures]) -> tuple[Tensor | None, list[Tensor] | None]:
        """ln P and ln P_i (C,). Workers that disclose no labels are neutral in both."""
        counts = [self._label_counts[one.worker_id] for one in arrived]  # (C,) each
        return log_prior(torch.stack(counts).sum(0)), [log_prior(one) for one in counts]


class SCALAProgram(SplitProgram):
    """The server's side of SCALA (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        self._top = LogitAdjustedTop(network.top)
        super().__init__(network, settings, device, self._top)

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Draws the participants at random and shares B among them by their data."""
        s = self._settings
        merged_samples = s.participants_per_round * s.batch_size
        return plan_in_proportion(round_num, fleet, s.participants_per_round, merged_samples, s.num_steps, generator)

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """Starts the round; the label distributions are those of the fleet now."""
        self._top.know_labels({worker.worker_id: worker.label_counts for worker in fleet.workers})
        super().open(plan, fleet)

    def weight_of(self, worker_id: str) -> int:
        """n_i, the samples of its data set."""
        return self._num_samples[worker_id]


METHOD = Method("feature merging with logit-adjusted losses (2024)", SCALAProgram, work, merges=True)
