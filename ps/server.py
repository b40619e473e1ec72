"""The round loop of the parameter server: wait for workers, plan, work, close, evaluate, record; again.

A round that loses workers goes on with the rest. When fewer than the quorum of its plan are left, the round is void:
the program goes back to where the round began, and the round is planned anew with the workers that are there then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesfl.config import RunConfig
from mergesfl.control.divergence import kl_nats, label_distributions, mixture
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.errors import MergeSFLError, QuorumError
from mergesfl.methods.base import ServerProgram, WorkerUpdate
from mergesfl.protocol.messages import Update
from mergesfl.runtime.arrays import arrays_to_state
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.journal import RoundRecord
from mergesfl.seeding import generator_for
from mergesfl.training.evaluation import Evaluation
from mergesfl.training.schedule import learning_rate
from ps.exchange import Arrival, RoundExchange
from ps.fleet import Fleet
from ps.progress import Progress
from ps.recorder import Recorder
from ps.switchboard import InterruptedRunError, Switchboard

log = logging.getLogger("ps")


class VoidRoundError(MergeSFLError):
    """Too few workers of a plan are left."""


@dataclass(frozen=True)
class RoundOutcome:
    """What a round that counts leaves for the record."""

    plan: RoundPlan
    exchange: RoundExchange
    updates: dict[str, Arrival]
    train_loss_nats: float | None
    num_samples_trained: int
    merged_kl_nats: float
    planning_seconds: float


class Server:
    """One run of one program over one fleet.

    Args:
        config: the run.
        program: the server's side of the method.
        fleet: who is here.
        switchboard: all sessions.
        recorder: what the run leaves behind.
        progress: what a person sees meanwhile.
        clock: the only source of time.
        feature_shape: F..., shape of one sample at the cut.
        evaluate: judges the program's network on the test set.
        device: where the top runs.
    """

    def __init__(
        self,
        config: RunConfig,
        program: ServerProgram,
        fleet: Fleet,
        switchboard: Switchboard,
        recorder: Recorder,
        progress: Progress,
        clock: Clock,
        feature_shape: tuple[int, ...],
        evaluate: Callable[[], Evaluation],
        device: torch.device,
    ) -> None:
        self._config = config
        self._program = program
        self._fleet = fleet
        self._switchboard = switchboard
        self._recorder = recorder
        self._progress = progress
        self._clock = clock
        self._feature_shape = feature_shape
        self._feature_bytes_per_sample = 4 * math.prod(feature_shape)
        self._evaluate = evaluate
        self._device = device
        self._begin_seconds = clock.now_seconds()

    def run(self, resume: bool) -> dict[str, Any]:
        """All rounds; returns the summary. Raises QuorumError, InterruptedRunError; what is done is saved then."""
        config = self._config
        next_round = self._restore() if resume else 0
        self._recorder.open(next_round)
        self._progress.started(next_round, config.training.num_rounds)
        self._wait_for_workers()
        last_safe_state = self._program.state_dict()
        try:
            while next_round < config.training.num_rounds:
                record = self._play_round(next_round)
                next_round += 1
                last_safe_state = self._program.state_dict()
                self._recorder.record(record)
                if self._recorder.is_checkpoint_due(next_round):
                    self._checkpoint(next_round, last_safe_state)
        except (InterruptedRunError, QuorumError):
            self._checkpoint(next_round, last_safe_state)
            raise
        return self._recorder.finish(
            self._program.network,
            sorted(self._fleet.known_label_counts),
            self._clock.now_seconds() - self._begin_seconds,
        )

    def _restore(self) -> int:
        checkpoint = self._recorder.load()
        if checkpoint is None:
            return 0
        self._program.load_state_dict(checkpoint.tensors)
        self._fleet.load_state_dict(checkpoint.state["fleet"])
        self._recorder.wall_seconds_before = float(checkpoint.state["wall_seconds"])
        log.info("resuming at round %d", checkpoint.round_num)
        return checkpoint.round_num

    def _checkpoint(self, next_round: int, tensors: dict[str, Tensor]) -> None:
        wall_seconds = self._recorder.wall_seconds_before + self._clock.now_seconds() - self._begin_seconds
        self._recorder.checkpoint(
            next_round, tensors, {"fleet": self._fleet.state_dict(), "wall_seconds": wall_seconds}
        )

    def _wait_for_workers(self) -> None:
        """Until all are here; after the start deadline a quorum is enough. Raises QuorumError."""
        cluster = self._config.cluster
        quorum = self._quorum_of(cluster.num_workers)
        end_seconds = self._clock.now_seconds() + cluster.start_deadline_seconds
        while (num_here := len(self._fleet.available())) < cluster.num_workers:
            self._progress.waiting(num_here, cluster.num_workers)
            remaining_seconds = end_seconds - self._clock.now_seconds()
            if remaining_seconds <= 0:
                if num_here >= quorum:
                    log.warning("starting with %d of %d workers", num_here, cluster.num_workers)
                    return
                raise QuorumError(
                    f"{num_here} of {cluster.num_workers} workers registered within "
                    f"{cluster.start_deadline_seconds:g} s (cluster.start_deadline_seconds), {quorum} are needed: "
                    "start the others with `mergesfl worker --connect`, or lower cluster.num_workers"
                )
            self._switchboard.receive(remaining_seconds)
        self._progress.waiting(num_here, cluster.num_workers)

    def _quorum_of(self, num_workers: int) -> int:
        return max(1, math.ceil(self._config.cluster.quorum_fraction * num_workers))

    def _play_round(self, round_num: int) -> RoundRecord:
        """Repeats the round until it counts. Raises QuorumError after too many void attempts."""
        cluster = self._config.cluster
        safe_state = self._program.state_dict()
        begin_bytes = (self._switchboard.ingress_bytes, self._switchboard.egress_bytes)
        for attempt in range(1, cluster.max_void_rounds + 1):
            self._settle()
            if not any(worker.num_samples for worker in self._view().workers):
                self._wait_for_workers()
                self._require_samples()
            begin_seconds = self._clock.now_seconds()
            try:
                outcome = self._attempt(round_num, attempt)
            except VoidRoundError as void:
                log.warning("round %d is void: %s; repeating it", round_num, void)
                self._program.load_state_dict(safe_state)
                self._wait_for_quorum()
            else:
                return self._record(outcome, attempt, begin_seconds, begin_bytes)
        raise QuorumError(
            f"round {round_num} was void {cluster.max_void_rounds} times in a row (cluster.max_void_rounds): see why "
            "the workers are lost, then go on with --resume"
        )

    def _require_samples(self) -> None:
        """Raises QuorumError when there is nobody to plan for."""
        workers = self._view().workers
        if not any(worker.num_samples for worker in workers):
            raise QuorumError(
                f"none of the {len(workers)} workers that are here has samples, at least one is needed: check the "
                "partition or the workers' data sets, restart those that are lost, then go on with --resume"
            )

    def _settle(self) -> None:
        """Takes in what has arrived meanwhile: workers that join again, pings, farewells."""
        self._switchboard.settle()
        self._switchboard.probe(self._fleet.available())

    def _wait_for_quorum(self) -> None:
        """After a void round: until enough workers are here again. Raises QuorumError after the start deadline."""
        cluster = self._config.cluster
        needed = self._quorum_of(cluster.num_workers)
        end_seconds = self._clock.now_seconds() + cluster.start_deadline_seconds
        while len(self._fleet.available()) < needed:
            if self._clock.now_seconds() >= end_seconds:
                raise QuorumError(
                    f"{len(self._fleet.available())} of {cluster.num_workers} workers are left, {needed} are needed "
                    "(cluster.quorum_fraction): restart the others, then go on with --resume"
                )
            self._switchboard.receive(1.0)

    def _view(self) -> FleetView:
        return self._fleet.view(self._feature_bytes_per_sample)

    def _attempt(self, round_num: int, attempt: int) -> RoundOutcome:
        """One try at one round. Raises VoidRoundError, InterruptedRunError."""
        config, program, clock = self._config, self._program, self._clock
        view = self._view()
        planning_begin_seconds = clock.now_seconds()
        plan = program.plan(round_num, view, generator_for(config.seed, "plan", round_num, attempt))
        planning_seconds = clock.now_seconds() - planning_begin_seconds
        exchange = RoundExchange(
            plan,
            self._switchboard,
            self._fleet,
            clock,
            self._feature_shape,
            self._fleet.num_classes,
            config.cluster.step_deadline_seconds,
            attempt,
        )
        num_samples_trained = 0
        try:
            program.open(plan, view)
            exchange.assign(
                config.method.name,
                {name: program.settings_for(name) for name in plan.worker_ids},
                {name: program.state_for(name) for name in plan.worker_ids},
            )
            self._require_quorum(plan, exchange)
            for step in range(plan.num_exchanges):
                arrived, received_seconds = exchange.gather_features(step, self._device)
                self._require_quorum(plan, exchange)
                gradients = program.merge(step, arrived)
                exchange.scatter_gradients(step, gradients, received_seconds)
                num_samples_trained += sum(len(one.labels) for one in arrived)
            updates = exchange.gather_updates()
            self._require_quorum(plan, exchange)
        except (VoidRoundError, InterruptedRunError) as end:
            exchange.release_all(str(end))
            raise
        train_loss_nats = program.close(list(_worker_updates(updates)))
        self._learn(plan, exchange, updates)
        if not plan.num_exchanges:
            num_samples_trained = sum(update.num_samples for update in _worker_updates(updates))
        merged_nats = _merged_kl_nats(view, plan, list(updates))
        return RoundOutcome(
            plan, exchange, updates, train_loss_nats, num_samples_trained, merged_nats, planning_seconds
        )

    def _require_quorum(self, plan: RoundPlan, exchange: RoundExchange) -> None:
        needed, left = self._quorum_of(len(plan.worker_ids)), len(exchange.active_ids)
        if left < needed:
            raise VoidRoundError(f"{left} of {len(plan.worker_ids)} workers are left, {needed} are needed")

    def _learn(self, plan: RoundPlan, exchange: RoundExchange, updates: dict[str, Arrival]) -> None:
        """Smooths the observed speeds in (Eq. 5 and 6) and counts the participations."""
        estimates = self._fleet.estimates
        for name in updates:
            compute_seconds, transfer_seconds = self._observed(plan, exchange, updates, name)
            num_samples = plan.batch_size_of(name) * plan.num_steps
            estimates.observe(name, compute_seconds / num_samples, transfer_seconds / num_samples)
        for name in exchange.missed_deadline:  # it took at least the deadline for one step [ours]
            deadline_seconds = self._config.cluster.step_deadline_seconds
            estimates.observe(name, deadline_seconds / plan.batch_size_of(name), 0.0)
        self._fleet.finished(list(updates))

    def _observed(
        self, plan: RoundPlan, exchange: RoundExchange, updates: dict[str, Arrival], name: str
    ) -> tuple[float, float]:
        """Compute and transfer seconds of one worker in this round.

        A federated worker exchanges nothing; its transfer is what the round trip took beyond its own computing.
        """
        arrival = updates[name]
        message = arrival.message
        assert isinstance(message, Update), "gathered by kind"
        if plan.num_exchanges:
            return message.compute_seconds, message.transfer_seconds
        round_trip_seconds = arrival.received_seconds - exchange.assigned_seconds[name]
        return message.compute_seconds, max(round_trip_seconds - message.compute_seconds, 0.0)

    def _record(
        self, outcome: RoundOutcome, attempt: int, begin_seconds: float, begin_bytes: tuple[int, int]
    ) -> RoundRecord:
        """Evaluates, if it is time, and writes all figures of the round down."""
        plan, updates, training = outcome.plan, outcome.updates, self._config.training
        round_seconds = self._clock.now_seconds() - begin_seconds
        is_due = (plan.round_num + 1) % training.evaluate_every_rounds == 0 or plan.round_num + 1 == training.num_rounds
        evaluation = self._evaluate() if is_due else None
        observed_seconds = {name: sum(self._observed(plan, outcome.exchange, updates, name)) for name in updates}
        slowest_seconds = max(observed_seconds.values())
        return RoundRecord(
            round_num=plan.round_num,
            accuracy=evaluation.accuracy if evaluation else None,
            loss_nats=evaluation.loss_nats if evaluation else None,
            train_loss_nats=outcome.train_loss_nats,
            worker_ids=plan.worker_ids,
            batch_sizes=plan.batch_sizes,
            finished_worker_ids=tuple(updates),
            dropped=tuple(outcome.exchange.dropped),
            kl_before_nats=plan.kl_before_nats,
            kl_after_nats=plan.kl_after_nats,
            merged_kl_nats=outcome.merged_kl_nats,
            predicted_seconds=plan.predicted_seconds,
            observed_seconds=tuple(observed_seconds.get(name) for name in plan.worker_ids),
            predicted_idle_seconds=plan.predicted_idle_seconds,
            idle_seconds=sum(slowest_seconds - seconds for seconds in observed_seconds.values())
            / len(observed_seconds),
            ingress_bytes=self._switchboard.ingress_bytes - begin_bytes[0],
            egress_bytes=self._switchboard.egress_bytes - begin_bytes[1],
            samples_trained=outcome.num_samples_trained,
            planning_seconds=outcome.planning_seconds,
            round_seconds=round_seconds,
            evaluation_seconds=self._clock.now_seconds() - begin_seconds - round_seconds,
            learning_rate=learning_rate(
                plan.round_num, training.learning_rate, training.learning_rate_decay, training.learning_rate_min
            ),
            attempt=attempt,
        )


def _merged_kl_nats(view: FleetView, plan: RoundPlan, finished_ids: Sequence[str]) -> float:
    """KL(Phi || Phi_0) of the batches of those who finished, with their data's label distributions (Eq. 11, 12)."""
    workers = {worker.worker_id: worker for worker in view.workers}
    assert view.reference_distribution is not None, "a worker that finished has samples"
    distributions = label_distributions([workers[name].label_counts for name in finished_ids])  # (n, C)
    batch_sizes = np.array([plan.batch_size_of(name) for name in finished_ids])  # (n,)
    return kl_nats(mixture(batch_sizes, distributions), np.array(view.reference_distribution))


def _worker_updates(arrivals: dict[str, Arrival]) -> Iterable[WorkerUpdate]:
    for name, arrival in arrivals.items():
        message = arrival.message
        assert isinstance(message, Update), "gathered by kind"
        yield WorkerUpdate(name, arrays_to_state(message.state), message.num_samples, message.metrics)
