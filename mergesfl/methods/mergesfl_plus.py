"""MergeSFL+: MergeSFL with what measured better than the paper's choices. Everything here is [ours].

The round is that of MergeSFL (mergesfl.py); with all switches off it is MergeSFL to the bit. Added, each by a key of
the configuration section `method`, its value in the preset standing in mergesfl/config.py (PRESETS):

    top_momentum        m <- beta m + g, w <- w - eta (1 - beta) m         momentum SGD on the merged top; in the long
                        run its steps are as long as those of plain SGD         (the idea: SMoFi, arXiv 2511.09828)
    logit_adjustment    cross-entropy(top(z) + ln P, y), P of the merged batch      (Menon et al., ICLR 2021; SCALA)
    proximal            g_i <- g_i + mu (w_i - w)      bottoms stay near the global one      (FedProx, MLSys 2020)
    model_averaging     the model that is evaluated and exported is a running mean over the rounds' models
                        (Polyak averaging); the training goes on from the newest model

The planner's part of the preset (time model, idle time, reference distribution) lies in mergesfl/control.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.methods.base import Method, MethodSettings, Setting, State, StepFeatures, copy_state
from mergesfl.methods.merged_top import MergedTop
from mergesfl.methods.mergesfl import MergeSFLProgram, check_streaming
from mergesfl.methods.split_program import work
from mergesfl.training.logit_adjustment import log_prior
from mergesfl.training.running_mean import running_mean
from mergesfl.training.split import SplitModel

MEAN_PREFIX = "running-mean/"  # of the tensors of the mean in a program's state; no network has such names
MEAN_COUNT = "running-mean-rounds"


class PlusTop(MergedTop):
    """The merged step with momentum and, if asked for, adjusted by the labels of the merged batch itself."""

    def __init__(self, top: nn.Module, momentum: float, adjusts_logits: bool) -> None:
        super().__init__(top, momentum)
        self._step_share = 1.0 - momentum
        self._adjusts_logits = adjusts_logits
        self.num_classes = 0  # C, known when a round opens

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """With momentum beta a gradient is stepped along 1 / (1 - beta) times in all: the rate makes up for it."""
        super().open(worker_ids, rate * self._step_share)

    def priors_of(self, arrived: Sequence[StepFeatures]) -> tuple[Tensor | None, list[Tensor] | None]:
        """(C,) ln P of the D samples of this step, one more counted of each class: absent is rare, not impossible."""
        if not self._adjusts_logits:
            return None, None
        labels = torch.cat([one.labels for one in arrived])  # (D,)
        return log_prior(torch.bincount(labels, minlength=self.num_classes) + 1.0), None


class MergeSFLPlusProgram(MergeSFLProgram):
    """The server's side of MergeSFL+ (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device)
        self._plus_top: PlusTop | None = None
        if settings.merging:
            self._plus_top = PlusTop(network.top, settings.top_momentum, settings.logit_adjustment)
            self._trainer = self._plus_top
        self._mean: dict[str, Tensor] | None = None  # of the joined models of the closed rounds
        self._num_rounds = 0
        self._mean_network = copy.deepcopy(network) if settings.model_averaging else network

    @property
    def network(self) -> SplitModel:
        """The running mean of the models, or without averaging the newest."""
        return self._mean_network

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """The adjusted loss must know C."""
        if self._plus_top is not None:
            self._plus_top.num_classes = fleet.num_classes
        super().open(plan, fleet)

    def settings_for(self, worker_id: str) -> dict[str, Setting]:
        """Beside the learning rate the weight of the proximal term, if there is one."""
        settings = super().settings_for(worker_id)
        return {**settings, "proximal": self._settings.proximal} if self._settings.proximal else settings

    def close(self) -> float | None:
        """Closes the round as MergeSFL does and takes the new model into the mean."""
        loss_nats = super().close()
        memory = self._settings.model_averaging
        if memory:
            state = copy_state(self._network.joined_state_dict())
            self._mean = running_mean(self._mean, state, self._num_rounds, memory)
            self._num_rounds += 1
            self._mean_network.load_joined_state_dict(self._mean)
        return loss_nats

    def state_dict(self) -> dict[str, Tensor]:
        """MergeSFL's, and the mean with the number of its rounds."""
        state = super().state_dict()
        if self._mean is not None:
            state |= {MEAN_PREFIX + name: tensor.clone() for name, tensor in self._mean.items()}
            state[MEAN_COUNT] = torch.tensor(self._num_rounds)
        return state

    def load_state_dict(self, state: State) -> None:
        """Takes both back. Raises CheckpointError when a name or shape is not of this network."""
        mean = {name[len(MEAN_PREFIX) :]: tensor for name, tensor in state.items() if name.startswith(MEAN_PREFIX)}
        others = (MEAN_COUNT, *(MEAN_PREFIX + name for name in mean))
        super().load_state_dict({name: tensor for name, tensor in state.items() if name not in others})
        self._mean = copy_state(mean) or None
        self._num_rounds = int(state[MEAN_COUNT]) if mean else 0
        if self._mean_network is not self._network:
            self._mean_network.load_joined_state_dict(mean or self._network.joined_state_dict())


METHOD = Method(
    "MergeSFL with what measured better: momentum, averaged models, a planner with time [ours]",
    MergeSFLPlusProgram,
    work,
    merges=True,
    check_streaming=check_streaming,
)
