"""What a method is: one program for the parameter server, one function for the worker, and no input or output.

The only hole through which a method reaches the network is the function `exchange(step, z, y) -> wait` that the
worker's side is given: it sends, and `wait()` returns the gradient. Between the two there is time for the next part of
the batch, if the run sends one in parts (mergesfl/parts.py).

Legend: d_i samples of worker i in one step, D their sum, F... shape of a sample at the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.training.schedule import learning_rate
from mergesfl.training.split import SplitModel

Setting = int | float | str | bool
State = Mapping[str, Tensor]
# (step, z (d_i, F...), y (d_i,)) -> a function that waits for dL/dz (d_i, F...). Called for each part of a batch in
# their order, and then what it returned in the same order; L is the mean loss over the whole batch.
Exchange = Callable[[int, Tensor, Tensor], Callable[[], Tensor]]
Batches = Iterator[tuple[Tensor, Tensor]]  # endless (x (d_i, *sample), y (d_i,))

# A worker whose settings hold this (true) may return fewer tensors than it was given; see ServerProgram.settings_for.
MAY_OMIT_TENSORS = "may_omit_tensors"


@dataclass(frozen=True)
class MethodSettings:
    """Everything a program turns on; the same names as in the configuration."""

    seed: int
    num_steps: int  # tau
    batch_size: int  # D_max
    participants_per_round: int
    learning_rate: float
    learning_rate_decay: float
    learning_rate_min: float
    sample_shape: tuple[int, ...]  # of the data, without the batch
    merging: bool = True
    regulation: bool = True
    adapt_local_steps: bool = False
    top_momentum: float = 0.0
    logit_adjustment: bool = False
    proximal: float = 0.0
    model_averaging: float = 0.0
    bottom_learning_rate: str = "equal"
    ingress_budget_bytes: int | None = None
    max_participants: int | None = None  # of a regulated round
    search: str = "auto"
    reference: str = "uniform"
    kl_epsilon_nats: float = 0.05
    idle_weight_nats: float = 0.0
    priority_weight_nats: float = 0.002
    fill_budget: bool = True
    allow_above_max: bool = True

    def rate_at(self, round_num: int) -> float:
        """The learning rate of this round [code]."""
        return learning_rate(round_num, self.learning_rate, self.learning_rate_decay, self.learning_rate_min)


@dataclass(frozen=True)
class StepFeatures:
    """What one worker sent in one step, or in one part of it: features (d_i, F...) and labels (d_i,), or fewer samples.

    They are on the device of the top. The features may be read until the step is over: then others take their memory.
    """

    worker_id: str
    features: Tensor
    labels: Tensor
    part: int = 0


@dataclass(frozen=True)
class WorkerUpdate:
    """What one worker brings back from a round; its state is in main memory, and only read."""

    worker_id: str
    state: State
    num_samples: int  # trained in this round
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Assignment:
    """What one worker is asked to do in one round."""

    round_num: int
    num_steps: int
    batch_size: int
    settings: Mapping[str, Setting]
    state: State
    seed: int  # of this worker in this round
    parts_per_step: int = 1  # in so many parts a batch is exchanged, each with samples, so perhaps fewer


@dataclass(frozen=True)
class WorkResult:
    """What `work` returns: the trained state and, of a method that computes the loss itself, its mean."""

    state: dict[str, Tensor]
    num_samples: int
    metrics: Mapping[str, float]


class ServerProgram(Protocol):
    """The parameter server's side of a method. `merge` is called only when a plan has exchanges."""

    @property
    def network(self) -> SplitModel:
        """The global model as it stands after the last closed round, for evaluation and export."""
        ...

    @property
    def plans_by_speed(self) -> bool:
        """Whether `plan` asks how fast the workers are: else nobody surveys them for it."""
        ...

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Decides who takes part and with which batch size. No side effect."""
        ...

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """Starts the round of this plan."""
        ...

    def settings_for(self, worker_id: str) -> dict[str, Setting]:
        """What `work` on this worker must know; with MAY_OMIT_TENSORS also what the server accepts from it."""
        ...

    def state_for(self, worker_id: str) -> State:
        """Parameters and buffers that this worker starts the round from."""
        ...

    def merge(self, step: int, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Trains the top on one step's features (in plan order) and returns dL/dz_i for each worker's own mean loss."""
        ...

    def take(self, update: WorkerUpdate) -> None:
        """Takes in what a worker of the open round brings back: of each once, in any order, with the same result.

        Its state is not kept: memory holds a few states, however many workers there are.
        """
        ...

    def close(self) -> float | None:
        """Ends the round with those that were taken in; the mean training loss in nats, if there is one."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next round depends on; new tensors, so that a void round can be undone."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Goes back to a state that `state_dict` returned."""
        ...


@runtime_checkable
class StreamingProgram(ServerProgram, Protocol):
    """A program that can also take the features of a step as they arrive, in place of `merge` with all of them.

    In one step: `begin_step`, `feed` until the last worker that is left has been fed, `end_step`. All workers of a step
    meet the top as it stands before the step, so what one of them gets back does not depend on who else has been fed.
    A worker may be fed part by part, in the order of the parts: each gets its rows of the same gradient.
    """

    def begin_step(self, step: int, worker_ids: Sequence[str], in_order: bool) -> None:
        """Opens a step of these workers, in plan order; in_order: floats add up in this order, whoever comes first."""
        ...

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Takes features of some of them and returns dL/dz_i, or its rows, for each worker's own mean loss."""
        ...

    def end_step(self) -> None:
        """Trains the top on those that were fed; one at least."""
        ...


Work = Callable[[SplitModel, Assignment, Batches, Exchange], WorkResult]
MakeServer = Callable[[SplitModel, MethodSettings, torch.device], ServerProgram]
CheckStreaming = Callable[[SplitModel, MethodSettings], None]


@dataclass(frozen=True)
class Method:
    """One line of the METHODS table.

    Attributes:
        summary: for people.
        make_server: the server's side.
        work: the worker's side.
        splits: the workers train the bottom and exchange features; else the whole network, exchanging none.
        merges: the top takes the features of all workers as one batch (mergesfl: if method.merging).
        check_streaming: raises ConfigError where this network or these settings need all features of a step at once;
            None: the method always does, or exchanges none. With it, `make_server` makes a StreamingProgram.
    """

    summary: str
    make_server: MakeServer
    work: Work
    splits: bool = True
    merges: bool = False
    check_streaming: CheckStreaming | None = None


def copy_state(state: State) -> dict[str, Tensor]:
    """Detached copies in main memory, which nobody else writes to."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def streams_always(network: SplitModel, settings: MethodSettings) -> None:
    """Of a method with a top for each worker: its own features are all that it needs, whatever the network."""
