"""Every message in and out of the parameter server passes here: decoded, checked against its session, counted.

Registration, pings and farewells are settled here; only the messages of a round are handed up. Whatever one peer
sends, only its own session suffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from mergesfl.errors import MergeSFLError, RemoteProtocolError, TransportError
from mergesfl.protocol.codec import decode, encode, wire_bytes
from mergesfl.protocol.limits import clipped
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Features,
    Goodbye,
    Leave,
    Message,
    Ping,
    Pong,
    Ready,
    Refuse,
    Register,
    Reset,
    Update,
    Welcome,
)
from mergesfl.protocol.session import Arrival, Role, Session
from mergesfl.runtime.process import EXIT_INTERRUPTED
from mergesfl.transport.base import Frame, ServerEndpoint
from ps.fleet import Fleet, Member

POLL_SECONDS = 0.2  # how soon a wish to stop is noticed
MAX_SETTLED_MESSAGES = 10_000  # between two rounds; 1,000 workers that ping every second for 10 s [ours]

log = logging.getLogger("ps")


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
    """

    def __init__(
        self,
        endpoint: ServerEndpoint,
        fleet: Fleet,
        welcome: Welcome,
        feature_bytes_per_sample: int,
        check: Callable[[], None],
    ) -> None:
        self._endpoint = endpoint
        self._fleet = fleet
        self._welcome = welcome
        self._feature_bytes_per_sample = feature_bytes_per_sample
        self._check = check
        self.ingress_bytes = 0
        self.egress_bytes = 0
        self.num_messages = 0
        self.num_refused_messages = 0

    def receive(self, timeout_seconds: float) -> tuple[Member, Features | Update] | None:
        """Handles at most one message; returns it if it belongs to a round, else None. Raises InterruptedRunError."""
        self._check()
        arrived = self._endpoint.recv(min(timeout_seconds, POLL_SECONDS))
        if arrived is None:
            return None
        return self._handle(*arrived)

    def settle(self) -> None:
        """Handles what has arrived, without waiting; what belongs to a round is dropped: there is none now.

        At most MAX_SETTLED_MESSAGES, so that a peer that never stops talking cannot hold the run.
        """
        for _ in range(MAX_SETTLED_MESSAGES):
            self._check()
            arrived = self._endpoint.recv(0.0)
            if arrived is None:
                return
            self._handle(*arrived)

    def _handle(self, peer: bytes, frames: Sequence[Frame]) -> tuple[Member, Features | Update] | None:
        self.num_messages += 1
        self.ingress_bytes += wire_bytes(frames)
        member = self._fleet.by_peer.get(peer)
        try:
            message = decode(frames)
            if member is None:
                self._handle_stranger(peer, message)
                return None
            member.silent = False
            if member.session.receive(message) is Arrival.STALE:
                return None  # it crossed a Release on the wire
            return self._handle_member(member, message)
        except RemoteProtocolError as error:
            self.num_refused_messages += 1
            if member is None:
                log.info("refused a message of an unknown peer: %s", error)
                self._answer(peer, Refuse(clipped(str(error))))
            else:
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

    def _handle_stranger(self, peer: bytes, message: Message) -> None:
        """A peer without a session may register; anything else tells it to do so."""
        if not isinstance(message, Register):
            if not isinstance(message, Leave):
                self._answer(peer, Reset("this parameter server does not know your session: register again"))
            return
        try:
            self._admit(peer, message)
        except RemoteProtocolError as error:
            log.warning("registration refused: %s", error)
            self._answer(peer, Refuse(clipped(str(error))))

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
        self.send(member, self._welcome)

    def _handle_member(self, member: Member, message: Message) -> tuple[Member, Features | Update] | None:
        if isinstance(message, Features | Update):
            return member, message
        if isinstance(message, Ping):
            self.send(member, Pong())
        elif isinstance(message, Ready):
            if message.feature_bytes_per_sample != self._feature_bytes_per_sample:
                raise RemoteProtocolError(
                    f"worker '{member.worker_id}' finds {message.feature_bytes_per_sample} feature bytes per sample, "
                    f"this server {self._feature_bytes_per_sample}: install the same mergesfl on both"
                )
            member.ready = True
            log.info("worker '%s' joined: %d samples on %s", member.worker_id, member.num_samples, member.device)
        elif isinstance(message, Leave):
            log.info("worker '%s' left: %s", member.worker_id, message.reason)
            self._fleet.remove(member, f"left: {message.reason}")
        return None

    def _answer(self, peer: bytes, message: Message) -> None:
        """One message to a peer without a session; it does not matter if it is gone."""
        frames = encode(message)
        try:
            self._endpoint.send(peer, frames)
        except TransportError as error:
            log.debug("a peer without a session is unreachable: %s", error)
            return
        self.egress_bytes += wire_bytes(frames)
