"""The messages of a round whose features are processed as they arrive.

While a step is open, a worker that has its gradient computes on and sends the features of the next step, which are kept
until their turn comes: of one step at most, for it sends one and then waits. After the last it sends its trained state.
So nobody is ever more than one step ahead, and a worker's session is the same as at the barrier. Where a step goes in
parts (training.parts_per_step), each of them is a message of its own and is answered as it comes, in the order of the
parts; a worker is through with the step when all of them were handed on.

In the buffer features lie in the order in which they came, and so they are handed on: those of a group one behind the
other. The next step has the other half of the buffer, for the rows of the open one are in use until it is closed.

A worker has cluster.step_deadline_seconds from its own last answer on, however long the others take. Features that
arrive while the server computes are read when it has finished, and count as held from then on: the worker sees the
rest, the computing for one group at most or the adding up of states, as transfer.

However many workers there are, a message costs the same: of those that the step waits for, who is due first stands
first, because all have the same deadline and whoever is answered goes to the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from mergesfl.methods.base import Setting, State, StepFeatures
from mergesfl.protocol.messages import Features, Update
from ps.buffer import room_of
from ps.exchange import Arrival, RoundExchange
from ps.fleet import Member
from ps.switchboard import RoundMessage
from ps.waiting import Probing, wait_for_answers

ROUNDING_SECONDS = 1e-6  # now + (due - now) may be a little less than due


class StreamingExchange(RoundExchange):
    """Hands on whatever has arrived, and answers each group on its own."""

    _inbox: dict[str, list[Arrival]]  # worker_id -> what it has sent and nobody has taken yet, never empty
    _due_seconds: dict[str, float]  # worker_id -> when its next message must be here
    _num_open: dict[str, int]  # worker_id -> parts of the open step that have not been handed on, if there are any
    _ready: set[str]  # of these workers those of whom there is something in the inbox
    _awaited: dict[str, Member]  # and the others, who is due first comes first
    _places: dict[str, int]  # worker_id -> place in the plan
    _step_magnitudes: dict[str, float]  # worker_id -> max |z| of what has been handed on
    _probing: Probing
    _half: int  # of the buffer, in numbers: room for one step
    _ends: list[int]  # where the next place in each half begins; step k has half k % 2

    def assign(self, method: str, settings: Mapping[str, Mapping[str, Setting]], states: Mapping[str, State]) -> None:
        """Sends each worker its work; nothing has arrived yet."""
        self._step = -1  # all that are left are through with the step before the first
        self._inbox, self._num_open, self._ready, self._awaited = {}, {}, set(), {}
        self._places = {name: place for place, name in enumerate(self._active)}
        super().assign(method, settings, states)
        self._due_seconds = {
            name: seconds + self._step_deadline_seconds for name, seconds in self.assigned_seconds.items()
        }

    @property
    def is_step_open(self) -> bool:
        """Whether there are features of the open step that have not been handed on."""
        return bool(self._num_open)

    def begin_step(self, step: int) -> None:
        """Opens a step of all workers that are still in the round."""
        self._step, self._step_magnitudes = step, {}
        self._num_open = {name: len(self._part_sizes[name]) for name in self._active}
        following = (step + 1) % 2
        self._ends[following] = following * self._half  # of the step after this one nothing can be here yet
        self._ready = {name for name in self._active if name in self._inbox}
        awaited = [name for name in self._active if name not in self._inbox]
        self._awaited = {name: self._active[name] for name in sorted(awaited, key=self._due_seconds.__getitem__)}
        self._probing = Probing(self._clock, self._switchboard.patience.probe_seconds)

    def next_group(self, device: torch.device) -> tuple[list[StepFeatures], list[float]]:
        """Waits for features of the open step; then all that are there, as they came, and when each was received.

        None are returned when instead of an arrival somebody was lost.
        """
        self._drain()
        if not self._ready:
            self._wait()
        arrivals: list[Arrival] = []
        for name in sorted(self._ready, key=self._places.__getitem__):
            own = self._inbox.pop(name)
            arrivals += own
            magnitudes = (arrival.magnitude for arrival in own)
            self._step_magnitudes[name] = max(self._step_magnitudes.get(name, 0.0), *magnitudes)
            self._num_open[name] -= len(own)
            if not self._num_open[name]:
                del self._num_open[name]
            self._expect(name)
        self._ready = set()
        return self._step_features(arrivals, device)

    def _open_places(self) -> None:
        """Makes room for two steps."""
        sizes = [size for own in self._part_sizes.values() for size in own]
        self._half = sum(room_of((size, *self._feature_shape)) for size in sizes)
        self._buffer.reserve(2 * self._half)
        self._ends = [0, self._half]

    def _take_place(self, name: str, step: int, num_numbers: int) -> int:
        begin = self._ends[step % 2]
        self._ends[step % 2] += num_numbers
        return begin

    def _answer(self, one: StepFeatures, step: int, gradient: torch.Tensor, received_seconds: float) -> None:
        """From then on the worker has the step deadline for its next message."""
        super()._answer(one, step, gradient, received_seconds)
        self._expect(one.worker_id)

    def end_step(self) -> None:
        """Closes the step."""
        self._outliers.note(self._step_magnitudes)

    def _step_of(self, name: str) -> int:
        return min(self._step + (name not in self._num_open), self._plan.num_steps)

    def _expect(self, name: str) -> None:
        """From now on this worker has the step deadline for its next message."""
        self._due_seconds[name] = self._clock.now_seconds() + self._step_deadline_seconds
        if name in self._num_open:
            self._awaited.pop(name, None)
            self._awaited[name] = self._active[name]

    def _wait(self) -> None:
        """Until somebody of the open step is there or late; drops those who are late."""

        def missing() -> Collection[Member]:
            self._prune()
            return () if self._ready else self._awaited.values()

        missing()
        first = next(iter(self._awaited), None)
        due_seconds = 0.0 if first is None else self._due_seconds[first]
        deadline_seconds = max(due_seconds - self._clock.now_seconds(), 0.0)
        wait_for_answers(self._switchboard, self._clock, deadline_seconds, missing, self._keep, self._probing)
        self._drain()
        now_seconds = self._clock.now_seconds()
        while self._awaited:
            first = next(iter(self._awaited))
            if now_seconds < self._due_seconds[first] - ROUNDING_SECONDS:
                break
            self._miss(first, self._step_deadline_seconds)

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
        name = member.worker_id
        if self._active.get(name) is not member or not isinstance(message, Features | Update):
            return
        arrival = self._accepted(member, message)
        if arrival is None or isinstance(message, Update):
            return
        self._inbox.setdefault(name, []).append(arrival)
        if name in self._num_open:
            self._ready.add(name)
            self._awaited.pop(name, None)

    def _drop(self, name: str, reason: str) -> None:
        """What it has sent and nobody has taken is dropped with it."""
        super()._drop(name, reason)
        self._inbox.pop(name, None)
        self._num_open.pop(name, None)
        self._ready.discard(name)
        self._awaited.pop(name, None)
