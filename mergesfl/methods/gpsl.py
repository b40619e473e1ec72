"""GPSL: the server fixes the merged batch and draws who sends how many samples of it.

Kohankhaki, Ayad, Barhoush, Schmeink. "Parallel Split Learning with Global Sampling." 2024. https://arxiv.org/abs/2407.15738

    (d_1, ..., d_N) <- how many of B samples drawn from the pool of all data are worker i's     plan()
    for k = 1..tau:
        z_i  = bottom_i(x_i)           d_i samples, drawn by the worker without replacement
        one step of the top on the mean loss over all B samples                                 MergedTop.step()
        w_i <- w_i - eta * J_i^T g_i
    w        = sum_i d_i / B * w_i                                                      take(), close()

Without replacement, so the merged batch is distributed like one of central training, however the labels lie on the
workers; batches do not grow with their number [paper]. All N workers are in the pool: participants_per_round serves
only for B = participants_per_round * batch_size, the merged batch of the methods beside it [ours].

What differs [ours]: the paper draws anew for every step; a plan here holds for a round, so the d_i are drawn once per
round, and a worker drawn 0 samples misses all of it. Over rounds the mean of d_i is still B * n_i / n. The paper keeps
one bottom for all; here the bottoms take tau steps apart and are averaged with d_i, for tau = 1 the same (identity c).
What is uncertain: how the paper goes on when workers leave; here the step goes on with fewer samples.
"""

from __future__ import annotations

import numpy as np
import torch

from mergesfl.control.data_shares import plan_pooled
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.methods.base import Method, MethodSettings
from mergesfl.methods.merged_top import MergedTop, check_streaming_merge
from mergesfl.methods.split_program import SplitProgram, work
from mergesfl.training.split import SplitModel


class GPSLProgram(SplitProgram):
    """The server's side of GPSL (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, MergedTop(network.top))

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Draws the batch sizes from the pooled data sets."""
        s = self._settings
        return plan_pooled(round_num, fleet, s.participants_per_round * s.batch_size, s.num_steps, generator)

    def weight_of(self, worker_id: str) -> int:
        """d_i."""
        return self._current_plan().batch_size_of(worker_id)


METHOD = Method(
    "a merged batch of fixed size, drawn from the pooled data sets (2024)",
    GPSLProgram,
    work,
    merges=True,
    check_streaming=check_streaming_merge,
)
