"""Every message in and out of the parameter server passes here: decoded, checked against its session, counted.

Registration, pings and farewells are settled here; only the messages of a round are handed up. Whatever one peer
sends, only its own session suffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from mergesfl.errors import MergeSFLError, RemoteProtocolError, TransportError
from mergesfl.protocol.codec import decode, encode, wire_bytes
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.limits import DEFAULT, clipped
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Features,
    Goodbye,
    Leave,
    Message,
    Ping,
    Pong,
    Probe,
    Ready,
    Refuse,
    Register,
    Report,
    Reset,
    Update,
    Welcome,
)
from mergesfl.protocol.session import STALE, Role, Session
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.patience import REAL, Patience
from mergesfl.runtime.process import EXIT_INTERRUPTED
from mergesfl.transport.base import ServerEndpoint
from ps.fleet import Fleet, Member

MAX_SETTLED_MESSAGES = 10_000  # between two rounds; 1,000 workers that ping every second for 10 s [ours]
MAX_SETTLE_SECONDS = 1.0  # the same in time: a message may be large [ours]
NUM_READY_PROBES = 20  # of a worker that builds its model; it reads nothing meanwhile, and its queue holds 64 [ours]
# Header bytes that are read of a peer without a session: a registration has a count and a name per class, and little
# else. Parsing costs up to 64 times as much (mergesfl/protocol/limits.py). [ours]
STRANGER_HEADER_BYTES = 1 << 16
STRANGER_HEADER_BYTES_PER_CLASS = 128

log = logging.getLogger("ps")


# What is handed up: the messages of a round and those of a survey.
RoundMessage = Features | Update | Probe | Report
_ROUND_MESSAGES = (Features, Update, Probe, Report)  # a tuple: every message is asked, and a union takes much longer


class InterruptedRunError(MergeSFLError):
    """The run was asked to stop (Ctrl-C, SIGTERM)."""

    exit_code = EXIT_INTERRUPTED


class Switchboard:
    """The server's end of all sessions.

    Args:
        endpoint: the frames' way in and out; this object closes it.
        fleet: who is here; changed by registrations and losses.
        welcome: what every new worker is told.
        feature_bytes_per_sample: what every worker must find at the cut.
        check: called at every poll; raises InterruptedRunError when the run should end.
        clock: measures how long workers take to get ready.
        ready_seconds: a worker that has registered and is not ready after so long has to register again.
        patience: how often to poll, and to probe those that are waited for.
    """

    def __init__(
        self,
        endpoint: ServerEndpoint,
        fleet: Fleet,
        welcome: Welcome,
        feature_bytes_per_sample: int,
        check: Callable[[], None],
        clock: Clock,
        ready_seconds: float,
        patience: Patience = REAL,
    ) -> None:
        self._endpoint = endpoint
        self._fleet = fleet
        self._welcome = welcome
        self._feature_bytes_per_sample = feature_bytes_per_sample
        self._check = check
        self._clock = clock
        self._ready_seconds = ready_seconds
        self.patience = patience
        self._next_chase_seconds = 0.0
        self._num_strange_messages = 0
        self.ingress_bytes = 0
        self.egress_bytes = 0
        self.num_messages = 0
        self.num_refused_messages = 0

    def receive(self, timeout_seconds: float) -> tuple[Member, RoundMessage] | None:
        """Handles at most one message; returns it if it belongs to a round or survey, else None.

        Raises InterruptedRunError.
        """
        self._check()
        self._chase()
        arrived = self._endpoint.recv(min(timeout_seconds, self.patience.poll_seconds))
        if arrived is None:
            return None
        return self._handle(*arrived)

    def settle(self) -> None:
        """Handles what has arrived, without waiting; what belongs to a round is dropped: there is none now.

        At most MAX_SETTLED_MESSAGES and for MAX_SETTLE_SECONDS, so that a peer that never stops talking cannot hold the
        run.
        """
        self._chase()
        end_seconds = self._clock.now_seconds() + MAX_SETTLE_SECONDS
        for _ in range(MAX_SETTLED_MESSAGES):
            self._check()
            if self._clock.now_seconds() >= end_seconds:
                return
            arrived = self._endpoint.recv(0.0)
            if arrived is None:
                return
            self._handle(*arrived)

    def _handle(self, peer: bytes, frames: Sequence[Frame]) -> tuple[Member, RoundMessage] | None:
        self.num_messages += 1
        self.ingress_bytes += wire_bytes(frames)
        member = self._fleet.by_peer.get(peer)
        if member is None:
            self._handle_stranger(peer, frames)
            return None
        try:
            message = decode(frames)
            member.silent = False
            if member.session.receive(message) is STALE:
                return None  # it crossed a Release on the wire
            if isinstance(message, _ROUND_MESSAGES):
                return member, message
            self._handle_member(member, message)
            return None
        except RemoteProtocolError as error:
            self.num_refused_messages += 1
            self.expel(member, error)
            return None

    def send(self, member: Member, message: Message) -> bool:
        """Sends to one worker; False (and the worker is taken out) when it cannot be reached."""
        if member.gone_reason is not None:
            return False
        member.session.send(message)
        return self._deliver(member, message)

    def probe(self, members: Iterable[Member]) -> None:
        """Finds out which of these workers are unreachable, and takes those out."""
        for member in list(members):
            if member.gone_reason is None:
                self.send(member, Pong())

    def expel(self, member: Member, error: RemoteProtocolError) -> None:
        """Closes the session of a worker that broke the protocol and tells it why."""
        log.warning("worker '%s' is closed: %s", member.worker_id, error)
        self.send(member, Refuse(clipped(str(error))))
        self._fleet.remove(member, str(error))

    def say_goodbye(self, reason: str) -> None:
        """Ends all sessions."""
        for member in list(self._fleet.by_peer.values()):
            self.send(member, Goodbye(reason))
            self._fleet.remove(member, reason)

    def close(self) -> None:
        """Closes the endpoint."""
        self._endpoint.close()

    def _deliver(self, member: Member, message: Message) -> bool:
        frames = encode(message)
        try:
            self._endpoint.send(member.peer, frames)
        except TransportError as error:
            log.warning("worker '%s' is unreachable: %s", member.worker_id, error)
            self._fleet.remove(member, f"unreachable: {error}")
            return False
        self.egress_bytes += wire_bytes(frames)
        return True

    def _chase(self) -> None:
        """Looks after workers that have registered and are not ready: some are unreachable, some take too long."""
        now_seconds = self._clock.now_seconds()
        if now_seconds < self._next_chase_seconds:
            return
        self._next_chase_seconds = now_seconds + self._ready_seconds / NUM_READY_PROBES
        for member in self._fleet.not_ready():
            if now_seconds - member.registered_seconds > self._ready_seconds:
                reason = f"not ready {self._ready_seconds:g} s after registering (cluster.start_deadline_seconds)"
                log.warning("worker '%s' has to register again: %s", member.worker_id, reason)
                self.send(member, Reset(reason))
                self._fleet.remove(member, reason)
            else:
                self.probe([member])

    def _handle_stranger(self, peer: bytes, frames: Sequence[Frame]) -> None:
        """A peer without a session may register; anything else tells it to do so."""
        header_bytes = wire_bytes(frames[:1])
        max_header_bytes = min(
            STRANGER_HEADER_BYTES + STRANGER_HEADER_BYTES_PER_CLASS * self._fleet.num_classes, DEFAULT.max_header_bytes
        )
        if header_bytes > max_header_bytes:  # perhaps of a session with the server that was here before
            self.num_refused_messages += 1
            reason = f"header of {header_bytes} bytes but no session, the limit is {max_header_bytes}: register again"
            self._note_stranger(reason)
            self._answer(peer, Reset(reason))
            return
        try:
            message = decode(frames)
        except RemoteProtocolError as error:
            self.num_refused_messages += 1
            self._note_stranger(str(error))
            self._answer(peer, Refuse(clipped(str(error))))
            return
        if not isinstance(message, Register):
            if not isinstance(message, Leave):
                self._answer(peer, Reset("this parameter server does not know your session: register again"))
            return
        num_not_ready = self._fleet.num_not_ready
        if num_not_ready >= self._fleet.max_workers:
            reason = f"{num_not_ready} workers are not ready, the limit is {self._fleet.max_workers}: register later"
            self._note_stranger(reason)
            self._answer(peer, Reset(reason))
            return
        try:
            self._admit(peer, message)
        except RemoteProtocolError as error:
            self._note_stranger(f"registration: {error}")
            self._answer(peer, Refuse(clipped(str(error))))

    def _note_stranger(self, reason: str) -> None:
        """Logs the 1st, 2nd, 4th, 8th, ... message that was refused: whoever may connect cannot fill the disk."""
        self._num_strange_messages += 1
        if self._num_strange_messages.bit_count() == 1:
            log.warning("refused message %d of strangers: %s", self._num_strange_messages, clipped(reason))

    def _admit(self, peer: bytes, message: Register) -> None:
        if message.protocol_version != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' speaks protocol {message.protocol_version}, this server "
                f"{PROTOCOL_VERSION}: install the same mergesfl on both "
                f"(worker: {message.versions.get('mergesfl', '?')})"
            )
        session = Session(Role.SERVER)
        session.receive(message)
        older = self._fleet.by_id.get(message.worker_id)
        member = self._fleet.admit(peer, message, session)
        if older is not None:  # the newer one is the restarted one; two at the same time would be a mistake
            reason = f"another process registered as '{message.worker_id}': give each worker an --id of its own"
            self.send(older, Refuse(reason))
            self._fleet.remove(older, reason)
            self._fleet.by_id[member.worker_id] = member
        member.registered_seconds = self._clock.now_seconds()
        self.send(member, self._welcome)

    def _handle_member(self, member: Member, message: Message) -> None:
        if isinstance(message, Ping):
            self.send(member, Pong())
        elif isinstance(message, Ready):
            if message.feature_bytes_per_sample != self._feature_bytes_per_sample:
                raise RemoteProtocolError(
                    f"worker '{member.worker_id}' finds {message.feature_bytes_per_sample} feature bytes per sample, "
                    f"this server {self._feature_bytes_per_sample}: install the same mergesfl on both"
                )
            self._fleet.get_ready(member)
            log.info("worker '%s' joined: %d samples on %s", member.worker_id, member.num_samples, member.device)
        elif isinstance(message, Leave):
            log.info("worker '%s' left: %s", member.worker_id, message.reason)
            self._fleet.remove(member, f"left: {message.reason}")

    def _answer(self, peer: bytes, message: Message) -> None:
        """One message to a peer without a session; it does not matter if it is gone."""
        frames = encode(message)
        try:
            self._endpoint.send(peer, frames)
        except TransportError as error:
            log.debug("a peer without a session is unreachable: %s", error)
            return
        self.egress_bytes += wire_bytes(frames)
