"""PyramidFL: federated learning that chooses useful and fast workers, and lets slow ones upload less.

Li, Zeng, Zhang, Cao. "PyramidFL: A Fine-grained Client Selection Framework for Efficient Federated Learning."
MobiCom 2022. https://doi.org/10.1145/3495243.3517017, code: https://github.com/liecn/PyramidFL

    U_i  = sqrt(mean squared loss of worker i) * min(n_i, tau * d)     from its last round                 close()
    S    = by U_i * (T_pref / T_i)^2, and unknown workers to explore   mergesfl.control.utility            plan()
    w_i  = tau steps of SGD on the whole network                                                           work()
    each parameter tensor of a slow worker stays away with probability p_i                                 work()
    w    = per tensor: sum_i n_i w_i / sum_i n_i over those that sent it                           take(), close()

T_i = tau * d * (mu_i + beta_i), with the smoothed observations of Eq. 5 and 6; before any speed is known all count as
equally fast. Everything that plan() reads of the past is in the state: a void round is undone, a run resumed.

What is uncertain, and what differs: the code drops whole tensors of the update, and so do we, but it then averages them
as zeros, which shrinks the step; here a tensor counts for those that sent it [ours]. Buffers are always sent [ours].
The code starts 30 % more workers than it waits for and gives fast ones more local steps; both are left out: all methods
are compared with equal participants and equal local steps [ours]. How p_i follows from T_i is [ours] too:
drop_probabilities.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mergesfl.control.divergence import round_seconds
from mergesfl.control.facts import FleetFacts
from mergesfl.control.fleet import FleetView, FloatArray
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import report_plan
from mergesfl.control.utility import Candidates, choose, drop_probabilities, preferred_seconds
from mergesfl.methods.base import (
    MAY_OMIT_TENSORS,
    Assignment,
    Batches,
    Exchange,
    Method,
    MethodSettings,
    Setting,
    State,
    WorkResult,
    copy_state,
)
from mergesfl.methods.fedavg import FedAvgProgram
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.schedule import make_sgd
from mergesfl.training.singles import forward_any
from mergesfl.training.split import SplitModel

SQUARED_LOSS = "mean_squared_loss_nats2"  # of a worker's round, in its metrics
DROP_PROBABILITY = "drop_probability"  # p_i, in a slow worker's settings

# In the state; no tensor of a network is named so.
WORKER_IDS = "pyramidfl/worker_ids"  # (num_bytes,) uint8: the ids that were tried, one per line
UTILITIES = "pyramidfl/utilities"  # (num_tried, 2) float64: U_i and the round it is from


class PyramidFLProgram(FedAvgProgram):
    """The server's side of PyramidFL (implements `ServerProgram`); it has no exchanges."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device)
        self._utilities: dict[str, tuple[float, int]] = {}  # worker_id -> U_i, its round
        self._drop_probabilities: dict[str, float] = {}  # of this round's participants
        self._num_trained: dict[str, int] = {}  # min(n_i, tau * d) of this round's participants

    @property
    def plans_by_speed(self) -> bool:
        """The utility does."""
        return True

    def plan(self, round_num: int, fleet: FleetView, generator: np.random.Generator) -> RoundPlan:
        """Chooses among the workers that have samples; the same batch size for all."""
        s = self._settings
        facts = FleetFacts.of(fleet)
        rows = np.flatnonzero(facts.num_samples > 0)  # (N,)
        known = [self._utilities.get(fleet.workers[int(row)].worker_id, (math.nan, 0)) for row in rows]
        sizes = np.minimum(s.batch_size, facts.num_samples)  # of the whole fleet
        worker_seconds = self._worker_seconds(facts)
        candidates = Candidates(
            utilities=np.array([utility for utility, _ in known], dtype=np.float64),
            last_rounds=np.array([last_round for _, last_round in known], dtype=np.int64),
            num_samples=np.minimum(facts.num_samples, s.num_steps * sizes)[rows],
            worker_seconds=worker_seconds[rows],
        )
        preferred = preferred_seconds(candidates.worker_seconds, round_num)
        chosen = rows[choose(candidates, preferred, round_num, s.participants_per_round, generator)]  # (n,)
        return report_plan(
            round_num,
            fleet,
            facts,
            chosen,
            sizes[chosen],
            kl_before_nats=None,
            num_steps=s.num_steps,
            num_exchanges=0,
            ingress_budget_bytes=0,
        )

    def open(self, plan: RoundPlan, fleet: FleetView) -> None:
        """Starts the round: who is slow uploads less."""
        super().open(plan, fleet)
        facts = FleetFacts.of(fleet)
        worker_seconds = self._worker_seconds(facts)
        preferred = preferred_seconds(worker_seconds[facts.num_samples > 0], plan.round_num)
        row_of = {worker.worker_id: row for row, worker in enumerate(fleet.workers)}
        probabilities = drop_probabilities(worker_seconds[[row_of[name] for name in plan.worker_ids]], preferred)
        self._drop_probabilities = dict(zip(plan.worker_ids, probabilities.tolist(), strict=True))
        self._num_trained = {
            name: min(self._num_samples[name], plan.num_steps * plan.batch_size_of(name)) for name in plan.worker_ids
        }

    def settings_for(self, worker_id: str) -> dict[str, Setting]:
        """The learning rate and, for a slow worker, how much of its upload it leaves out."""
        probability = self._drop_probabilities[worker_id]
        less: dict[str, Setting] = {DROP_PROBABILITY: probability, MAY_OMIT_TENSORS: True}
        return {**super().settings_for(worker_id), **(less if probability > 0 else {})}

    def close(self) -> float | None:
        """Averages what was sent and takes the new utilities in."""
        for update in self._told_in_plan_order():
            squared_nats2 = update.metrics.get(SQUARED_LOSS)  # one that is not finite is not sent: the old one stays
            if squared_nats2 is not None:
                utility = math.sqrt(max(squared_nats2, 0.0)) * self._num_trained[update.worker_id]
                self._utilities[update.worker_id] = (utility, self._round_num)
        return super().close()

    def state_dict(self) -> dict[str, Tensor]:
        """The global model and, once a round has closed, the utilities."""
        return {**super().state_dict(), **_pack(self._utilities)}

    def load_state_dict(self, state: State) -> None:
        """Takes both back."""
        super().load_state_dict({k: tensor for k, tensor in state.items() if k not in (WORKER_IDS, UTILITIES)})
        self._utilities = _unpack(state)

    def _worker_seconds(self, facts: FleetFacts) -> FloatArray:
        """T_i of the whole fleet; all 1.0 while no speed is known."""
        if not facts.are_seconds_known:
            return np.ones(len(facts.num_samples))
        sizes = np.minimum(self._settings.batch_size, facts.num_samples)
        return round_seconds(sizes, facts.seconds_per_sample, self._settings.num_steps, facts.fixed_seconds_per_step)


