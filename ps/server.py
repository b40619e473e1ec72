"""The round loop of the parameter server: wait for workers, survey, plan, work, close; evaluate and record; again.

A round that loses workers goes on with the rest. When fewer than the quorum of its plan are left, the round is void:
the program goes back to where the round began, and the round is planned anew with the workers that are there then. The
same happens when the training becomes infinite; a worker whose features were out of all proportion is then put out.

What follows a round that counts (evaluation, journal, checkpoint) may go on beside the next one (evaluator.py): it is
done before the next one ends, and before the run ends in any way that can be resumed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mergesfl.config import RunConfig
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.errors import QuorumError, TransportError
from mergesfl.methods.base import ServerProgram, StreamingProgram, WorkerUpdate
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import Update
from mergesfl.runtime.arrays import borrowed_state
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.journal import DroppedWorker
from mergesfl.seeding import generator_for
from mergesfl.training.evaluation import Evaluation
from mergesfl.training.finite import all_finite
from mergesfl.training.schedule import learning_rate
from ps.buffer import MergeBuffer
from ps.evaluator import Evaluator
from ps.exchange import RoundExchange
from ps.fleet import Fleet
from ps.merging import merge_as_they_arrive, merge_at_barrier
from ps.muster import Muster
from ps.outcome import Accounts, RoundOutcome, merged_kl_nats, observed_seconds, teach_missed, waiting_seconds
from ps.progress import Progress
from ps.recorder import Recorder
from ps.streaming import StreamingExchange
from ps.survey import FleetSurvey
from ps.switchboard import InterruptedRunError, Switchboard
from ps.void import InfiniteRoundError, VoidRoundError

log = logging.getLogger("ps")


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
        codecs: of the run.
        survey: asks the workers for their speeds before a round.
        evaluator: judges the network on the test set, and says when.
        device: where the top runs.
        charge: told the samples of every merged step, or of every part of one, once it is computed; lets virtual time
            pass for it.
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
        codecs: RunCodecs,
        survey: FleetSurvey,
        evaluator: Evaluator,
        device: torch.device,
        charge: Callable[[int], None] = lambda num_samples: None,
    ) -> None:
        self._config = config
        self._program = program
        self._fleet = fleet
        self._switchboard = switchboard
        self._recorder = recorder
        self._progress = progress
        self._clock = clock
        self._feature_shape = feature_shape
        self._feature_bytes_per_sample = codecs.feature_bytes(feature_shape)
        self._codecs = codecs
        self._buffer = MergeBuffer()
        self._survey = survey
        self._evaluator = evaluator
        self._device = device
        self._charge = charge
        self._muster = Muster(config.cluster, fleet, switchboard, progress, clock)
        self._begin_seconds = clock.now_seconds()

    def run(self, resume: bool) -> dict[str, Any]:
        """All rounds; returns the summary.

        Raises QuorumError, InterruptedRunError, and TransportError when a rank of the top is lost (ps/ranks.py); what
        is done is saved then. And what evaluating, recording or saving a round raises, when the next one ends at the
        latest.
        """
        config = self._config
        next_round = self._restore() if resume else 0
        self._recorder.open(next_round)
        self._progress.started(next_round, config.training.num_rounds)
        if next_round < config.training.num_rounds:
            self._muster.wait_for_all()
        last_safe_state = self._program.state_dict()
        try:
            while next_round < config.training.num_rounds:
                outcome, accounts = self._play_round(next_round, last_safe_state)
                self._evaluator.wait()  # for the round before: one is pending at most
                next_round += 1
                last_safe_state = self._program.state_dict()
                self._begin_evaluation(outcome, accounts, last_safe_state)
            self._evaluator.wait()
        except (InterruptedRunError, QuorumError, TransportError):
            self._evaluator.wait()
            self._checkpoint(next_round, last_safe_state, self._fleet.state_dict())
            raise
        wall_seconds = self._clock.now_seconds() - self._begin_seconds
        self._switchboard.say_goodbye("the run is complete")  # now: pictures and export take a while
        return self._recorder.finish(self._program.network, self._fleet.known_label_counts, wall_seconds)

    def _restore(self) -> int:
        checkpoint = self._recorder.load()
        if checkpoint is None:
            return 0
        self._program.load_state_dict(checkpoint.tensors)
        self._fleet.load_state_dict(checkpoint.state["fleet"])
        self._recorder.wall_seconds_before = float(checkpoint.state["wall_seconds"])
        log.info("resuming at round %d", checkpoint.round_num)
        return checkpoint.round_num

    def _checkpoint(self, next_round: int, tensors: dict[str, Tensor], fleet_state: dict[str, Any]) -> None:
        wall_seconds = self._recorder.wall_seconds_before + self._clock.now_seconds() - self._begin_seconds
        self._recorder.checkpoint(next_round, tensors, {"fleet": fleet_state, "wall_seconds": wall_seconds})

    def _begin_evaluation(self, outcome: RoundOutcome, accounts: Accounts, safe_state: dict[str, Tensor]) -> None:
        """Evaluates if it is time, then the round's line, then a checkpoint if it is time: of how all is now.

        From here to the evaluator's `wait` the recorder is not the caller's.
        """
        round_num, recorder = outcome.plan.round_num, self._recorder
        fleet_state = self._fleet.state_dict() if recorder.is_checkpoint_due(round_num + 1) else None

        def keep(evaluation: Evaluation | None, evaluation_seconds: float) -> None:
            recorder.record(outcome.record(evaluation, evaluation_seconds, accounts))
            if fleet_state is not None:
                self._checkpoint(round_num + 1, safe_state, fleet_state)

        self._evaluator.begin(self._program.network if recorder.is_evaluation_due(round_num) else None, keep)

    def _play_round(self, round_num: int, safe_state: dict[str, Tensor]) -> tuple[RoundOutcome, Accounts]:
        """Repeats the round from this state until it counts. Raises QuorumError after too many void attempts."""
        cluster = self._config.cluster
        begin_bytes = (self._switchboard.ingress_bytes, self._switchboard.egress_bytes)
        begin_seconds = self._clock.now_seconds()
        survey_seconds = self._take_survey(round_num)
        dropped: list[DroppedWorker] = []  # of all attempts
        is_infinite = False
        for attempt in range(1, cluster.max_void_rounds + 1):
            self._muster.call()
            try:
                outcome = self._attempt(round_num, attempt, dropped)
            except VoidRoundError as void:
                log.warning("round %d is void: %s; repeating it", round_num, void)
                self._program.load_state_dict(safe_state)
                is_infinite = isinstance(void, InfiniteRoundError)
            else:
                return outcome, self._close_round(outcome, attempt, begin_seconds, begin_bytes, survey_seconds)
        if is_infinite:
            raise QuorumError(
                f"round {round_num} was void {cluster.max_void_rounds} times in a row (cluster.max_void_rounds), the "
                "last time because the training left the finite numbers: start a new run with training.learning_rate "
                f"below {self._config.training.learning_rate:g}"
            )
        raise QuorumError(
            f"round {round_num} was void {cluster.max_void_rounds} times in a row (cluster.max_void_rounds): see why "
            "the workers are lost, then go on with --resume"
        )

    def _take_survey(self, round_num: int) -> float:
        """Asks the workers for their speeds if it is time; how long that took. Raises QuorumError: nobody is there."""
        if not (self._program.plans_by_speed and self._survey.is_due(round_num)):
            return 0.0
        self._muster.call()
        begin_seconds = self._clock.now_seconds()
        self._survey.take(round_num)
        return self._clock.now_seconds() - begin_seconds

    def _view(self) -> FleetView:
        return self._fleet.view(self._feature_bytes_per_sample)

    def _attempt(self, round_num: int, attempt: int, dropped: list[DroppedWorker]) -> RoundOutcome:
        """One try at one round; adds those it lost to `dropped`. Raises VoidRoundError, InterruptedRunError."""
        config, program, clock = self._config, self._program, self._clock
        view = self._view()
        planning_begin_seconds = clock.now_seconds()
        plan = program.plan(round_num, view, generator_for(config.seed, "plan", round_num, attempt))
        planning_seconds = clock.now_seconds() - planning_begin_seconds
        kind = RoundExchange if config.training.merge == "barrier" else StreamingExchange
        exchange = kind(
            plan,
            self._switchboard,
            self._fleet,
            clock,
            self._feature_shape,
            self._fleet.num_classes,
            config.cluster.step_deadline_seconds,
            attempt,
            self._codecs,
            self._take,
            self._buffer,
            config.training.parts_per_step,
        )
        try:
            program.open(plan, view)
            exchange.assign(
                config.method.name,
                {name: program.settings_for(name) for name in plan.worker_ids},
                {name: program.state_for(name) for name in plan.worker_ids},
            )
            self._require_quorum(plan, exchange)
            num_samples_trained = self._merge(plan, exchange)
            updates = exchange.gather_updates()
            self._require_quorum(plan, exchange)
            train_loss_nats = program.close()
            if not math.isfinite(train_loss_nats or 0.0):
                raise InfiniteRoundError(f"the training loss is {train_loss_nats}")
            if not all(all_finite(tensor) for tensor in program.network.joined_state_dict().values()):
                raise InfiniteRoundError("the model is not finite")
        except (VoidRoundError, InterruptedRunError) as end:
            if isinstance(end, InfiniteRoundError):
                exchange.expel_outliers()
            if isinstance(end, VoidRoundError):
                teach_missed(self._fleet, plan, exchange.missed_deadline, config.cluster.step_deadline_seconds)
                dropped.extend(exchange.dropped)
            exchange.release_all(str(end))
            raise
        if not plan.num_exchanges:
            num_samples_trained = sum(plan.batch_size_of(name) * plan.num_steps for name in updates)
        return RoundOutcome(
            plan=plan,
            seconds=observed_seconds(plan, exchange, updates),
            dropped=(*dropped, *exchange.dropped),
            missed_deadline=tuple(exchange.missed_deadline),
            train_loss_nats=train_loss_nats,
            num_samples_trained=num_samples_trained,
            merged_kl_nats=merged_kl_nats(view, plan, list(updates)),
            planning_seconds=planning_seconds,
            waiting_seconds=waiting_seconds(exchange, updates),
        )

    def _take(self, name: str, update: Update) -> None:
        """Hands a trained state on. Raises RemoteProtocolError like the program."""
        state = borrowed_state(update.state)
        self._program.take(WorkerUpdate(name, state, update.num_samples, update.metrics))

    def _merge(self, plan: RoundPlan, exchange: RoundExchange) -> int:
        """All exchanges of the round, as training.merge says; the samples trained in them. Raises VoidRoundError."""
        program, num_exchanges = self._program, plan.num_exchanges

        def require_quorum() -> None:
            self._require_quorum(plan, exchange)

        if not isinstance(exchange, StreamingExchange):
            return merge_at_barrier(program, exchange, num_exchanges, self._device, self._charge, require_quorum)
        assert isinstance(program, StreamingProgram), "checked before the run"
        in_order = self._config.training.merge == "streaming-in-order"
        return merge_as_they_arrive(
            program, exchange, num_exchanges, self._device, self._charge, require_quorum, in_order
        )

    def _close_round(
        self,
        outcome: RoundOutcome,
        attempt: int,
        begin_seconds: float,
        begin_bytes: tuple[int, int],
        survey_seconds: float,
    ) -> Accounts:
        """Learns from the round, and returns what it took."""
        training, round_num = self._config.training, outcome.plan.round_num
        outcome.teach(self._fleet, self._config.cluster.step_deadline_seconds)
        self._fleet.finished(list(outcome.seconds))
        return Accounts(
            ingress_bytes=self._switchboard.ingress_bytes - begin_bytes[0],
            egress_bytes=self._switchboard.egress_bytes - begin_bytes[1],
            round_seconds=self._clock.now_seconds() - begin_seconds,
            learning_rate=learning_rate(
                round_num, training.learning_rate, training.learning_rate_decay, training.learning_rate_min
            ),
            attempt=attempt,
            survey_seconds=survey_seconds,
        )

    def _require_quorum(self, plan: RoundPlan, exchange: RoundExchange) -> None:
        needed, left = self._muster.quorum_of(len(plan.worker_ids)), exchange.num_left
        if left < needed:
            kind = InfiniteRoundError if exchange.not_finite else VoidRoundError
            raise kind(f"{left} of {len(plan.worker_ids)} workers are left, {needed} are needed")
