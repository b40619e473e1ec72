"""A cluster without a link: a method's server program and its `work` functions, joined by queues instead of sockets.

Every worker runs `work` in a thread of its own with its own copy of the network; the server's side gathers in plan
order, so a round is deterministic. Below stand the references in plain torch that the methods are held against.
Legend: d_i samples of worker i in one step, D their sum, F... shape of a sample at the cut, C classes.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.control.plan import RoundPlan
from mergesfl.methods import METHODS
from mergesfl.methods.base import (
    Assignment,
    MethodSettings,
    ServerProgram,
    Setting,
    StepFeatures,
    Work,
    WorkerUpdate,
    WorkResult,
)
from mergesfl.models.initial import build_seeded
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel

CPU = torch.device("cpu")
NUM_CLASSES = 3
DEADLINE_SECONDS = 60.0  # only a deadlock waits so long

Batch = tuple[Tensor, Tensor]  # x (d_i, *sample), y (d_i,)
Share = tuple[Tensor, Tensor]  # the data of one worker: x (n_i, *sample), y (n_i,)


class DroppedError(Exception):
    """Ends `work` in the thread of a worker that the round goes on without."""


@dataclass(frozen=True)
class Step:
    """What one call of `merge` got and returned."""

    arrived: list[StepFeatures]
    gradients: list[Tensor]


class PretendWorker:
    """One worker of one round, in a thread."""

    def __init__(
        self, work: Work, model: SplitModel, assignment: Assignment, batches: Iterator[Batch], worker_id: str
    ) -> None:
        self.worker_id = worker_id
        self._outbox: queue.Queue[StepFeatures | WorkResult | BaseException] = queue.Queue()
        self._inbox: queue.Queue[Tensor | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(work, model, assignment, batches), daemon=True)
        self._thread.start()

    def _run(self, work: Work, model: SplitModel, assignment: Assignment, batches: Iterator[Batch]) -> None:
        try:
            self._outbox.put(work(model, assignment, batches, self._exchange))
        except BaseException as error:
            self._outbox.put(error)

    def _exchange(self, step: int, z: Tensor, y: Tensor) -> Callable[[], Tensor]:
        assert not z.requires_grad, "features leave the worker without their graph"
        self._outbox.put(StepFeatures(self.worker_id, z.clone(), y.clone()))
        return self._gradient

    def _gradient(self) -> Tensor:
        gradient = self._inbox.get(timeout=DEADLINE_SECONDS)  # (d_i, F...)
        if gradient is None:
            raise DroppedError(self.worker_id)
        return gradient

    def features(self) -> StepFeatures:
        """The next step's features; raises what `work` raised."""
        message = self._outbox.get(timeout=DEADLINE_SECONDS)
        if isinstance(message, BaseException):
            raise message
        assert isinstance(message, StepFeatures), "the worker finished before its last exchange"
        return message

    def answer(self, gradient: Tensor) -> None:
        self._inbox.put(gradient.clone())

    def result(self) -> WorkResult:
        """What `work` returned; raises what it raised."""
        message = self._outbox.get(timeout=DEADLINE_SECONDS)
        if isinstance(message, BaseException):
            raise message
        assert isinstance(message, WorkResult), "the worker sent one step too many"
        self._thread.join(DEADLINE_SECONDS)
        return message

    def drop(self) -> None:
        """Leaves the worker in mid-round, wherever it is."""
        self._inbox.put(None)
        self._thread.join(DEADLINE_SECONDS)


