"""MergeSFL: feature merging and batch size regulation.

Liao, Xu, Xu, Wang, Yao, Qiao. "MergeSFL: Split Federated Learning with Feature Merging and Batch Size Regulation."
ICDE 2024. https://arxiv.org/abs/2311.13348

One round h, with the paper's symbols beside our names:

    S, d_i   <- Algorithm 1                                 plan()               (Eq. 9-14)
    for k = 1..tau:
        z_i  = bottom_i(x_i)          on every worker i in S                      d_i samples
        z    = [z_1; z_2; ...]        in plan order          MergedTop.step()     D = sum d_i samples
        L    = mean cross-entropy(top(z), y) over all D, one step of the top
        g_i  = (D / d_i) * dL/dz_i    back to worker i                            [code]
        w_i <- w_i - eta * J_i^T g_i  on every worker i
    w        = sum_i d_i / D * w_i                           take(), close()      (Eq. 17)

What is uncertain: how the bottoms' rate follows d_i (a switch, equal by default), and in Algorithm 1 the genetic search
and the solver of Eq. 14, which are not published: see mergesfl/control, and its searches and limits marked [ours].

Two switches give the ablations: without `merging` every worker has a top of its own, averaged at the end of the round
with the same weights; without `regulation` the workers are drawn at random and all have the same batch size.
"""

from __future__ import annotations

import numpy as np
import torch

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import plan_round, plan_uniform
from mergesfl.control.settings import ControlSettings
from mergesfl.methods.base import Method, MethodSettings
from mergesfl.methods.merged_top import MergedTop, check_streaming_merge
from mergesfl.methods.split_program import SplitProgram, TopTrainer, work
from mergesfl.methods.splitfed_v1 import TopPerWorker
from mergesfl.training.split import SplitModel


class MergeSFLProgram(SplitProgram):
    """The server's side of MergeSFL (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        trainer: TopTrainer = MergedTop(network.top) if settings.merging else TopPerWorker(network.top)
        super().__init__(network, settings, device, trainer)

    @property
    def plans_by_speed(self) -> bool:
        """Regulation does."""
        return self._settings.regulation

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Algorithm 1, or without regulation a random selection with the same batch size."""
        s = self._settings
        if not s.regulation:
            return plan_uniform(
                round_num, fleet, s.participants_per_round, s.batch_size, s.num_steps, s.num_steps, generator
            )
        budget_bytes = s.ingress_budget_bytes or (
            s.participants_per_round * s.batch_size * fleet.feature_bytes_per_sample
        )
        control = ControlSettings(
            max_batch_size=s.batch_size,
            ingress_budget_bytes=budget_bytes,
            num_steps=s.num_steps,
            num_exchanges=s.num_steps,
            kl_epsilon_nats=s.kl_epsilon_nats,
            fill_budget=s.fill_budget,
            allow_above_max=s.allow_above_max,
            max_participants=s.max_participants,
            search=s.search,
            reference=s.reference,
            idle_weight_nats=s.idle_weight_nats,
            priority_weight_nats=s.priority_weight_nats,
        )
        return plan_round(round_num, fleet, control, generator)

    def weight_of(self, worker_id: str) -> int:
        """d_i (Eq. 17)."""
        return self._current_plan().batch_size_of(worker_id)


def check_streaming(network: SplitModel, settings: MethodSettings) -> None:
    """Raises ConfigError like `check_streaming_merge`; without merging there is nothing to wait for."""
    if settings.merging:
        check_streaming_merge(network, settings)


METHOD = Method(
    "feature merging and batch size regulation (ICDE 2024)",
    MergeSFLProgram,
    work,
    merges=True,
    check_streaming=check_streaming,
)
