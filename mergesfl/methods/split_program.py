"""What all split methods share: the bottoms travel and are averaged, the top (or tops) stays on the server.

A round (spec, section 1): every chosen worker gets the global bottom; for k = 1..tau it sends features and labels and
gets the gradient at the cut back; at the end the bottoms are averaged. The methods differ in `plan`, in what the top
does with the features of a step (a `TopTrainer`) and in the weights of the average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.errors import ConfigError
from mergesfl.methods.base import (
    Assignment,
    Batches,
    Exchange,
    MethodSettings,
    Setting,
    State,
    StepFeatures,
    WorkerUpdate,
    WorkResult,
    copy_state,
)
from mergesfl.parts import part_sizes
from mergesfl.seeding import seed_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.placement import place
from mergesfl.training.schedule import make_sgd
from mergesfl.training.singles import forward_any, layer_with_batch_statistics
from mergesfl.training.split import SplitModel
from mergesfl.training.state_mean import StateMean


class TopTrainer(Protocol):
    """What the server does with the features of a step."""

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """Starts a round with these workers and this learning rate."""
        ...

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """Trains on one step: dL/dz_i (d_i, F...) of each worker's own mean loss, and the mean loss in nats."""
        ...

    def close(self, weights: dict[str, float]) -> None:
        """Ends the round; the weights are those of the bottoms of the workers that finished, in plan order."""
        ...


@runtime_checkable
class StreamingTop(TopTrainer, Protocol):
    """A TopTrainer that can also take the features of a step as they arrive (`StreamingProgram`).

    With one worker the masks of its dropout are those of `step`. With more, one worker's must not depend on who else
    has arrived, so they are drawn per worker (`seed_of_turn`), where `step` may draw them over the merged batch: only
    without dropout are both equal to float tolerance. For the same reason they are drawn per part of a batch.
    """

    def begin_step(self, batch_sizes: Mapping[str, int], seed: int, in_order: bool) -> None:
        """Opens a step of these workers, d_i by worker_id in plan order."""
        ...

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Takes some of them: dL/dz_i (d_i, F...) of each worker's own mean loss, with the top before the step.

        Of a part of a batch: its rows of that.
        """
        ...

    def end_step(self) -> float:
        """Steps on those that were fed; their mean loss in nats."""
        ...


@runtime_checkable
class CarriedState(Protocol):
    """What a TopTrainer also implements if it carries more than the top from round to round, momentum for example."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it carries, as it stood after the last closed round; new tensors in main memory."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Goes back to it. Raises CheckpointError when names or shapes are not its own."""
        ...


# Of what a trainer carries; no tensor of a network has such a name: its parts are those of Python attributes.
CARRIED_PREFIX = "top-trainer/"


class SplitProgram:
    """The server's side of a split method (implements `ServerProgram`); subclasses give `plan` and `weight_of`.

    With a trainer that is a `StreamingTop` it is a `StreamingProgram`, too.
    """

    def __init__(
        self, network: SplitModel, settings: MethodSettings, device: torch.device, trainer: TopTrainer
    ) -> None:
        self._network = network
        self._settings = settings
        self._trainer = trainer
        place(network, device)
        self._bottom = copy_state(network.bottom.state_dict())
        self._plan: RoundPlan | None = None
        self._average: StateMean
        self._places: dict[str, int] = {}  # worker_id -> place in the plan
        self._finished: set[str] = set()  # workers whose update was taken in
        self._num_samples: dict[str, int] = {}
        self._losses_nats: list[float] = []

    @property
    def network(self) -> SplitModel:
        """The global bottom and top."""
        return self._network

    @property
    def plans_by_speed(self) -> bool:
        """Not where workers are drawn at random."""
        return False

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Decides who takes part; each method has its own."""
        raise AssertionError("a split method defines plan()")

    def weight_of(self, worker_id: str) -> int:
        """Weight of this worker's bottom in the average, in samples; each method has its own."""
        raise AssertionError("a split method defines weight_of()")

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """Starts the round: the top's learning rate follows the schedule."""
        self._plan = plan
        self._places = {name: place for place, name in enumerate(plan.worker_ids)}
        self._average, self._finished = StateMean(self.global_state()), set()
        self._num_samples = {worker.worker_id: worker.num_samples for worker in fleet.workers}
        self._losses_nats = []
        self._network.train()
        self._trainer.open(plan.worker_ids, self._settings.rate_at(plan.round_num))

    def settings_for(self, worker_id: str) -> dict[str, Setting]:
        """The bottom's learning rate: `equal`, or `proportional`: eta * d_i / mean d [ours: the normalisation]."""
        plan = self._current_plan()
        rate = self._settings.rate_at(plan.round_num)
        if self._settings.bottom_learning_rate == "proportional":
            rate *= plan.batch_size_of(worker_id) * len(plan.batch_sizes) / sum(plan.batch_sizes)
        return {"learning_rate": rate}

    def state_for(self, worker_id: str) -> State:
        """The global state, the same for all."""
        return self.global_state()

    def global_state(self) -> State:
        """What the workers train: the bottom, and what else a method lets them average."""
        return self._bottom

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Takes the average of what they trained."""
        self._bottom = state
        self._network.bottom.load_state_dict(state)

    def merge(self, step: int, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Hands the step to the top; dropout masks of the top depend on (seed, round, step) alone."""
        gradients, loss_nats = self._trainer.step(arrived, self._seed_of(step))
        self._losses_nats.append(loss_nats)
        return gradients

    def begin_step(self, step: int, worker_ids: Sequence[str], in_order: bool) -> None:
        """Opens a step of the top; its dropout masks depend on (seed, round, step, worker, part) alone."""
        plan = self._current_plan()
        batch_sizes = {worker_id: plan.batch_size_of(worker_id) for worker_id in worker_ids}
        self._streaming_top().begin_step(batch_sizes, self._seed_of(step), in_order)

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Hands what has arrived to the top."""
        return self._streaming_top().feed(arrived)

    def end_step(self) -> None:
        """Steps the top."""
        self._losses_nats.append(self._streaming_top().end_step())

    def take(self, update: WorkerUpdate) -> None:
        """Adds this worker's bottom to the average."""
        name = update.worker_id
        self._average.add(update.state, self.weight_of(name), self._places[name])
        self._finished.add(name)

    def close(self) -> float | None:
        """Averages the bottoms of those who finished (Eq. 17) and ends the round of the top."""
        self.adopt(self._average.close())
        self._trainer.close({name: float(self.weight_of(name)) for name in self._places if name in self._finished})
        return sum(self._losses_nats) / len(self._losses_nats) if self._losses_nats else None

    def state_dict(self) -> dict[str, Tensor]:
        """The joined network, whose names of bottom and top never clash, and what the trainer carries, if anything."""
        state = copy_state(self._network.joined_state_dict())
        if isinstance(self._trainer, CarriedState):
            state |= {CARRIED_PREFIX + name: tensor for name, tensor in self._trainer.state_dict().items()}
        return state

    def load_state_dict(self, state: State) -> None:
        """Takes both back."""
        if isinstance(self._trainer, CarriedState):
            length = len(CARRIED_PREFIX)
            carried = {name[length:]: tensor for name, tensor in state.items() if name.startswith(CARRIED_PREFIX)}
            self._trainer.load_state_dict(carried)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(CARRIED_PREFIX)}
        self._network.load_joined_state_dict(state)
        self._bottom = copy_state(self._network.bottom.state_dict())

    def _seed_of(self, step: int) -> int:
        return seed_for(self._settings.seed, "top", self._current_plan().round_num, step)

    def _streaming_top(self) -> StreamingTop:
        assert isinstance(self._trainer, StreamingTop), "Method.check_streaming comes first"
        return self._trainer

    def _current_plan(self) -> RoundPlan:
        assert self._plan is not None, "open() comes first"
        return self._plan