def _pack(utilities: dict[str, tuple[float, int]]) -> dict[str, Tensor]:
    """As tensors, which is all that a state holds; nothing for nothing."""
    if not utilities:
        return {}
    ids = "\n".join(utilities).encode()
    return {
        WORKER_IDS: torch.tensor(list(ids), dtype=torch.uint8),  # (num_bytes,)
        UTILITIES: torch.tensor(list(utilities.values()), dtype=torch.float64),  # (num_tried, 2)
    }


def _unpack(state: State) -> dict[str, tuple[float, int]]:
    if WORKER_IDS not in state:
        return {}
    ids = bytes(state[WORKER_IDS].tolist()).decode().split("\n")
    pairs = state[UTILITIES].tolist()
    return {worker_id: (utility, int(last)) for worker_id, (utility, last) in zip(ids, pairs, strict=True)}


def work(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """The worker's side: tau steps of SGD on the whole network; a slow worker then leaves some tensors out."""
    model.load_joined_state_dict(assignment.state)
    model.train()
    optimizer = make_sgd(model.parameters(), float(assignment.settings["learning_rate"]))
    num_samples, loss_sum_nats, squared_sum_nats2 = 0, 0.0, 0.0
    for step in range(assignment.num_steps):
        x, y = next(batches)  # (d, *sample), (d,)
        seed_dropout(model, seed_for(assignment.seed, "step", step))
        optimizer.zero_grad(set_to_none=True)
        losses = functional.cross_entropy(forward_any(model, x), y, reduction="none")  # (d,)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        num_samples += len(y)
        loss_sum_nats += float(losses.detach().sum())
        squared_sum_nats2 += float(losses.detach().square().sum())
    metrics = {"loss_nats": loss_sum_nats / num_samples, SQUARED_LOSS: squared_sum_nats2 / num_samples}
    probability = float(assignment.settings.get(DROP_PROBABILITY, 0.0))
    return WorkResult(_kept(model, probability, assignment.seed), num_samples, metrics)


def _kept(model: SplitModel, probability: float, seed: int) -> dict[str, Tensor]:
    """The state without the parameters that are dropped, each with this probability; buffers all stay."""
    generator = generator_for(seed, "upload")
    parameters = {name for half in (model.bottom, model.top) for name, _ in half.named_parameters()}
    state = model.joined_state_dict()
    dropped = {name for name in state if name in parameters and generator.random() < probability}
    return copy_state({name: tensor for name, tensor in state.items() if name not in dropped})


METHOD = Method(
    "the useful and fast workers, slow ones upload less (MobiCom 2022)", PyramidFLProgram, work, splits=False
)
