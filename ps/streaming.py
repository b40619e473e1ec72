"""The messages of a round whose features are processed as they arrive.

While a step is open, a worker that has its gradient computes on and sends the features of the next step, or after the
last one its trained state. They are kept until their turn comes: one message per worker at most, for it sends one and
then waits. So nobody is ever more than one step ahead, and a worker's session is the same as at the barrier.

A worker has cluster.step_deadline_seconds from its own last answer on, however long the others take. Features that
arrive while the server computes are read when it has finished, and count as held from then on: the worker sees the
rest, the computing for one group at most, as transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mergesfl.methods.base import Setting, State, StepFeatures
from mergesfl.protocol.messages import Features, Update
from ps.exchange import Arrival, RoundExchange
from ps.fleet import Member
from ps.switchboard import RoundMessage
from ps.waiting import Probing, wait_for_answers

ROUNDING_SECONDS = 1e-6  # now + (due - now) may be a little less than due


class StreamingExchange(RoundExchange):
    """Hands on whoever has arrived, and answers each group on its own."""

    _inbox: dict[str, Arrival]  # worker_id -> what it has sent and nobody has taken yet
    _due_seconds: dict[str, float]  # worker_id -> when its next message must be here
    _taken: set[str]  # whose features of the open step have been handed on: they are in the next one
    _step_magnitudes: dict[str, float]  # worker_id -> max |z|, of those
    _probing: Probing

    def assign(self, method: str, settings: Mapping[str, Mapping[str, Setting]], states: Mapping[str, State]) -> None:
        """Sends each worker its work; nothing has arrived yet."""
        self._inbox, self._taken = {}, set()
        super().assign(method, settings, states)
        self._due_seconds = {
            name: seconds + self._step_deadline_seconds for name, seconds in self.assigned_seconds.items()
        }

    @property
    def open_ids(self) -> list[str]:
        """The workers whose features of the open step have not been handed on, in plan order."""
        return [name for name in self._active if name not in self._taken]

    def begin_step(self, step: int) -> None:
        """Opens a step of all workers that are still in the round."""
        self._step, self._taken, self._step_magnitudes = step, set(), {}
        self._probing = Probing(self._clock, self._switchboard.patience.probe_seconds)

    def next_group(self, device: torch.device) -> tuple[list[StepFeatures], dict[str, float]]:
        """Waits for features of the open step; then all that are there, in plan order, and when each was received.

        None are returned when instead of an arrival somebody was lost.
        """
        self._drain()
        if not self._ready_ids():
            self._wait()
        arrivals = {name: self._inbox.pop(name) for name in self._ready_ids()}
        for name in arrivals:
            self._taken.add(name)
            self._step_magnitudes[name] = self._magnitudes[name]  # a worker that waits has sent nothing since
        return self._step_features(arrivals, device)

    def answer_group(
        self, group: Sequence[StepFeatures], gradients: Sequence[torch.Tensor], received_seconds: Mapping[str, float]
    ) -> None:
        """Answers these workers with their gradients (d_i, F...); each has the step deadline for its next message."""
        for one, gradient in zip(group, gradients, strict=True):
            self._answer(one.worker_id, self._step, gradient, received_seconds[one.worker_id])
            self._due_seconds[one.worker_id] = self._clock.now_seconds() + self._step_deadline_seconds
        self._prune()

    def end_step(self) -> None:
        """Closes the step."""
        self._outliers.note(self._step_magnitudes)

    def gather_updates(self) -> dict[str, Arrival]:
        """Waits for the trained states that are not here yet."""
        self._step, self._taken = self._plan.num_steps, set()
        arrived, self._inbox = self._inbox, {}  # a state is held by those who use it alone
        return self._gather(Update, self._step_deadline_seconds, arrived)

    def _step_of(self, name: str) -> int:
        return self._step + (name in self._taken)

    def _ready_ids(self) -> list[str]:
        return [name for name in self.open_ids if name in self._inbox]

    def _missing(self) -> list[Member]:
        """Whom the open step waits for."""
        return [self._active[name] for name in self.open_ids if name not in self._inbox]

    def _wait(self) -> None:
        """Until somebody of the open step is there or late; drops those who are late."""

        def missing() -> list[Member]:
            self._prune()
            return [] if self._ready_ids() else self._missing()

        due_seconds = min((self._due_seconds[member.worker_id] for member in missing()), default=0.0)
        deadline_seconds = max(due_seconds - self._clock.now_seconds(), 0.0)
        wait_for_answers(self._switchboard, self._clock, deadline_seconds, missing, self._keep, self._probing)
        self._drain()
        now_seconds = self._clock.now_seconds()
        for member in self._missing():
            if now_seconds >= self._due_seconds[member.worker_id] - ROUNDING_SECONDS:
                self._miss(member.worker_id, self._step_deadline_seconds)

    def _drain(self) -> None:
        """Reads what has arrived, without waiting; not for ever, should a peer never stop talking."""
        for _ in range(4 * len(self._members)):
            num_messages = self._switchboard.num_messages
            got = self._switchboard.receive(0.0)
            if got is not None:
                self._keep(*got)
            elif self._switchboard.num_messages == num_messages:
                break
        self._prune()

    def _keep(self, member: Member, message: RoundMessage) -> None:
        if self._active.get(member.worker_id) is member and isinstance(message, Features | Update):
            self._take(member, message, self._inbox)
