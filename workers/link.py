"""A worker's session with the parameter server: sends, waits, and raises for every way in which a session can end."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

from mergesfl.errors import LocalProtocolError, MergeSFLError, RemoteProtocolError
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.limits import clipped
from mergesfl.protocol.messages import Goodbye, Gradient, Leave, Message, Ping, Pong, Refuse, Release, Reset
from mergesfl.protocol.session import FRESH, Role, Session, State
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.patience import REAL, Patience
from mergesfl.transport.base import WorkerEndpoint

# Without a sign of the server for so long a registration is taken for lost (something else listens at the address, the
# server ended with it unread). A server that evaluates is silent, too: to register again does no harm then. [ours]
HANDSHAKE_SECONDS = 10.0


class SessionLostError(MergeSFLError):
    """The server does not know this session (any more): register again."""


class RunFinishedError(MergeSFLError):
    """The server said goodbye."""


class RefusedError(MergeSFLError):
    """The server will not have this worker; trying again would not help."""


class RoundReleasedError(MergeSFLError):
    """The server has given up this round, or this worker in it."""


class StoppedError(MergeSFLError):
    """This worker was asked to stop."""


class Link:
    """One session over one endpoint.

    Args:
        endpoint: the connection; this object closes it.
        clock: measures the time between two pings, and how long the server is silent during the handshake.
        check: called at every poll; raises StoppedError when the worker should end.
        patience: how often to poll and to ping.
    """

    def __init__(
        self, endpoint: WorkerEndpoint, clock: Clock, check: Callable[[], None], patience: Patience = REAL
    ) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._check = check
        self._patience = patience
        self._session = Session(Role.WORKER)
        self._is_abandoned = False
        self._unread: deque[Message] = deque()  # answers to parts of a step that came while the next part went out
        self._last_ping_seconds = clock.now_seconds()
        self._last_sign_seconds = clock.now_seconds()  # of the server, or of our own message to it

    def close(self) -> None:
        """Closes the endpoint."""
        self._endpoint.close()

    def send(self, message: Message) -> None:
        """Sends, and waits for a connection as long as there is none. Raises LocalProtocolError, and like `receive`.

        It listens meanwhile: what the server said before it went away (Release, Goodbye) must not be missed. What it
        answers to what was sent before is kept.
        """
        self._session.send(message)
        frames = encode(message)
        while not self._endpoint.send(frames):
            early = self._next()
            if early is not None and not self._session.num_outstanding:  # or it answers what is not out yet
                raise SessionLostError(f"got {type(early).__name__} where nothing was asked")
            if early is not None:
                self._unread.append(early)
        self._last_sign_seconds = self._clock.now_seconds()

    def abandon(self) -> None:
        """From another thread: who waits on this link, or will, is told soon that its session is lost."""
        self._is_abandoned = True

    def leave(self, reason: str) -> None:
        """Says that this worker goes, if there is a session and a connection to say it on."""
        message = Leave(clipped(reason))
        with contextlib.suppress(LocalProtocolError):
            self._session.send(message)
            self._endpoint.send(encode(message))

    def receive(self) -> Message:
        """Waits for the next message that means something to the caller; pings the server while it waits.

        Raises SessionLostError, RunFinishedError, RefusedError, RoundReleasedError, StoppedError.
        """
        if self._unread:
            return self._unread.popleft()
        while True:
            message = self._next()
            if message is not None:
                return message
            self._check_handshake()
            self._ping()

    def _next(self) -> Message | None:
        """The next message that means something; None after a poll without one. Raises like `receive`."""
        self._check()
        if self._is_abandoned:
            raise SessionLostError("given up on this device")
        frames = self._endpoint.recv(self._patience.poll_seconds)
        if frames is None:
            return None
        self._last_sign_seconds = self._clock.now_seconds()
        try:
            message = decode(frames)
            arrival = self._session.receive(message)
        except RemoteProtocolError as error:
            raise SessionLostError(f"the server broke the protocol: {error}") from error
        if arrival is FRESH and isinstance(message, Gradient):  # nearly every time: without what follows
            return message
        if arrival is not FRESH or isinstance(message, Pong):
            return None
        if isinstance(message, Reset):
            raise SessionLostError(message.reason)
        if isinstance(message, Goodbye):
            raise RunFinishedError(message.reason)
        if isinstance(message, Refuse):
            raise RefusedError(message.reason)
        if isinstance(message, Release):
            self._unread.clear()
            raise RoundReleasedError(message.reason)
        return message

    def _check_handshake(self) -> None:
        """A registration has to be answered soon. Later the server may be silent for long, as when it evaluates."""
        silent_seconds = self._clock.now_seconds() - self._last_sign_seconds
        if self._session.state is State.REGISTERING and silent_seconds >= HANDSHAKE_SECONDS:
            raise SessionLostError(f"no answer within {HANDSHAKE_SECONDS:g} s of registering")

    def _ping(self) -> None:
        """Asks the server whether it still knows us, at most once per ping_seconds."""
        now_seconds = self._clock.now_seconds()
        if now_seconds - self._last_ping_seconds >= self._patience.ping_seconds:
            self._last_ping_seconds = now_seconds
            message = Ping()
            self._session.send(message)
            self._endpoint.send(encode(message))
