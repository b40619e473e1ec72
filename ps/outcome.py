"""What a round that counts has shown: the figures of its record, and what it teaches about the workers' speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergesfl.control.divergence import idle_seconds, kl_nats, label_distributions, mixture
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.protocol.messages import Update
from mergesfl.runtime.journal import DroppedWorker, RoundRecord
from mergesfl.training.evaluation import Evaluation
from ps.exchange import Arrival, RoundExchange
from ps.fleet import Fleet

# The least that a worker is believed to take for computing one sample: a network of 1 MFLOP per sample keeps an AGX
# Xavier (1.4 TFLOP/s) busy that long. Who reports less, or nothing at all, would else get all the samples. [ours]
MIN_COMPUTE_SECONDS_PER_SAMPLE = 1e-6


@dataclass(frozen=True)
class WorkerSeconds:
    """What one worker took in one round."""

    compute_seconds: float
    transfer_seconds: float

    @property
    def total_seconds(self) -> float:
        """t_i as observed."""
        return self.compute_seconds + self.transfer_seconds


@dataclass(frozen=True)
class Accounts:
    """What the loop around the round measured: bytes, and seconds on the server's clock."""

    ingress_bytes: int
    egress_bytes: int
    round_seconds: float
    learning_rate: float
    attempt: int
    survey_seconds: float = 0.0


@dataclass(frozen=True)
class RoundOutcome:
    """A closed round.

    Attributes:
        plan: what was decided.
        seconds: of each worker that finished, in plan order.
        dropped: the workers that were lost, in void attempts too.
        missed_deadline: those of them that are reachable, but too slow.
        train_loss_nats: mean over the steps, if the method has one.
        num_samples_trained: that went into a step of the top (or of a full model).
        merged_kl_nats: of the batches of those who finished.
        planning_seconds: what the plan took.
        waiting_seconds: mean over those that finished.
    """

    plan: RoundPlan
    seconds: dict[str, WorkerSeconds]
    dropped: tuple[DroppedWorker, ...]
    missed_deadline: tuple[str, ...]
    train_loss_nats: float | None
    num_samples_trained: int
    merged_kl_nats: float
    planning_seconds: float
    waiting_seconds: float

    def teach(self, fleet: Fleet, step_deadline_seconds: float) -> None:
        """Smooths the observed speeds in (Eq. 5 and 6)."""
        for name, seconds in self.seconds.items():
            batch_size = self.plan.batch_size_of(name)
            num_samples = batch_size * self.plan.num_steps
            compute_seconds = max(seconds.compute_seconds / num_samples, MIN_COMPUTE_SECONDS_PER_SAMPLE)
            fleet.observe(name, batch_size, compute_seconds, seconds.transfer_seconds / num_samples)
        teach_missed(fleet, self.plan, self.missed_deadline, step_deadline_seconds)

    def record(self, evaluation: Evaluation | None, evaluation_seconds: float, accounts: Accounts) -> RoundRecord:
        """The line of the journal."""
        plan = self.plan
        total_seconds = {name: seconds.total_seconds for name, seconds in self.seconds.items()}
        return RoundRecord(
            round_num=plan.round_num,
            accuracy=evaluation.accuracy if evaluation else None,
            loss_nats=evaluation.loss_nats if evaluation else None,
            train_loss_nats=self.train_loss_nats,
            worker_ids=plan.worker_ids,
            batch_sizes=plan.batch_sizes,
            finished_worker_ids=tuple(self.seconds),
            dropped=self.dropped,
            kl_before_nats=plan.kl_before_nats,
            kl_after_nats=plan.kl_after_nats,
            merged_kl_nats=self.merged_kl_nats,
            predicted_seconds=plan.predicted_seconds,
            observed_seconds=tuple(total_seconds.get(name) for name in plan.worker_ids),
            predicted_idle_seconds=plan.predicted_idle_seconds,
            idle_seconds=idle_seconds(np.array(list(total_seconds.values()))),
            ingress_bytes=accounts.ingress_bytes,
            egress_bytes=accounts.egress_bytes,
            samples_trained=self.num_samples_trained,
            planning_seconds=self.planning_seconds,
            round_seconds=accounts.round_seconds,
            evaluation_seconds=evaluation_seconds,
            learning_rate=accounts.learning_rate,
            attempt=accounts.attempt,
            ingress_budget_bytes=plan.ingress_budget_bytes,
            ingress_bytes_per_step=plan.ingress_bytes_per_step,
            survey_seconds=accounts.survey_seconds,
            waiting_seconds=self.waiting_seconds,
        )


def teach_missed(fleet: Fleet, plan: RoundPlan, missed_deadline: Sequence[str], step_deadline_seconds: float) -> None:
    """Who missed the deadline took at least that long [ours]; also true of a round that is void."""
    for name in missed_deadline:
        batch_size = plan.batch_size_of(name)
        fleet.observe(name, batch_size, step_deadline_seconds / batch_size, 0.0)


def observed_seconds(plan: RoundPlan, exchange: RoundExchange, updates: dict[str, Arrival]) -> dict[str, WorkerSeconds]:
    """Compute and transfer seconds of the workers that finished.

    A federated worker exchanges nothing; its transfer is what the round trip took beyond its own computing. Of states
    that come at once the later ones' holds the time, too, in which the server adds up those before.
    """
    result = {}
    for name, arrival in updates.items():
        message = arrival.message
        assert isinstance(message, Update), "gathered by kind"
        transfer_seconds = message.transfer_seconds
        if not plan.num_exchanges:
            round_trip_seconds = arrival.received_seconds - exchange.assigned_seconds[name]
            transfer_seconds = max(round_trip_seconds - message.compute_seconds, 0.0)
        result[name] = WorkerSeconds(message.compute_seconds, transfer_seconds)
    return result


def waiting_seconds(exchange: RoundExchange, updates: dict[str, Arrival]) -> float:
    """Mean over the workers that finished of the seconds held, and of those from its update to the last one."""
    last_seconds = max(arrival.received_seconds for arrival in updates.values())
    waits = [exchange.held_seconds[name] + last_seconds - arrival.received_seconds for name, arrival in updates.items()]
    return sum(waits) / len(waits)


def merged_kl_nats(view: FleetView, plan: RoundPlan, finished_ids: Sequence[str]) -> float:
    """KL(Phi || Phi_0) of the batches of those who finished, with their data's label distributions (Eq. 11, 12)."""
    workers = {worker.worker_id: worker for worker in view.workers}
    assert view.reference_distribution is not None, "a worker that finished has samples"
    distributions = label_distributions([workers[name].label_counts for name in finished_ids])  # (n, C)
    batch_sizes = np.array([plan.batch_size_of(name) for name in finished_ids])  # (n,)
    return kl_nats(mixture(batch_sizes, distributions), np.array(view.reference_distribution))