def seed_of_turn(seed: int, worker_id: str, num_workers: int, part: int = 0) -> int:
    """Seed of the top's dropout masks for one worker's features, or one part of them: unrelated between both [ours].

    A lone worker gets the seed of the step itself, so that one worker with all data equals central training.
    """
    return seed_of_part(seed_for(seed, worker_id) if num_workers > 1 else seed, part)


def seed_of_part(seed: int, part: int) -> int:
    """Seed of dropout masks for one part of a batch [ours]; the first has that of the batch, which may be unsplit."""
    return seed_for(seed, "part", part) if part else seed


def check_parts(network: SplitModel, parts_per_step: int) -> None:
    """Raises ConfigError where a bottom or a top that sees a batch in parts would compute something else: batch-norm,
    or instance-norm with running statistics."""
    if parts_per_step == 1:
        return
    halves = (("bottom before", "before the first", network.bottom), ("top after", "behind the last", network.top))
    for half, where, module in halves:
        layer = layer_with_batch_statistics(module)
        if layer is not None:
            name, kind = layer
            raise ConfigError(
                f"training.parts_per_step = {parts_per_step}, but the {half} the cut '{network.cut}' holds the layer "
                f"'{name}' ({kind}), whose statistics are those of the whole batch: set training.parts_per_step = 1, "
                f"or cut {where} such layer (model.cut, see `mergesfl cuts`)"
            )


def work(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """The worker's side of every split method: tau times bottom forward, exchange, bottom backward, step [paper].

    The gradient that comes back is that of the mean loss over this worker's own d_i samples (dispatch [code]). With a
    setting `proximal` mu > 0 the bottom's gradient gets mu (w_i - w) added, w being the bottom that the round began
    with (FedProx, MLSys 2020).

    In parts, all of them go forward, each sent when it is computed, and then, as their gradients come, all go backward
    into one sum; the bottom steps once. The sum is the gradient of the unsplit step up to rounding, but for dropout:
    masks are drawn per part, as a function of (seed, worker, round, step, part) alone.
    """
    bottom = model.bottom
    bottom.load_state_dict(assignment.state)
    bottom.train()
    parameters = list(bottom.parameters())
    optimizer = make_sgd(parameters, float(assignment.settings["learning_rate"])) if parameters else None
    proximal = float(assignment.settings.get("proximal", 0.0))
    anchors = [parameter.detach().clone() for parameter in parameters] if proximal else []
    num_samples = 0
    for step in range(assignment.num_steps):
        x, y = next(batches)  # (d_i, *sample), (d_i,)
        sizes = list(part_sizes(len(y), assignment.parts_per_step))
        sent: list[tuple[Tensor, Callable[[], Tensor]]] = []  # of each part: z, and how to wait for its gradient
        for part, (x_part, y_part) in enumerate(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)):
            seed_dropout(bottom, seed_of_part(seed_for(assignment.seed, "step", step), part))
            z = forward_any(bottom, x_part)  # (d_i, F...), or the rows of the part
            sent.append((z, exchange(step, z.detach(), y_part)))
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        for z, wait in sent:
            gradient = wait()  # as z
            if optimizer is not None:
                z.backward(gradient)  # type: ignore[no-untyped-call]
        if optimizer is not None:
            for parameter, anchor in zip(parameters, anchors, strict=bool(anchors)):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=proximal)
            optimizer.step()
        num_samples += len(y)
    return WorkResult(copy_state(bottom.state_dict()), num_samples, {})
