"""Minibatch-SFL: feature merging alone.

Huang, Tian, Tang. "When MiniBatch SGD Meets SplitFed Learning: Convergence Analysis and Performance Evaluation." 2023.
https://arxiv.org/abs/2308.11953

    S       <- workers drawn at random, the same batch size d for all            plan()
    for k = 1..tau:
        z_i  = bottom_i(x_i)           on every worker i in S
        one step of the top on the mean loss over all D samples                  MergedTop.step()
        w_i <- w_i - eta * J_i^T g_i   g_i the gradient of its own mean loss
    w        = sum_i d_i / D * w_i     bottoms as in federated learning          take(), close()

The top is trained as by minibatch SGD: it never drifts, whatever the workers' labels are; the bottoms still do [paper].
The weights are d_i, equal unless a worker has fewer samples than a batch [ours]: the merged step gives every sample the
same weight, so bottoms weighted by samples of a step make one round of one step ONE step of joint SGD (identity c).
What is uncertain: whether the paper weights the bottoms by data instead, as SplitFed does.
Equal to `mergesfl` with method.regulation = false, to the bit (tests/test_methods_minibatch_sfl.py).
"""

from __future__ import annotations

import torch

from mergesfl.methods.base import Method, MethodSettings
from mergesfl.methods.merged_top import MergedTop, check_streaming_merge
from mergesfl.methods.split_program import work
from mergesfl.methods.splitfed_v1 import UniformSplitProgram
from mergesfl.training.split import SplitModel


class MinibatchSFLProgram(UniformSplitProgram):
    """The server's side of Minibatch-SFL (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, MergedTop(network.top))

    def weight_of(self, worker_id: str) -> int:
        """d_i."""
        return self._current_plan().batch_size_of(worker_id)


METHOD = Method(
    "feature merging alone, random workers with equal batches (2023)",
    MinibatchSFLProgram,
    work,
    merges=True,
    check_streaming=check_streaming_merge,
)
