"""AdaSFL: batch sizes by speed, one copy of the top per worker, the copies averaged in every step.

Liao, Xu, Xu, Yao, Wang, Qiao. "Accelerating Federated Learning With Data and Model Parallelism in Edge Computing."
IEEE/ACM Transactions on Networking 32(1), 2024. https://doi.org/10.1109/TNET.2023.3299851

    d_i  = max(1, floor(D_max * t_min / t_i))         t_i seconds per sample; t_min of the fastest       plan()
    for k = 1..tau_h:
        top_i <- one step on worker i's own mean loss; dL_i/dz_i goes back, taken with the top before it
        top    = sum_i d_i / D * top_i                in every step                                 AveragedTops
    bottom = sum_i d_i / D * bottom_i                                                               weight_of()
    tau_h  = ceil(tau * sqrt(F_h / F_0)), 1 to tau    only with `adapt_local_steps`          adapted_num_steps()

The copies never live longer than one plain SGD step, so their average is the step with the averaged gradient, and one
top is enough (mergesfl.training.sharing); buffers (batch-norm) are averaged. It follows that a top without batch-norm
and dropout trains exactly as on the merged batch: what is left between AdaSFL and MergeSFL is whom the planner chooses.

What is uncertain: the paper adapts tau to a convergence bound that it derives; the rule was not at hand. Ours is that
of AdaComm (Wang, Joshi, MLSys 2019, https://arxiv.org/abs/1810.08313), which minimises a bound of the same kind: F is
the mean training loss of a round, so that tau falls as the loss does. Without the switch tau stays, for a comparison
under equal local steps. [ours]: the workers are drawn at random, t_min is that of those drawn, and d_i is never more
than the samples that worker i has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.speed_shares import plan_by_speed
from mergesfl.methods.base import Method, MethodSettings, State, StepFeatures
from mergesfl.methods.split_program import SplitProgram, seed_of_turn, work
from mergesfl.training.aggregation import weighted_mean
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.schedule import make_sgd
from mergesfl.training.sharing import backward_share
from mergesfl.training.split import SplitModel

LOSSES = "adasfl/losses_nats"  # (2,) F_0 and F_h; no tensor of a network is named so


def adapted_num_steps(first_nats: float, last_nats: float, num_steps: int) -> int:
    """tau_h = ceil(tau * sqrt(F_h / F_0)), at least 1, at most tau.

    >>> adapted_num_steps(first_nats=2.0, last_nats=0.5, num_steps=42)
    21
    """
    if first_nats <= 0:
        return num_steps
    return min(num_steps, max(1, math.ceil(num_steps * math.sqrt(max(last_nats, 0.0) / first_nats))))


class AveragedTops:
    """The average of one top per worker after every step, as one top."""

    def __init__(self, top: nn.Module) -> None:
        self._top = top
        self._optimizer: torch.optim.Optimizer

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """A new round has a new learning rate; plain SGD has no other state."""
        self._optimizer = make_sgd(self._top.parameters(), rate)

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """Gradients of each worker's own mean loss, and the mean loss over all D samples."""
        sizes = [len(one.labels) for one in arrived]  # d_i
        self._optimizer.zero_grad(set_to_none=True)
        before, after = self._buffers(), []
        gradients, loss_nats = [], 0.0
        for one, size in zip(arrived, sizes, strict=True):
            self._top.load_state_dict(before, strict=False)
            seed_dropout(self._top, seed_of_turn(seed, one.worker_id, len(arrived)))
            result = backward_share(self._top, one.features, one.labels, size / sum(sizes))
            gradients.append(result.gradient)
            loss_nats += size / sum(sizes) * result.loss_nats
            after.append(self._buffers())
        self._optimizer.step()
        self._top.load_state_dict(weighted_mean(after, [float(size) for size in sizes]), strict=False)
        return gradients, loss_nats

    def close(self, weights: dict[str, float]) -> None:
        """The copies were averaged in every step."""

    def _buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that belong to the state."""
        parameters = {name for name, _ in self._top.named_parameters()}
        return {name: t.clone() for name, t in self._top.state_dict().items() if name not in parameters}


class AdaSFLProgram(SplitProgram):
    """The server's side of AdaSFL (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, AveragedTops(network.top))
        self._losses_of_rounds_nats: tuple[float, float] | None = None  # F_0, F_h

    @property
    def plans_by_speed(self) -> bool:
        """d_i follows the speeds."""
        return True

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Draws the participants at random and gives each a batch that takes all about the same time."""
        s = self._settings
        num_steps = s.num_steps
        if s.adapt_local_steps and self._losses_of_rounds_nats is not None:
            num_steps = adapted_num_steps(*self._losses_of_rounds_nats, num_steps)
        return plan_by_speed(round_num, fleet, s.participants_per_round, s.batch_size, num_steps, generator)

    def weight_of(self, worker_id: str) -> int:
        """d_i."""
        return self._current_plan().batch_size_of(worker_id)

    def close(self) -> float | None:
        """Averages the bottoms and remembers the loss for the next plan."""
        loss_nats = super().close()
        if loss_nats is not None:
            first_nats = self._losses_of_rounds_nats[0] if self._losses_of_rounds_nats else loss_nats
            self._losses_of_rounds_nats = (first_nats, loss_nats)
        return loss_nats

    def state_dict(self) -> dict[str, Tensor]:
        """The joined network and, once a round has closed, the two losses that tau follows."""
        losses = self._losses_of_rounds_nats
        memory = {} if losses is None else {LOSSES: torch.tensor(losses, dtype=torch.float64)}  # (2,)
        return {**super().state_dict(), **memory}

    def load_state_dict(self, state: State) -> None:
        """Takes both back."""
        super().load_state_dict({name: tensor for name, tensor in state.items() if name != LOSSES})
        losses = state[LOSSES].tolist() if LOSSES in state else None
        self._losses_of_rounds_nats = None if losses is None else (losses[0], losses[1])


METHOD = Method("batch sizes by speed, tops averaged in every step (ToN 2024)", AdaSFLProgram, work)
