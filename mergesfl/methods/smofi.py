"""SMoFi: one top per worker, whose momentum is fused at every step.

Yang, Zhu, Wang, Yang. "SMoFi: Step-wise Momentum Fusion for Split Federated Learning on Heterogeneous Data." AAAI 2026.
https://arxiv.org/abs/2511.09828

SplitFed-V1 with momentum SGD on the server; m the fused buffer, beta the momentum, g_i the gradient of top_i:

    for every step, in parallel:  m_i   <- beta * m + g_i            m, not its own m_i: that is the fusion
                                  top_i <- top_i - eta (1 - beta) m_i    dL_i/dz_i goes back to worker i
                                  m     <- mean of m_i over the workers of this step
    at the end of a round:        bottom = sum_i n_i / n * bottom_i,  top = sum_i n_i / n * top_i

So the tops share their past and differ in the present gradient only: they drift less [paper]. beta = 0 is SplitFed-V1.

The paper lets workers take different numbers of steps and weights the buffer of one that has finished by a staleness
factor. Here all take tau steps in step, so no buffer is ever stale and every factor is 1; a worker that is lost in
mid-round leaves the mean. m goes on into the next round [ours]; the bottoms are stepped without momentum [ours].
What is uncertain: only summaries of the paper were at hand. The form of the staleness factor, whether the mean is
weighted by data, whether m is reset between rounds, beta and the rate are not known from it; ours: an unweighted mean,
0.9, and a rate scaled by 1 - beta: unscaled, momentum moves the tops ten times as far as the plain SGD of the other
methods at the same learning rate 0.1, and training on HAR breaks down (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergesfl.methods.base import Method, MethodSettings, State, StepFeatures, copy_state, streams_always
from mergesfl.methods.split_program import work
from mergesfl.methods.splitfed_v1 import TopPerWorker, UniformSplitProgram
from mergesfl.training.aggregation import weighted_mean
from mergesfl.training.momentum import checked_copy, make_momentum_sgd, put_buffers, take_buffers, zero_buffers
from mergesfl.training.split import SplitModel

MOMENTUM = 0.9  # beta, the usual value [ours]


class FusedMomentumTops(TopPerWorker):
    """One top per worker, all with the same momentum at the start of a step.

    Implements `TopTrainer`, `StreamingTop` and `CarriedState`.
    """

    def __init__(self, top: nn.Module, momentum: float) -> None:
        super().__init__(top)
        self._momentum = momentum
        self._carried = zero_buffers(top)  # m between two rounds
        self._fused = self._carried  # m in a round

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """Every worker's top starts from the global one, and with the momentum of the last round."""
        super().open(worker_ids, rate)
        self._optimizers = {
            worker_id: make_momentum_sgd(top.parameters(), rate * (1 - self._momentum), self._momentum)
            for worker_id, top in self._tops.items()
        }
        self._fused = self._carried

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Forward and backward of these workers' tops; they will step from the fused momentum."""
        for one in arrived:
            put_buffers(self._optimizers[one.worker_id], self._tops[one.worker_id], self._fused)
        return super().feed(arrived)

    def end_step(self) -> float:
        """The fusion over those that were fed."""
        loss_nats = super().end_step()
        fed_ids = self._fed_ids()
        buffers = [take_buffers(self._optimizers[worker_id], self._tops[worker_id]) for worker_id in fed_ids]
        self._fused = weighted_mean(buffers, [1.0] * len(buffers))
        return loss_nats

    def close(self, weights: dict[str, float]) -> None:
        """The tops of the workers that finished are averaged; the momentum goes on."""
        super().close(weights)
        self._carried = self._fused

    def state_dict(self) -> dict[str, Tensor]:
        """The fused momentum by the names of the top's parameters."""
        return copy_state(self._carried)

    def load_state_dict(self, state: State) -> None:
        """Takes it back. Raises CheckpointError when it is not of this top."""
        self._carried = checked_copy(self._carried, state)


class SMoFiProgram(UniformSplitProgram):
    """The server's side of SMoFi (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, FusedMomentumTops(network.top, MOMENTUM))


METHOD = Method(
    "one top per worker, momentum fused at every step (AAAI 2026)", SMoFiProgram, work, check_streaming=streams_always
)
