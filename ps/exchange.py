"""Gather and scatter of one round: who answered in time, in plan order, and what became of the others.

Legend: d_i samples of worker i in one step, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mergesfl.control.plan import RoundPlan
from mergesfl.errors import MergeSFLError, RemoteProtocolError
from mergesfl.methods.base import MAY_OMIT_TENSORS, Setting, State, StepFeatures
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.limits import clipped
from mergesfl.protocol.messages import Assign, Features, Gradient, Release, Update, wire_round
from mergesfl.runtime.arrays import state_to_arrays, to_array, to_tensors
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.journal import DroppedWorker
from ps.fleet import Fleet, Member
from ps.outliers import MAX_MAGNITUDE, Outliers
from ps.switchboard import RoundMessage, Switchboard
from ps.waiting import wait_for_answers


class _NotFiniteError(MergeSFLError):
    """A worker's own arithmetic broke down: no use in this round, and no reason to close it."""


@dataclass(frozen=True)
class Arrival:
    """One worker's message and when it was received."""

    message: Features | Update
    received_seconds: float


class RoundExchange:
    """The messages of one round of one plan.

    Args:
        plan: who takes part.
        switchboard: all sessions.
        fleet: who is here.
        clock: measures deadlines and how long requests are held.
        feature_shape: F... of the run.
        num_classes: C of the run.
        step_deadline_seconds: how long to wait for the answers to one step.
        attempt: 1, 2, ... at this round.
        codecs: of the run.
    """

    def __init__(
        self,
        plan: RoundPlan,
        switchboard: Switchboard,
        fleet: Fleet,
        clock: Clock,
        feature_shape: tuple[int, ...],
        num_classes: int,
        step_deadline_seconds: float,
        attempt: int,
        codecs: RunCodecs,
    ) -> None:
        self._wire_round = wire_round(plan.round_num, attempt)
        self._plan = plan
        self._batch_sizes = dict(zip(plan.worker_ids, plan.batch_sizes, strict=True))
        self._switchboard = switchboard
        self._fleet = fleet
        self._num_removed = -1  # of the fleet, when somebody was last looked for who is gone
        self._clock = clock
        self._feature_shape = feature_shape
        self._num_classes = num_classes
        self._step_deadline_seconds = step_deadline_seconds
        self._codecs = codecs
        self._members: dict[str, Member] = {name: fleet.by_id[name] for name in plan.worker_ids}
        self._active = dict(self._members)
        self._assigned: dict[str, dict[str, np.ndarray]] = {}
        self._may_omit: set[str] = set()  # workers that may send fewer tensors back
        self._step = 0
        self._outliers = Outliers()
        self._magnitudes: dict[str, float] = {}  # worker_id -> max |z| of this step
        self.not_finite = False  # somebody sent what is not finite
        self.dropped: list[DroppedWorker] = []
        self.missed_deadline: list[str] = []
        self.assigned_seconds: dict[str, float] = {}
        self.held_seconds: dict[str, float] = dict.fromkeys(plan.worker_ids, 0.0)  # of all its requests together

    @property
    def active_ids(self) -> list[str]:
        """The workers still in the round, in plan order."""
        return list(self._active)

    def assign(self, method: str, settings: Mapping[str, Mapping[str, Setting]], states: Mapping[str, State]) -> None:
        """Sends each worker its work."""
        plan = self._plan
        # The same state goes to many workers: converted and encoded once.
        sent_of: dict[int, tuple[dict[str, np.ndarray], Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = {}
        for name, member in list(self._active.items()):
            state = states[name]
            if id(state) not in sent_of:
                arrays = state_to_arrays(state)
                sent_of[id(state)] = (arrays, *self._codecs.encode_assigned(arrays, name, self._wire_round))
            self._assigned[name], plain, parts = sent_of[id(state)]
            if settings[name].get(MAY_OMIT_TENSORS) is True:
                self._may_omit.add(name)
            batch_size = self._batch_sizes[name]
            assign = Assign(
                self._wire_round,
                plan.num_steps,
                plan.num_exchanges,
                batch_size,
                method,
                dict(settings[name]),
                plain,
                parts,
            )
            self._switchboard.send(member, assign)
            self.assigned_seconds[name] = self._clock.now_seconds()
        self._prune()

    def gather_features(self, step: int, device: torch.device) -> tuple[list[StepFeatures], dict[str, float]]:
        """Waits for the features of one step: what arrived, in plan order, and when each was received."""
        self._step, self._magnitudes = step, {}
        arrivals = self._gather(Features, self._step_deadline_seconds, {})
        self._outliers.note(self._magnitudes)
        return self._step_features({name: arrivals[name] for name in self._active}, device)

    def scatter_gradients(
        self, step: int, gradients: Sequence[torch.Tensor], received_seconds: Mapping[str, float]
    ) -> None:
        """Answers each worker with its slice (d_i, F...), given in plan order."""
        for name, gradient in zip(list(self._active), gradients, strict=True):
            self._answer(name, step, gradient, received_seconds[name])
        self._prune()

    def gather_updates(self) -> dict[str, Arrival]:
        """Waits for the trained states; a federated round has all its steps to compute before it answers."""
        num_silent_steps = 1 if self._plan.num_exchanges else self._plan.num_steps
        self._step = self._plan.num_steps
        return self._gather(Update, self._step_deadline_seconds * num_silent_steps, {})

    def expel_outliers(self) -> None:
        """The round has become infinite: closes those whose features were out of all proportion, if there are any."""
        for name, magnitude in self._outliers.magnitudes.items():
            member = self._members[name]
            if member.gone_reason is None:
                self._switchboard.expel(
                    member,
                    RemoteProtocolError(
                        f"worker '{name}' sent features up to {magnitude:.3g}, the limit is {MAX_MAGNITUDE:g} beside "
                        "workers that send less, and the training became infinite: check its data"
                    ),
                )
        self._prune()

    def release_all(self, reason: str) -> None:
        """Gives the round up for all who are still in it."""
        for member in self._active.values():
            if member.gone_reason is None and member.session.round_num is not None:
                self._switchboard.send(member, Release(self._wire_round, clipped(reason)))
        self._active = {}

    def _step_features(
        self, arrivals: Mapping[str, Arrival], device: torch.device
    ) -> tuple[list[StepFeatures], dict[str, float]]:
        """What these workers sent, in this order, on the device of the top, and when each was received."""
        messages = [arrival.message for arrival in arrivals.values()]
        features = to_tensors([one.features for one in messages if isinstance(one, Features)], device)  # (d_i, F...)
        labels = to_tensors([one.labels for one in messages if isinstance(one, Features)], device)  # (d_i,)
        arrived = [StepFeatures(*one) for one in zip(arrivals, features, labels, strict=True)]
        return arrived, {name: arrival.received_seconds for name, arrival in arrivals.items()}

    def _answer(self, name: str, step: int, gradient: torch.Tensor, received_seconds: float) -> None:
        """Sends one worker its gradient (d_i, F...)."""
        values, parts = self._codecs.encode_gradient(to_array(gradient), name, self._wire_round, step)
        held_seconds = self._clock.now_seconds() - received_seconds  # encoding is computing, too
        self.held_seconds[name] += held_seconds
        self._switchboard.send(self._active[name], Gradient(self._wire_round, step, held_seconds, values, parts))

    def _step_of(self, name: str) -> int:
        """The step that this worker is in."""
        return self._step

    def _gather(
        self, kind: type[Features] | type[Update], deadline_seconds: float, arrivals: dict[str, Arrival]
    ) -> dict[str, Arrival]:
        """Receives until all active workers have answered or the deadline has passed; drops those who have not.

        `arrivals` holds those who have answered before, and is added to.
        """
        waiting = {name: member for name, member in self._active.items() if name not in arrivals}

        def missing() -> list[Member]:  # at every message: little work, however many workers there are
            if self._prune():
                for name in waiting.keys() - self._active.keys():
                    del waiting[name]
            return list(waiting.values())

        def take(member: Member, message: RoundMessage) -> None:
            if self._active.get(member.worker_id) is member and isinstance(message, kind):
                self._take(member, message, arrivals)
                waiting.pop(member.worker_id, None)  # it has arrived, or is out of the round

        wait_for_answers(self._switchboard, self._clock, deadline_seconds, missing, take)
        for member in missing():
            self._miss(member.worker_id, deadline_seconds)
        return {name: arrivals[name] for name in self._active}

    def _take(self, member: Member, message: Features | Update, arrivals: dict[str, Arrival]) -> None:
        received_seconds = self._clock.now_seconds()  # decoding is computing, not transfer
        try:
            message = self._decoded(member.worker_id, message)
            self._check(member, message)
        except RemoteProtocolError as error:
            self._switchboard.expel(member, error)
        except _NotFiniteError as error:
            self._give_up(member, str(error))
        else:
            arrivals[member.worker_id] = Arrival(message, received_seconds)

    def _decoded(self, name: str, message: Features | Update) -> Features | Update:
        """What the worker meant. Raises RemoteProtocolError for what the run's codec does not make."""
        try:
            if isinstance(message, Update):
                return self._codecs.decode_update(message)
            return self._codecs.decode_features(message, (self._batch_sizes[name], *self._feature_shape))
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"worker '{name}' {error}") from None

    def _check(self, member: Member, message: Features | Update) -> None:
        """Raises RemoteProtocolError for content that no honest worker sends, _NotFiniteError for what is of no use."""
        name, batch_size = member.worker_id, self._batch_sizes[member.worker_id]
        if isinstance(message, Update):
            expected_samples = batch_size * self._plan.num_steps
            if message.num_samples != expected_samples:
                raise RemoteProtocolError(
                    f"worker '{name}' trained {message.num_samples} samples, not {expected_samples}"
                )
            self._check_state(name, message.state)
            return
        if message.labels.shape != (batch_size,) or message.labels.dtype != np.int64:
            raise RemoteProtocolError(
                f"worker '{name}' sent labels {message.labels.dtype}{message.labels.shape}, "
                f"expected int64{(batch_size,)}"
            )
        labels = message.labels
        if len(labels) and not int(labels.view(np.uint64).max()) < self._num_classes:  # what is negative is huge
            raise RemoteProtocolError(
                f"worker '{name}' sent labels from {labels.min()} to {labels.max()}, "
                f"expected 0 to {self._num_classes - 1}"
            )
        features = message.features
        magnitude = float(max(features.max(), -features.min())) if features.size else 0.0  # NaN: both are NaN
        if not math.isfinite(magnitude):
            raise _NotFiniteError(f"worker '{name}' sent features that are not finite")
        self._magnitudes[name] = magnitude

    def _check_state(self, name: str, state: Mapping[str, np.ndarray]) -> None:
        """A trained state has the names, shapes and dtypes of the one that was assigned, and finite numbers.

        Tensors are missing only where the method allows it.
        """
        assigned = self._assigned[name]
        if not (state.keys() == assigned.keys() or (name in self._may_omit and state.keys() < assigned.keys())):
            odd = sorted(state.keys() ^ assigned.keys())[:3]
            raise RemoteProtocolError(f"worker '{name}' sent a state of other tensors than it was given: {odd} ...")
        for key, array in state.items():
            if array.shape != assigned[key].shape or array.dtype != assigned[key].dtype:
                raise RemoteProtocolError(
                    f"worker '{name}' sent '{key}' as {array.dtype}{array.shape}, "
                    f"expected {assigned[key].dtype}{assigned[key].shape}"
                )
        for key, array in state.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise _NotFiniteError(f"worker '{name}' sent a state whose '{key}' is not finite")

    def _give_up(self, member: Member, reason: str) -> None:
        """A worker whose arithmetic broke down is out of this round; in the next it starts from the global model."""
        del self._active[member.worker_id]
        self.not_finite = True
        self.dropped.append(DroppedWorker(member.worker_id, self._step_of(member.worker_id), reason))
        if member.session.round_num is not None:  # after an Update there is nothing to drop
            self._switchboard.send(member, Release(self._wire_round, clipped(reason)))

    def _miss(self, name: str, deadline_seconds: float) -> None:
        """A worker that is reachable but too slow: released, and not chosen again before it has been heard."""
        member = self._active.pop(name)
        reason = f"no answer within {deadline_seconds:g} s (cluster.step_deadline_seconds)"
        self.dropped.append(DroppedWorker(name, self._step_of(name), reason))
        self.missed_deadline.append(name)
        if self._switchboard.send(member, Release(self._wire_round, reason)):
            member.silent = True

    def _prune(self) -> bool:
        """Takes the workers that are gone out of the round; whether there was one."""
        if self._fleet.num_removed == self._num_removed:
            return False
        self._num_removed = self._fleet.num_removed
        gone = [(name, member.gone_reason) for name, member in self._active.items() if member.gone_reason is not None]
        for name, reason in gone:
            del self._active[name]
            self.dropped.append(DroppedWorker(name, self._step_of(name), reason))
        return bool(gone)
