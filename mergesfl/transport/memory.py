"""The same endpoints over queues in one process, for tests and simulations: no socket, no port, no second process.

What crosses is the same frames as over ZeroMQ; small ones are copied, large ones lent (base.py). Differences from
ZeroMQ: a peer that closes is known to be gone at once, and a server that closes takes its unread messages with it.
Threads may share a hub; each endpoint is used by one of them at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from mergesfl.errors import ConfigError, LocalProtocolError, TransportError
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.transport.base import Frames, carried

Packet = list[Frame]


class _Mailbox:
    """Messages for one worker, and the condition that only this worker waits on: nobody else wakes up for them."""

    def __init__(self, guard: threading.RLock) -> None:
        self.arrived = threading.Condition(guard)
        self.packets: deque[Packet] = deque()


class MemoryHub:
    """The place where one server and its workers meet: hold one per fleet and hand it to both ends."""

    def __init__(self, name: str = "hub", max_queued_messages: int = 64, limits: Limits = DEFAULT) -> None:
        if not name or max_queued_messages < 1:
            raise ConfigError(
                f"hub '{name}' with max_queued_messages = {max_queued_messages}; give a name, and 1 or more"
            )
        self.address = f"memory://{name}"
        self._max_queued_messages = max_queued_messages
        self._limits = limits
        self._guard = threading.RLock()  # of all below
        self._arrived = threading.Condition(self._guard)  # something is in the inbox, or the server is closed
        self._server: MemoryServer | None = None
        self._inbox: deque[tuple[bytes, Packet]] = deque()  # workers -> server
        self._num_unread: dict[bytes, int] = {}  # of each worker's messages in the inbox
        self._mailboxes: dict[bytes, _Mailbox] = {}  # server -> each connected worker

    def server(self) -> MemoryServer:
        """The hub's server.

        Raises:
            TransportError: there is one already.
        """
        with self._guard:
            if self._server is not None:
                raise TransportError(f"'{self.address}' has a server already; close that one first")
            self._server = MemoryServer(self)
            return self._server

    def worker(self) -> MemoryWorker:
        """A new worker, a peer of its own; the server may come later."""
        peer = b"m" + os.urandom(15)
        with self._guard:
            self._mailboxes[peer] = _Mailbox(self._guard)
        return MemoryWorker(self, peer)

    def _packed(self, frames: Frames) -> Packet:
        """The frames as they arrive, at most one more than the limit (the codec refuses that)."""
        if not frames:
            raise LocalProtocolError("a message of 0 frames; send at least one (mergesfl.protocol.codec.encode)")
        return [carried(frame) for frame in frames[: self._limits.max_frames + 1]]


class MemoryServer:
    """ServerEndpoint of a hub. Made by MemoryHub.server."""

    def __init__(self, hub: MemoryHub) -> None:
        self._hub = hub
        self._closed = False

    @property
    def address(self) -> str:
        """The hub's address."""
        return self._hub.address

    def send(self, peer: bytes, frames: Frames) -> None:
        """Queues one message for one peer; never waits.

        Raises:
            TransportError: the peer is gone, or max_queued_messages are waiting for it.
        """
        packet = self._hub._packed(frames)
        with self._hub._guard:
            self._check_open()
            mailbox = self._hub._mailboxes.get(peer)
            if mailbox is None:
                raise TransportError(f"peer {peer.hex()} is unreachable; drop it")
            num_unread = len(mailbox.packets)
            if num_unread >= self._hub._max_queued_messages:
                raise TransportError(f"peer {peer.hex()} does not read: {num_unread} messages wait for it; drop it")
            mailbox.packets.append(packet)
            mailbox.arrived.notify_all()

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        """The next message and the peer it came from; None when the time is over.

        Raises:
            TransportError: this endpoint is closed.
        """
        with self._hub._guard:
            self._check_open()
            self._hub._arrived.wait_for(lambda: self._hub._inbox or self._closed, _bounded(timeout_seconds))
            self._check_open()
            if not self._hub._inbox:
                return None
            peer, packet = self._hub._inbox.popleft()
            self._hub._num_unread[peer] -= 1
            if not self._hub._num_unread[peer]:
                del self._hub._num_unread[peer]
            return peer, packet

    def close(self) -> None:
        """Closes the endpoint and drops what it has not read; the hub may get a new server."""
        with self._hub._guard:
            if not self._closed:
                self._closed = True
                self._hub._server = None
                self._hub._inbox.clear()
                self._hub._num_unread.clear()
                self._hub._arrived.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"the server of '{self.address}' is closed; make a new one")


class MemoryWorker:
    """WorkerEndpoint of a hub. Made by MemoryHub.worker."""

    def __init__(self, hub: MemoryHub, peer: bytes) -> None:
        self._hub = hub
        self._peer = peer

    def send(self, frames: Frames) -> bool:
        """Queues one message; never waits. False: no server, or the queue is full; nothing was sent.

        Raises:
            TransportError: this endpoint is closed.
        """
        packet = self._hub._packed(frames)
        with self._hub._guard:
            self._mailbox()
            num_unread = self._hub._num_unread.get(self._peer, 0)
            if self._hub._server is None or num_unread >= self._hub._max_queued_messages:
                return False
            self._hub._inbox.append((self._peer, packet))
            self._hub._num_unread[self._peer] = num_unread + 1
            self._hub._arrived.notify_all()
            return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message; None when the time is over.

        Raises:
            TransportError: this endpoint is closed.
        """
        with self._hub._guard:
            mailbox = self._mailbox()
            mailbox.arrived.wait_for(
                lambda: mailbox.packets or self._peer not in self._hub._mailboxes, _bounded(timeout_seconds)
            )
            self._mailbox()
            return mailbox.packets.popleft() if mailbox.packets else None

    def close(self) -> None:
        """Closes the endpoint: from now on the server's send raises. What it sent before still arrives."""
        with self._hub._guard:
            mailbox = self._hub._mailboxes.pop(self._peer, None)
            if mailbox is not None:
                mailbox.arrived.notify_all()

    def _mailbox(self) -> _Mailbox:
        mailbox = self._hub._mailboxes.get(self._peer)
        if mailbox is None:
            raise TransportError(f"this worker of '{self._hub.address}' is closed; make a new one")
        return mailbox


def _bounded(timeout_seconds: float) -> float:
    return min(max(timeout_seconds, 0.0), threading.TIMEOUT_MAX)
