"""Which message is legal in which state: one table, kept in step at both ends.

Theory of operation. Each end holds one Session per connection and shows it every message before it is sent and after it
was decoded. Both ends run the same table, so at rest they are in the same state; between a send and its receipt they
may differ, and the rules below say exactly how far.

    NEW --Register--> REGISTERING --Welcome--> BUILDING --Ready--> IDLE
    IDLE --Assign--> WORKING --(Features--> WAITING --Gradient--> WORKING) x num_exchanges --Update--> IDLE
    IDLE --Survey--> SURVEYING --Probe--> PROBING --Echo--> REPORTING --Report--> IDLE

A step goes in n parts, n = min(parts_per_step, batch_size), as both ends reckon from the Assign: n Features, and n
Gradients back. An arrow by Features or Gradient is that of the last part; those before it leave the state as it is. So
WORKING means that parts are still to be sent, WAITING that all are out, and the two directions do not wait for each
other: in both states a part that is out may be answered. The same holds for Probe and Echo.

Rules:
1. A round number is used once in a session: each Assign or Survey carries a larger one than the last of both.
   Otherwise a late message of a released attempt could not be told from the new one. A round that is repeated gets a
   new number.
2. Features carry the round of the assignment and the next step, counted from 0, and of it the next part, counted from
   0: at most n are out at a time, because the next step begins when all of this one are answered. Gradients answer
   exactly them, in the order of the parts, and none that is not out; an Update comes after num_exchanges exchanges and
   not before. Probe, Echo and Report carry the number of the survey, and Probe and Echo their part.
3. Release ends the round or survey at once (-> IDLE) and a new Assign may follow at once. What the worker had sent
   before it saw the Release is STALE: at most the parts of the step that the PS has not seen yet, because without
   their answers it goes no further (where an Update or Report is next, that one message), and none if the PS released
   it while it waited (WAITING, PROBING). Messages keep their order, so anything fresh proves that nothing stale is
   left.
4. A Release that crosses the worker's Update or Report is STALE at the worker, and so is a Gradient or Echo of any
   round it has left.
5. Ping, Pong are legal from Register on. Leave, Refuse, Reset, Goodbye close the session from every state. What still
   arrives at an end that closed by itself is STALE; a peer that closed may say nothing more.
6. A Session ends with its connection. To register again, open a new connection (new routing id) and a new Session:
   then nothing of the old session can reach the new one.
7. An error changes nothing: the PS can still send Refuse or Reset to a worker that broke the protocol.

All [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mergesfl.errors import LocalProtocolError, RemoteProtocolError
from mergesfl.parts import part_sizes
from mergesfl.protocol.messages import (
    Assign,
    Echo,
    Features,
    Goodbye,
    Gradient,
    Leave,
    Message,
    Ping,
    Pong,
    Probe,
    Ready,
    Refuse,
    Register,
    Release,
    Report,
    Reset,
    Survey,
    Update,
    Welcome,
)


class Role(Enum):
    """Which end holds this session."""

    WORKER = "worker"
    SERVER = "server"

    __hash__ = object.__hash__  # of its identity: Enum's own is Python code, and every message asks several times


class State(Enum):
    """Where a session stands."""

    NEW = "new"  # nothing said yet
    REGISTERING = "registering"  # Register is out, the answer is not
    BUILDING = "building"  # welcome; the worker builds its model
    IDLE = "idle"
    WORKING = "working"  # the worker's turn
    WAITING = "waiting"  # features are out: the PS's turn
    SURVEYING = "surveying"  # the worker's turn: it computes, then probes
    PROBING = "probing"  # the probe is out: the PS's turn
    REPORTING = "reporting"  # the worker's turn: it has its figures
    CLOSED = "closed"

    __hash__ = object.__hash__  # as that of Role


class Arrival(Enum):
    """What to do with a legal message that was received: use it, or drop it without a word."""

    FRESH = "fresh"
    STALE = "stale"


# To ask an Enum for a member takes long.
FRESH, STALE = Arrival.FRESH, Arrival.STALE
_WORKING, _WAITING = State.WORKING, State.WAITING

Table = Mapping[State, Mapping[type[Message], State]]

FROM_WORKER: Table = {
    State.NEW: {Register: State.REGISTERING, Leave: State.CLOSED},
    State.REGISTERING: {Ping: State.REGISTERING, Leave: State.CLOSED},
    State.BUILDING: {Ready: State.IDLE, Ping: State.BUILDING, Leave: State.CLOSED},
    State.IDLE: {Ping: State.IDLE, Leave: State.CLOSED},
    State.WORKING: {
        Features: State.WAITING,
        Update: State.IDLE,
        Ping: State.WORKING,
        Leave: State.CLOSED,
    },
    State.WAITING: {Ping: State.WAITING, Leave: State.CLOSED},
    State.SURVEYING: {Probe: State.PROBING, Ping: State.SURVEYING, Leave: State.CLOSED},
    State.PROBING: {Ping: State.PROBING, Leave: State.CLOSED},
    State.REPORTING: {Report: State.IDLE, Ping: State.REPORTING, Leave: State.CLOSED},
    State.CLOSED: {},
}

_CLOSING: Mapping[type[Message], State] = {Refuse: State.CLOSED, Reset: State.CLOSED, Goodbye: State.CLOSED}

FROM_SERVER: Table = {
    State.NEW: {**_CLOSING},
    State.REGISTERING: {Welcome: State.BUILDING, Pong: State.REGISTERING, **_CLOSING},
    State.BUILDING: {Pong: State.BUILDING, **_CLOSING},
    State.IDLE: {Assign: State.WORKING, Survey: State.SURVEYING, Pong: State.IDLE, **_CLOSING},
    State.WORKING: {Gradient: State.WORKING, Release: State.IDLE, Pong: State.WORKING, **_CLOSING},
    State.WAITING: {Gradient: State.WORKING, Release: State.IDLE, Pong: State.WAITING, **_CLOSING},
    State.SURVEYING: {Echo: State.SURVEYING, Release: State.IDLE, Pong: State.SURVEYING, **_CLOSING},
    State.PROBING: {Echo: State.REPORTING, Release: State.IDLE, Pong: State.PROBING, **_CLOSING},
    State.REPORTING: {Release: State.IDLE, Pong: State.REPORTING, **_CLOSING},
    State.CLOSED: {},
}

_AT_WORK = frozenset({State.WORKING, State.WAITING, State.SURVEYING, State.PROBING, State.REPORTING})

_SPOKEN_BY: Mapping[Role, Table] = {Role.WORKER: FROM_WORKER, Role.SERVER: FROM_SERVER}
_OTHER: Mapping[Role, Role] = {Role.WORKER: Role.SERVER, Role.SERVER: Role.WORKER}


# What begins a round or a survey, what a worker says in one, and what both ends say in one once it has begun. Tuples:
# every message is asked for them several times, and to ask a union takes ten times as long.
_BEGIN = (Assign, Survey)
_FROM_WORKER = (Features, Update, Probe, Report)
_OF_A_ROUND = (Features, Gradient, Update, Probe, Echo, Report, Release)
_OfARound = Features | Gradient | Update | Probe | Echo | Report | Release
_OF_A_STEP = (Features, Gradient)
_ASKS, _ANSWERS = (Features, Probe), (Gradient, Echo)
_LATE_FROM_SERVER = (Gradient, Echo, Release)


class Session:
    """One end of one conversation. Holds a few integers; does no I/O."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._other = _OTHER[role]
        self._says: type[Message] = Features if role is Role.WORKER else Gradient  # in a step
        self._hears: type[Message] = Gradient if role is Role.WORKER else Features
        self.state = State.NEW
        self._round_num = -1  # of the last assignment or survey
        self._num_exchanges = 0  # of the last assignment; 0 in a survey
        self._step = 0  # exchanges finished = number of the next step
        self._num_parts = 1  # n: of a step of the last assignment, or of the last survey
        self._num_sent = 0  # of them the worker has sent, in the present step
        self._num_answered = 0  # of these the PS has answered
        self._late: dict[int, int] = {}  # server: released round -> how many of its messages may be under way
        self._closed_here = False

    @property
    def round_num(self) -> int | None:
        """The round (or survey) that is being worked on, None between rounds."""
        return self._round_num if self.state in _AT_WORK else None

    @property
    def step(self) -> int:
        """Exchanges that this round has finished; the number of the next or current step."""
        return self._step

    @property
    def num_outstanding(self) -> int:
        """Parts of the present step that the worker has sent and the PS has not answered."""
        return self._num_sent - self._num_answered

    def send(self, message: Message) -> None:
        """Notes that this end sends the message.

        Raises:
            LocalProtocolError: it is not legal now; do not send it. The state is unchanged.
        """
        if type(message) is self._says and self._is_next(message):
            return
        objection = self._take(self.role, message)
        if objection:
            raise LocalProtocolError(objection)
        self._closed_here = self.state is State.CLOSED

    def receive(self, message: Message) -> Arrival:
        """Notes that the other end's message has come.

        Returns:
            STALE if the message crossed one of ours on the way and is to be dropped, else FRESH.

        Raises:
            RemoteProtocolError: the other end may not say this now. The state is unchanged.
        """
        if type(message) is self._hears and self._is_next(message):
            return FRESH
        objection = self._take(self._other, message)
        if not objection:
            return FRESH
        if self._is_stale(message):  # what is stale is never legal: its round, or the session, is over
            return STALE
        raise RemoteProtocolError(objection)

    def _is_next(self, message: Any) -> bool:
        """Takes the very message of a step that is next, found legal in one look; leaves all else to `_take`."""
        if message.round_num != self._round_num or message.step != self._step:
            return False
        if type(message) is Gradient:
            is_due = self.state is _WAITING or self.state is _WORKING
            if not (is_due and message.part == self._num_answered < self._num_sent):
                return False
            self.state = self._advanced(message, _WORKING)
        else:
            is_due = self.state is _WORKING and self._step < self._num_exchanges
            if not (is_due and message.part == self._num_sent):
                return False
            self.state = self._advanced(message, _WAITING)
        return True

    def _take(self, speaker: Role, message: Message) -> str:
        """Moves along the table if the speaker may say this now; else says why it may not."""
        legal = _SPOKEN_BY[speaker][self.state]
        following = legal.get(type(message))
        if following is None:
            words = ", ".join(record.__name__ for record in legal) or "nothing: begin a new session"
            kind = type(message).__name__
            return f"{self._where()}, the {speaker.value} cannot say {kind}; legal: {words}"
        if isinstance(message, _OF_A_ROUND):
            objection = self._objection(message)
            if objection:
                return objection
            following = self._advanced(message, following)
        elif isinstance(message, _BEGIN):
            if message.round_num <= self._round_num:
                kind = type(message).__name__
                return (
                    f"{self._where()}, {kind} repeats round {message.round_num}; use a number above {self._round_num}"
                )
            self._begin(message)
        self.state = following
        return ""

    def _objection(self, message: _OfARound) -> str:
        """Why this may not be said in this round and at this step, by an end whose turn it is; empty if it may."""
        if message.round_num != self._round_num:
            return self._wrong(message, f"carries round {message.round_num}; expected {self._round_num}")
        if isinstance(message, _OF_A_STEP) and message.step != self._step:
            return self._wrong(message, f"carries step {message.step}; expected {self._step}")
        if isinstance(message, _ANSWERS):
            if not self.num_outstanding:
                return self._wrong(message, f"of part {message.part} answers nothing; expected none")
            if message.part != self._num_answered:
                return self._wrong(message, f"carries part {message.part}; expected {self._num_answered}")
        elif isinstance(message, _ASKS):
            if isinstance(message, Features) and self._step >= self._num_exchanges:
                return self._wrong(message, "of one step too many; expected Update")
            if message.part != self._num_sent:
                return self._wrong(message, f"carries part {message.part}; expected {self._num_sent}")
        elif isinstance(message, Update) and self._step < self._num_exchanges:
            return self._wrong(message, f"comes too early; expected Features of step {self._step}")
        return ""

    def _begin(self, message: Assign | Survey) -> None:
        """A round or a survey begins."""
        self._round_num, self._step = message.round_num, 0
        self._num_exchanges = message.num_exchanges if isinstance(message, Assign) else 0
        num_samples = message.batch_size if isinstance(message, Assign) else message.num_probe_samples
        self._num_parts = len(part_sizes(num_samples, message.parts_per_step))
        self._num_sent = self._num_answered = 0

    def _advanced(self, message: _OfARound, following: State) -> State:
        """Counts a legal message of a round; the state after it: that of the table, unless parts are still to come."""
        if isinstance(message, _ANSWERS):
            self._num_answered += 1
            if self._num_answered < self._num_parts:
                return self.state
            self._num_sent = self._num_answered = 0
            self._step += isinstance(message, Gradient)
            return following
        if isinstance(message, Release):
            if self.role is Role.SERVER and self._num_late():
                self._late[message.round_num] = self._num_late()
            return following
        self._late.clear()
        if isinstance(message, _ASKS):
            self._num_sent += 1
            if self._num_sent < self._num_parts:
                return self.state
        return following

    def _num_late(self) -> int:
        """How many messages of the worker a Release may cross now (rule 3)."""
        if self.state is State.SURVEYING or (self.state is State.WORKING and self._step < self._num_exchanges):
            return self._num_parts - self._num_sent
        return int(self.state in (State.WORKING, State.REPORTING))

    def _is_stale(self, message: Message) -> bool:
        """Whether a received message crossed one of ours (rules 3, 4 and 5); forgets what can no longer come."""
        if self.state is State.CLOSED:
            return self._closed_here and not isinstance(message, Register)
        if self.role is Role.WORKER:
            return (
                isinstance(message, _LATE_FROM_SERVER)
                and message.round_num <= self._round_num
                and message.round_num != self.round_num
            )
        if isinstance(message, _FROM_WORKER) and message.round_num in self._late:
            num_left = self._late[message.round_num] - 1
            self._late = {late: number for late, number in self._late.items() if late > message.round_num}
            if num_left:
                self._late[message.round_num] = num_left
            return True
        return False

    def _wrong(self, message: Message, what: str) -> str:
        return f"{self._where()}, {type(message).__name__} {what}"

    def _where(self) -> str:
        if self.round_num is None:
            return f"in state {self.state.value}"
        return f"in state {self.state.value} (round {self._round_num}, step {self._step} of {self._num_exchanges})"