@dataclass
class PretendCluster:
    """One server program and the workers of its fleet.

    The workers' networks start as NaN everywhere: whatever a method forgets to send shows at once.
    """

    method: str
    template: SplitModel
    settings: MethodSettings
    shares: Mapping[str, Share]
    steps: list[Step] = field(default_factory=list)  # of the last round
    rates: dict[str, Setting] = field(default_factory=dict)  # learning rate of each worker in the last round
    updates: list[WorkerUpdate] = field(default_factory=list)  # of the last round

    def __post_init__(self) -> None:
        self.program: ServerProgram = METHODS[self.method].make_server(copy.deepcopy(self.template), self.settings, CPU)
        self._models = {name: place(copy.deepcopy(self.template), CPU) for name in self.shares}  # as a worker does
        for model in self._models.values():
            for tensor in model.joined_state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def fleet(self) -> FleetView:
        return fleet_of(self.shares)

    def plan(self, round_num: int) -> RoundPlan:
        """The program's own plan."""
        return self.program.plan(round_num, self.fleet(), generator_for(self.settings.seed, "plan", round_num, 1))

    def play(
        self, plan: RoundPlan, dropped_at: Mapping[str, int] | None = None, num_steps: int | None = None
    ) -> float | None:
        """One round; returns what `close` returns.

        Args:
            plan: who takes part.
            dropped_at: worker -> step whose features (or after the last step, whose update) never arrive.
            num_steps: stop after so many exchanges, without closing: a void round.
        """
        dropped_at = dropped_at or {}
        self.steps, self.updates = [], []
        self.program.open(plan, self.fleet())
        self.rates = {name: self.program.settings_for(name)["learning_rate"] for name in plan.worker_ids}
        active = [self._start(plan, name) for name in plan.worker_ids]  # in plan order
        for step in range(plan.num_exchanges if num_steps is None else num_steps):
            active = _without(active, dropped_at, step)
            arrived = [worker.features() for worker in active]
            gradients = self.program.merge(step, arrived)
            self.steps.append(Step(arrived, gradients))
            for worker, gradient in zip(active, gradients, strict=True):
                worker.answer(gradient)
        if num_steps is not None:
            for worker in active:
                worker.drop()
            return None
        for step in range(plan.num_exchanges, plan.num_steps + 1):
            active = _without(active, dropped_at, step)
        for worker in active:
            result = worker.result()
            self.updates.append(WorkerUpdate(worker.worker_id, result.state, result.num_samples, result.metrics))
        for update in reversed(self.updates):  # in any order
            self.program.take(update)
        return self.program.close()

    def batches(self, round_num: int, worker_id: str, batch_size: int) -> Iterator[Batch]:
        """Endless batches as a pure function of (seed, worker, round), like the daemon's."""
        return draw(self.settings.seed, self.shares[worker_id], round_num, worker_id, batch_size)

    def batches_of(self, plan: RoundPlan) -> list[list[Batch]]:
        """The same batches for a reference: per worker in plan order, per step."""
        streams = [
            self.batches(plan.round_num, name, size)
            for name, size in zip(plan.worker_ids, plan.batch_sizes, strict=True)
        ]
        return [[next(stream) for _ in range(plan.num_steps)] for stream in streams]

    def parameters(self) -> dict[str, Tensor]:
        """The state of the global network, by name (copies)."""
        return {name: tensor.clone() for name, tensor in self.program.network.joined_state_dict().items()}

    def _start(self, plan: RoundPlan, name: str) -> PretendWorker:
        batch_size = plan.batch_size_of(name)
        assignment = Assignment(
            round_num=plan.round_num,
            num_steps=plan.num_steps,
            batch_size=batch_size,
            settings=self.program.settings_for(name),
            state=self.program.state_for(name),
            seed=seed_for(self.settings.seed, "worker", name, plan.round_num),
        )
        work = METHODS[self.method].work
        return PretendWorker(work, self._models[name], assignment, self.batches(plan.round_num, name, batch_size), name)


def _without(active: list[PretendWorker], dropped_at: Mapping[str, int], step: int) -> list[PretendWorker]:
    """Lets go of the workers that are dropped at this step; their last features are never read."""
    for worker in active:
        if dropped_at.get(worker.worker_id) == step:
            worker.drop()
    return [worker for worker in active if dropped_at.get(worker.worker_id) != step]


def draw(seed: int, share: Share, round_num: int, worker_id: str, batch_size: int) -> Iterator[Batch]:
    """Endless batches of exactly d_i samples, drawn with replacement."""
    x, y = share
    generator = generator_for(seed, "batches", worker_id, round_num)
    while True:
        rows = torch.from_numpy(generator.integers(len(y), size=batch_size))  # (d_i,)
        yield x[rows], y[rows]


def fleet_of(shares: Mapping[str, Share], num_classes: int = NUM_CLASSES, sample_bytes: int = 48) -> FleetView:
    """The fleet that holds these shares, in the order of worker_id, all speeds unknown."""
    views = []
    for name in sorted(shares):
        labels = shares[name][1]  # (n_i,)
        counts = torch.bincount(labels, minlength=num_classes)  # (C,)
        views.append(WorkerView(name, len(labels), tuple(int(count) for count in counts)))
    return FleetView(tuple(views), sample_bytes)


