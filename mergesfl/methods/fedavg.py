"""FedAvg: every worker trains the whole network, the server averages.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep Networks from Decentralized
Data." AISTATS 2017, Algorithm 1. https://arxiv.org/abs/1602.05629

    S_t   <- a random set of participants
    w_i   <- tau steps of SGD on worker i from w_t            work()
    w_t+1 <- sum_i n_i / n * w_i                              take(), close()

What is uncertain: the paper trains E local epochs; here tau local steps with the same batch size for all, so that
rounds compare [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import plan_uniform
from mergesfl.methods.base import (
    Assignment,
    Batches,
    Exchange,
    Method,
    MethodSettings,
    Setting,
    State,
    StepFeatures,
    WorkerUpdate,
    WorkResult,
    copy_state,
)
from mergesfl.seeding import seed_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.placement import place
from mergesfl.training.schedule import make_sgd
from mergesfl.training.singles import forward_any
from mergesfl.training.split import SplitModel
from mergesfl.training.state_mean import StateMean


class FedAvgProgram:
    """The server's side of FedAvg (implements `ServerProgram`); it has no exchanges."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        self._network = place(network, device)
        self._settings = settings
        self._state = copy_state(network.joined_state_dict())
        self._round_num = 0
        self._places: dict[str, int] = {}  # worker_id -> place in the plan
        self._average: StateMean
        self._told: dict[str, WorkerUpdate] = {}  # what was taken in, by worker_id, without the states
        self._num_samples: dict[str, int] = {}

    @property
    def network(self) -> SplitModel:
        """The global model."""
        return self._network

    @property
    def plans_by_speed(self) -> bool:
        """No: workers are drawn at random."""
        return False

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Draws the participants at random."""
        s = self._settings
        return plan_uniform(round_num, fleet, s.participants_per_round, s.batch_size, s.num_steps, 0, generator)

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """Starts the round."""
        self._round_num = plan.round_num
        self._places = {name: place for place, name in enumerate(plan.worker_ids)}
        self._average, self._told = StateMean(self._state), {}
        self._num_samples = {worker.worker_id: worker.num_samples for worker in fleet.workers}

    def settings_for(self, worker_id: str) -> dict[str, Setting]:
        """The learning rate of this round."""
        return {"learning_rate": self._settings.rate_at(self._round_num)}

    def state_for(self, worker_id: str) -> State:
        """The whole global model."""
        return self._state

    def merge(self, step: int, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Never called: a plan of FedAvg has no exchanges."""
        raise AssertionError("FedAvg exchanges no features")

    def take(self, update: WorkerUpdate) -> None:
        """Adds this worker's model to the average."""
        name = update.worker_id
        self._average.add(update.state, self._num_samples[name], self._places[name])
        self._told[name] = replace(update, state={})

    def close(self) -> float | None:
        """Data-weighted mean of the models; the loss is the mean over the samples trained."""
        self._adopt(self._average.close())
        return mean_loss_nats(self._told_in_plan_order())

    def state_dict(self) -> dict[str, Tensor]:
        """The global model."""
        return dict(self._state)  # its tensors are replaced, never written to

    def load_state_dict(self, state: State) -> None:
        """Takes a global model."""
        self._adopt(state)

    def _told_in_plan_order(self) -> list[WorkerUpdate]:
        return [self._told[name] for name in self._places if name in self._told]

    def _adopt(self, state: State) -> None:
        self._network.load_joined_state_dict(state)
        self._state = copy_state(self._network.joined_state_dict())


def mean_loss_nats(updates: Sequence[WorkerUpdate]) -> float | None:
    """Mean training loss over all samples of the round, from the workers' own means; None if nobody told one."""
    told = [update for update in updates if "loss_nats" in update.metrics]  # a loss that is not finite is not sent
    num_samples = sum(update.num_samples for update in told)
    return sum(u.metrics["loss_nats"] * u.num_samples for u in told) / num_samples if told else None


def work(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """The worker's side: tau steps of SGD on the whole network, no exchange."""
    model.load_joined_state_dict(assignment.state)
    model.train()
    optimizer = make_sgd(model.parameters(), float(assignment.settings["learning_rate"]))
    num_samples, loss_sum_nats = 0, 0.0
    for step in range(assignment.num_steps):
        x, y = next(batches)  # (d_i, *sample), (d_i,)
        seed_dropout(model, seed_for(assignment.seed, "step", step))
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward_any(model, x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        num_samples += len(y)
        loss_sum_nats += float(loss.detach()) * len(y)
    return WorkResult(copy_state(model.joined_state_dict()), num_samples, {"loss_nats": loss_sum_nats / num_samples})


METHOD = Method("the whole network on every worker, averaged (AISTATS 2017)", FedAvgProgram, work, splits=False)
