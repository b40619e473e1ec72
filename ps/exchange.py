"""Gather and scatter of one round: who answered in time, in plan order, and what became of the others.

Features are decoded when they arrive, straight to their worker's place in the buffer (ps/buffer.py): while the others
are waited for, and what was received is let go. Places lie in plan order, so when all are there the buffer is the
merged batch; of workers that were lost there are gaps.

Legend: d_i samples of worker i in one step, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from mergesfl.control.plan import RoundPlan
from mergesfl.errors import RemoteProtocolError
from mergesfl.methods.base import MAY_OMIT_TENSORS, Setting, State, StepFeatures
from mergesfl.parts import part_sizes
from mergesfl.protocol.arrays import is_channels_last
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.limits import clipped
from mergesfl.protocol.messages import Assign, Features, Gradient, Release, Update, wire_round
from mergesfl.runtime.arrays import state_to_arrays, to_array
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.journal import DroppedWorker
from ps.buffer import MergeBuffer, on_device, room_of
from ps.content import NotFiniteError, read_features, read_update
from ps.fleet import Fleet, Member
from ps.outliers import MAX_MAGNITUDE, Outliers
from ps.switchboard import RoundMessage, Switchboard
from ps.waiting import wait_for_answers


@dataclass(frozen=True)
class Arrival:
    """One worker's message, of features what is left of it in main memory, and when it was received."""

    message: StepFeatures | Update
    received_seconds: float
    magnitude: float = 0.0  # max |z| of features


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
        take: is given the trained state of each worker that finishes, when it arrives.
        buffer: of the run; what is in it is nobody's any more.
        parts_per_step: in how many parts a worker sends its batch, if it has as many samples.
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
        take: Callable[[str, Update], None],
        buffer: MergeBuffer,
        parts_per_step: int = 1,
    ) -> None:
        self._wire_round = wire_round(plan.round_num, attempt)
        self._plan = plan
        self._batch_sizes = dict(zip(plan.worker_ids, plan.batch_sizes, strict=True))
        self._parts_per_step = parts_per_step
        self._part_sizes = {name: part_sizes(size, parts_per_step) for name, size in self._batch_sizes.items()}
        self._switchboard = switchboard
        self._fleet = fleet
        self._num_removed = -1  # of the fleet, when somebody was last looked for who is gone
        self._clock = clock
        self._feature_shape = feature_shape
        self._num_classes = num_classes
        self._step_deadline_seconds = step_deadline_seconds
        self._codecs = codecs
        self._take = take
        self._finished: dict[str, Arrival] = {}  # workers whose trained state was taken, and their Updates without it
        self._buffer = buffer
        self._begins: dict[str, int] = {}  # worker_id -> where its place in the buffer begins
        self._members: dict[str, Member] = {name: fleet.by_id[name] for name in plan.worker_ids}
        self._active = dict(self._members)
        self._assigned: dict[str, dict[str, np.ndarray]] = {}
        self._may_omit: set[str] = set()  # workers that may send fewer tensors back
        self._step = 0
        self._outliers = Outliers()
        self.not_finite = False  # somebody sent what is not finite
        self.dropped: list[DroppedWorker] = []
        self.missed_deadline: list[str] = []
        self.assigned_seconds: dict[str, float] = {}
        self.held_seconds: dict[str, float] = dict.fromkeys(plan.worker_ids, 0.0)  # while any of its requests was here
        self._answered_seconds: dict[str, float] = {}  # worker_id -> when it was last answered

    @property
    def active_ids(self) -> list[str]:
        """The workers still at work, in plan order."""
        return list(self._active)

    @property
    def num_left(self) -> int:
        """How many these are, with those that have finished."""
        return len(self._active) + len(self._finished)

    def assign(self, method: str, settings: Mapping[str, Mapping[str, Setting]], states: Mapping[str, State]) -> None:
        """Sends each worker its work."""
        plan = self._plan
        if plan.num_exchanges:
            self._open_places()
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
                self._parts_per_step,
            )
            self._switchboard.send(member, assign)
            self.assigned_seconds[name] = self._clock.now_seconds()
        self._prune()

    def gather_features(self, step: int, device: torch.device) -> tuple[list[StepFeatures], list[float]]:
        """Waits for the features of one step: what arrived, in plan order, and when each was received."""
        self._step = step
        arrivals = self._gather(Features, self._step_deadline_seconds)
        self._outliers.note({name: arrival.magnitude for name, arrival in arrivals.items()})
        return self._step_features(arrivals.values(), device)

    def answer(
        self,
        step: int,
        arrived: Sequence[StepFeatures],
        gradients: Sequence[torch.Tensor],
        received_seconds: Sequence[float],
    ) -> None:
        """Answers these workers with their gradients (d_i, F...)."""
        for one, gradient, seconds in zip(arrived, gradients, received_seconds, strict=True):
            self._answer(one, step, gradient, seconds)
        self._prune()

    def gather_updates(self) -> dict[str, Arrival]:
        """Waits for the trained states, each taken as it comes; a federated round has all its steps to compute before.

        Who has finished counts, whatever becomes of it then. Their Updates in plan order, without the states.
        """
        num_silent_steps = 1 if self._plan.num_exchanges else self._plan.num_steps
        self._step = self._plan.num_steps
        self._gather(Update, self._step_deadline_seconds * num_silent_steps)
        return {name: self._finished[name] for name in self._plan.worker_ids if name in self._finished}

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
        self, arrivals: Iterable[Arrival], device: torch.device
    ) -> tuple[list[StepFeatures], list[float]]:
        """What these workers sent, as it lies in the buffer, on the device of the top, and when each was received."""
        found = [(one.message, one.received_seconds) for one in arrivals if isinstance(one.message, StepFeatures)]
        found.sort(key=lambda pair: pair[0].features.storage_offset())
        return on_device([message for message, _ in found], device), [seconds for _, seconds in found]

    def _open_places(self) -> None:
        """Makes room for the features of all workers."""
        rooms = [room_of((size, *self._feature_shape)) for size in self._batch_sizes.values()]
        *begins, end = accumulate(rooms, initial=0)
        self._begins = dict(zip(self._batch_sizes, begins, strict=True))
        self._buffer.reserve(end)

    def _take_place(self, name: str, step: int, num_numbers: int) -> int:
        """Where in the buffer the place for so many numbers begins, which this worker has sent in this step."""
        return self._begins[name]

    def _answer(self, one: StepFeatures, step: int, gradient: torch.Tensor, received_seconds: float) -> None:
        """Sends one worker the gradient (d_i, F...) for these features."""
        name, part = one.worker_id, one.part
        values, others = self._codecs.encode_gradient(to_array(gradient), name, self._wire_round, step, part)
        now_seconds = self._clock.now_seconds()  # encoding is computing, too
        begin_seconds = max(received_seconds, self._answered_seconds.get(name, received_seconds))
        self.held_seconds[name] += now_seconds - begin_seconds  # another part of it may have been here, too
        self._answered_seconds[name] = now_seconds
        answer = Gradient(self._wire_round, step, now_seconds - received_seconds, values, others, part)
        self._switchboard.send(self._active[name], answer)

    def _step_of(self, name: str) -> int:
        """The step that this worker is in."""
        return self._step

    def _gather(self, kind: type[Features] | type[Update], deadline_seconds: float) -> dict[str, Arrival]:
        """Receives until all active workers have answered or the deadline has passed; drops those who have not.

        Returns what those who are still active have sent, in plan order.
        """
        waiting, arrivals = dict(self._active), dict[str, Arrival]()

        def missing() -> Collection[Member]:  # at every message: little work, however many workers there are
            if self._prune():
                for name in waiting.keys() - self._active.keys():
                    del waiting[name]
            return waiting.values()

        def take(member: Member, message: RoundMessage) -> None:
            if self._active.get(member.worker_id) is member and isinstance(message, kind):
                arrival = self._accepted(member, message)
                if arrival is not None:
                    arrivals[member.worker_id] = arrival
                waiting.pop(member.worker_id, None)  # it has arrived, or is out of the round

        wait_for_answers(self._switchboard, self._clock, deadline_seconds, missing, take)
        for member in list(missing()):
            self._miss(member.worker_id, deadline_seconds)
        return {name: arrivals[name] for name in self._active}

    def _accepted(self, member: Member, message: Features | Update) -> Arrival | None:
        """The message, decoded and checked; None: it was of no use, and its worker is out of the round."""
        received_seconds = self._clock.now_seconds()  # decoding is computing, not transfer
        try:
            return self._arrival(member.worker_id, message, received_seconds)
        except RemoteProtocolError as error:
            self._switchboard.expel(member, error)
        except NotFiniteError as error:
            self._give_up(member, str(error))
        return None

    def _arrival(self, name: str, message: Features | Update, received_seconds: float) -> Arrival:
        """The message, decoded and checked. Raises RemoteProtocolError, NotFiniteError."""
        if isinstance(message, Update):
            return self._finish(name, message, received_seconds)
        num_samples = self._part_sizes[name][message.part]  # the session has seen to it that there is such a part
        shape = (num_samples, *self._feature_shape)
        channels_last = message.features.shape == shape and is_channels_last(message.features)
        begin = self._take_place(name, message.step, room_of(shape))
        place = self._buffer.place(begin, shape, channels_last)
        magnitude = read_features(name, message, place.numpy(), self._num_classes, self._codecs)
        labels = torch.from_numpy(message.labels.copy())
        return Arrival(StepFeatures(name, place, labels, message.part), received_seconds, magnitude)

    def _finish(self, name: str, message: Update, received_seconds: float) -> Arrival:
        """Hands on the trained state, decoded and checked; from then on its worker has finished. Raises the same."""
        num_samples = self._batch_sizes[name] * self._plan.num_steps
        assigned, may_omit = self._assigned[name], name in self._may_omit
        update = read_update(name, message, num_samples, assigned, may_omit, self._codecs)
        self._take(name, update)
        self._finished[name] = Arrival(replace(update, state={}), received_seconds)
        del self._active[name]
        return self._finished[name]

    def _give_up(self, member: Member, reason: str) -> None:
        """A worker whose arithmetic broke down is out of this round; in the next it starts from the global model."""
        self._drop(member.worker_id, reason)
        self.not_finite = True
        if member.session.round_num is not None:  # after an Update there is nothing to drop
            self._switchboard.send(member, Release(self._wire_round, clipped(reason)))

    def _miss(self, name: str, deadline_seconds: float) -> None:
        """A worker that is reachable but too slow: released, and not chosen again before it has been heard."""
        member = self._active[name]
        reason = f"no answer within {deadline_seconds:g} s (cluster.step_deadline_seconds)"
        self._drop(name, reason)
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
            self._drop(name, reason)
        return bool(gone)

    def _drop(self, name: str, reason: str) -> None:
        """Takes a worker out of the round."""
        self.dropped.append(DroppedWorker(name, self._step_of(name), reason))
        del self._active[name]