def plan_of(batch_sizes: Mapping[str, int], num_steps: int, round_num: int = 0, num_exchanges: int = -1) -> RoundPlan:
    """A plan by hand: these workers in this order; num_exchanges -1: as many as steps."""
    return RoundPlan(
        round_num=round_num,
        worker_ids=tuple(batch_sizes),
        batch_sizes=tuple(batch_sizes.values()),
        num_steps=num_steps,
        num_exchanges=num_steps if num_exchanges < 0 else num_exchanges,
        predicted_seconds=(0.0,) * len(batch_sizes),
        predicted_idle_seconds=0.0,
        kl_before_nats=0.0,
        kl_after_nats=0.0,
        ingress_budget_bytes=0,
        ingress_bytes_per_step=0,
    )


def settings_of(**changes: int | float | str | bool | tuple[int, ...] | None) -> MethodSettings:
    """Settings with large rates, so that a wrong one shows; the round's rate is 0.3 * 0.9 ** h."""
    values: dict[str, int | float | str | bool | tuple[int, ...] | None] = {
        "seed": 7,
        "num_steps": 3,
        "batch_size": 4,
        "participants_per_round": 3,
        "learning_rate": 0.3,
        "learning_rate_decay": 0.9,
        "learning_rate_min": 0.001,
        "sample_shape": (1, 4, 4),  # of the small network
    }
    return MethodSettings(**(values | changes))  # type: ignore[arg-type]


def small_network() -> nn.Sequential:
    """float64, two halves "0" and "1", samples (1, 4, 4), features (3, 2, 2); no batch-norm, no dropout."""

    def build() -> nn.Module:
        below = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2))
        above = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
        return nn.Sequential(below, above)

    net = build_seeded(build, 0).double()
    assert isinstance(net, nn.Sequential)
    return net


def small_shares(num_samples: Mapping[str, int]) -> dict[str, Share]:
    """Random float64 samples (n_i, 1, 4, 4) with labels (n_i,) of C = 3 classes."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, NUM_CLASSES, (count,), generator=generator),
        )
        for name, count in num_samples.items()
    }


def small_cluster(method: str, settings: MethodSettings, num_samples: Mapping[str, int]) -> PretendCluster:
    """The small network cut in its two halves, and workers with so many samples."""
    return PretendCluster(method, SplitModel(small_network(), "0"), settings, small_shares(num_samples))


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 1e-12) -> None:
    """Equal names and, to float64 accuracy, equal values."""
    assert list(actual) == list(expected)
    for name in actual:
        assert torch.allclose(actual[name], expected[name], rtol=0, atol=atol), name


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert list(actual) == list(expected)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def differs(first: Mapping[str, Tensor], second: Mapping[str, Tensor], part: str = "") -> bool:
    """Whether any tensor whose name begins with `part` differs."""
    return any(not torch.equal(first[name], second[name]) for name in first if name.startswith(part))


# References: plain torch on whole networks, two halves net[0] and net[1].


def descend(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rate: float) -> None:
    """p <- p - rate * g, in place."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient


def average_into(target: nn.Module, sources: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """target = sum_i w_i / sum_j w_j * source_i."""
    states = [source.state_dict() for source in sources]
    total = sum(weights)
    mean = {
        key: torch.stack([state[key] * (weight / total) for state, weight in zip(states, weights, strict=True)]).sum(0)
        for key in states[0]
    }
    target.load_state_dict(mean)


def local_training(
    net: nn.Sequential, batches: Sequence[Sequence[Batch]], weights: Sequence[float], rate: float
) -> float:
    """Every worker trains a whole copy of net on its own batches; net becomes the weighted mean of the copies.

    With equal rates for both halves this is FedAvg, and also split learning with one top per worker whose tops and
    bottoms are averaged with the same weights. Returns the mean loss over all samples of all steps.
    """
    copies, losses, num_samples = [], 0.0, 0
    for worker_batches in batches:
        own = copy.deepcopy(net)
        for x, y in worker_batches:
            loss = functional.cross_entropy(own(x), y)
            descend(list(own.parameters()), torch.autograd.grad(loss, list(own.parameters())), rate)
            losses += loss.item() * len(y)
            num_samples += len(y)
        copies.append(own)
    average_into(net, copies, weights)
    return losses / num_samples
