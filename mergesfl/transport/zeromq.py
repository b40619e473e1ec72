"""The endpoints over ZeroMQ: a ROUTER at the parameter server, a DEALER at every worker, over tcp:// or ipc://.

What libzmq does for us, in its own I/O thread: it connects again by itself, keeps the order of messages, delivers a
message whole or not at all, and asks a silent peer with heartbeats whether it still lives. What it does not: bound the
number of frames of one message while it is under way. Only a peer that may connect can abuse that.

A frame of SEND_LENT_BYTES and more is lent, not copied, while it is sent: libzmq reads the sender's memory until the
message has left. Frames that were received belong to the receiver: the first one, the codec's header, is a copy (it is
small, and to view it would cost more), the others are views. An endpoint is used by one thread at a time.

The server's memory for one peer is bounded by SERVER_UNREAD_MESSAGES messages, each of frames up to
Limits.max_message_bytes (a peer that exceeds that is disconnected at once). An honest message is that large in all its
frames together. The first frame of the message that is being read is there twice, libzmq's and our copy. On one machine
large frames take the way of shared.py instead, in memory of the worker's: as much as was on the way at a time, twice
AREA_BYTES at most, until its endpoint is closed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable
from typing import cast

import zmq

from mergesfl.errors import ConfigError, LocalProtocolError, TransportError
from mergesfl.protocol.layout import Frame, frame_bytes
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.transport.addresses import BIND_HELP, check_address, check_ipc_path, is_of_this_machine
from mergesfl.transport.base import Frames
from mergesfl.transport.settings import DEFAULT_LINK, LinkSettings
from mergesfl.transport.shared import Packed, ServerSide, WorkerSide

Context = zmq.Context[zmq.Socket[bytes]]

# At the server, per peer. The protocol is lock-step: one message of a worker is under way, or the parts of one step (8
# at most, mergesfl/parts.py), and a few pings while the server evaluates. The rest waits on the worker's side, where a
# full queue drops pings. [ours]
SERVER_UNREAD_MESSAGES = 8
DRAIN_SECONDS = 0.2  # a server that closes waits so long for messages under way
MAX_DRAINED_MESSAGES = 10_000

# pyzmq learns in a thread of its own that lent memory is free again: below this, a copy costs less (benchmarks/LOG.md,
# 2026-11-26). Not below LEND_BYTES, from where on nobody changes what was sent.
SEND_LENT_BYTES = 1 << 19

# Plain ints: to combine zmq's own flags costs a microsecond each time, and there are some per frame.
_LAST_FRAME, _MORE_FRAMES = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS, _RECEIVE_TIMEOUT = int(zmq.EVENTS), int(zmq.RCVTIMEO)


class _Endpoint:
    """What both ends share: socket options, receiving, closing."""

    def __init__(self, socket_type: int, settings: LinkSettings, context: Context | None, limits: Limits) -> None:
        own: Context | None = zmq.Context() if context is None else None
        self._limits = limits
        self._settings = settings
        self._timeout_seconds: float | None = None  # that the socket has for receiving
        self._asks_who = False  # the next message is the first that may tell where the peer is
        self._socket = (own or context or zmq.Context()).socket(socket_type)
        # What is called for every frame, looked up once; of sending the part without what only draft sockets have.
        self._send = cast(Callable[[Frame, int, bool], object], super(zmq.Socket, self._socket).send)
        self._recv, self._getsockopt = self._socket.recv, self._socket.getsockopt
        for option, value in {
            zmq.LINGER: _milliseconds(settings.linger_seconds),
            zmq.SNDHWM: settings.max_queued_messages,
            zmq.RCVHWM: settings.max_queued_messages,
            zmq.MAXMSGSIZE: limits.max_message_bytes,  # per frame; a peer that exceeds it is disconnected
            zmq.HEARTBEAT_IVL: _milliseconds(settings.heartbeat_interval_seconds),
            zmq.HEARTBEAT_TIMEOUT: _milliseconds(settings.heartbeat_timeout_seconds),
            zmq.HEARTBEAT_TTL: _milliseconds(settings.heartbeat_timeout_seconds),
            zmq.RECONNECT_IVL: _milliseconds(settings.reconnect_seconds),
            zmq.RECONNECT_IVL_MAX: _milliseconds(settings.max_reconnect_seconds),
        }.items():
            self._socket.setsockopt(option, value)
        # The finalizer holds socket and context: an endpoint that nobody closed is closed in this order when it is
        # collected or the process ends. Left to pyzmq, a context that is collected before its socket waits for ever.
        self._shut = weakref.finalize(self, _shut, self._socket, own)

    def close(self) -> None:
        """Closes the socket, and the context if it is our own; returns after the linger time at the latest."""
        self._shut()

    def _send_first(self, frame: Frame, flags: int, copy: bool) -> object:
        """Raises zmq.Again: really no room. Of what was read libzmq hears once in 1 to 3 ms, or when it is asked."""
        try:
            return self._send(frame, flags, copy)
        except zmq.Again:
            self._getsockopt(_EVENTS)
            return self._send(frame, flags, copy)

    def _receive(self, timeout_seconds: float, has_envelope: bool) -> tuple[bytes, list[Frame]] | None:
        """The envelope of the next message, if it has one, and its frames; each view keeps its frame alive.

        Of a message with more frames than the limit the rest is dropped, and one more than the limit handed up: the
        codec refuses it.
        """
        recv, envelope = self._recv, b""
        try:
            if timeout_seconds != self._timeout_seconds:
                self._socket.setsockopt(_RECEIVE_TIMEOUT, _milliseconds(timeout_seconds))
                self._timeout_seconds = timeout_seconds
            if has_envelope:
                envelope = recv()  # a message has one frame at least beside it, and arrives whole
            part = recv(0, copy=False)
            if self._asks_who:
                self._hear_of(part)
            frames: list[Frame] = [part.bytes]
            while part.more:
                part = recv(0, copy=False)
                if len(frames) <= self._limits.max_frames:
                    frames.append(part.buffer)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise TransportError(
                f"cannot receive: {error}; the endpoint is closed or broken, make a new one"
            ) from error
        return envelope, frames

    def _hear_of(self, part: zmq.Frame) -> None:
        """The first frame that has come from the peer."""


class ZmqServer(_Endpoint):
    """ServerEndpoint over a ROUTER.

    Raises:
        ConfigError: the address is no address.
        TransportError: it cannot be bound here and now.
    """

    def __init__(
        self,
        address: str,
        settings: LinkSettings = DEFAULT_LINK,
        context: Context | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        check_address(address, wildcard=True)
        check_ipc_path(address)
        super().__init__(zmq.ROUTER, settings, context, limits)
        self._shared = ServerSide(may_open=settings.shares_memory)
        self._socket.setsockopt(zmq.RCVHWM, min(settings.max_queued_messages, SERVER_UNREAD_MESSAGES))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an absent peer is an error, not silence
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that connects again keeps its name
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            blame, help_text = BIND_HELP.get(error.errno or 0, (TransportError, "see the system's message"))
            raise blame(f"cannot bind '{address}' ({error}): {help_text}") from error
        self._address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def address(self) -> str:
        """The bound address with its real port. tcp://0.0.0.0:PORT: every address of this machine, with that port."""
        return self._address

    def send(self, peer: bytes, frames: Frames) -> None:
        """Queues one message for one peer; never waits.

        Raises:
            TransportError: the peer is gone, or max_queued_messages are waiting for it.
        """
        _check_frames(frames)
        packed = self._shared.pack(peer, frames)
        send, num_left = self._send, len(packed.frames)
        try:
            # The only call that a full or absent peer can make fail: see zmq_socket(3), ZMQ_ROUTER.
            self._send_first(peer, _MORE_FRAMES, True)
            for frame in packed.frames:
                num_left -= 1
                send(frame, _MORE_FRAMES if num_left else _LAST_FRAME, frame_bytes(frame) < SEND_LENT_BYTES)
        except zmq.Again as error:
            self._shared.take_back(peer, packed)
            limit = self._settings.max_queued_messages
            raise TransportError(f"peer {peer.hex()} does not read: {limit} messages wait for it; drop it") from error
        except zmq.ZMQError as error:
            self._shared.take_back(peer, packed)
            raise TransportError(f"peer {peer.hex()} is unreachable ({error}); drop it") from error

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        """The next message and the peer it came from; None when the time is over, or a message was lost (shared.py).

        Raises:
            TransportError: this endpoint is closed.
        """
        self._shared.sweep(time.monotonic())
        arrived = self._receive(timeout_seconds, has_envelope=True)
        if arrived is None:
            return None
        peer, frames = arrived
        whole = self._shared.unpack(peer, frames)
        return None if whole is None else (peer, whole)

    def close(self) -> None:
        """Closes the socket; reads what has arrived first.

        A TCP connection that is closed with unread data is reset, and what was sent on it just before (a goodbye) lost.
        """
        with contextlib.suppress(TransportError):
            for _ in range(MAX_DRAINED_MESSAGES):
                if self._receive(DRAIN_SECONDS, has_envelope=True) is None:
                    break
        super().close()
        self._shared = ServerSide(may_open=False)


class ZmqWorker(_Endpoint):
    """WorkerEndpoint over a DEALER with a routing id of its own: a new endpoint is a new peer to the server.

    Raises:
        ConfigError: the address is no address. A server that is not there yet is no error.
    """

    def __init__(
        self,
        address: str,
        settings: LinkSettings = DEFAULT_LINK,
        context: Context | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        check_address(address, wildcard=False)
        super().__init__(zmq.DEALER, settings, context, limits)
        self._shared: WorkerSide | None = None
        self._asks_who = settings.shares_memory
        self._is_ipc = address.startswith("ipc://")
        self._socket.setsockopt(zmq.ROUTING_ID, b"w" + os.urandom(15))  # must not begin with a zero byte
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue only where there is a connection
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            _, help_text = BIND_HELP.get(error.errno or 0, (ConfigError, "see the system's message"))
            raise ConfigError(f"cannot connect to '{address}' ({error}): {help_text}") from error

    def send(self, frames: Frames) -> bool:
        """Queues one message; never waits. False: no connection, or its queue is full; nothing was sent.

        Raises:
            TransportError: this endpoint is closed.
        """
        _check_frames(frames)
        packed, sent, is_first = Packed(frames), True, True
        try:
            if self._shared is not None:
                packed = self._shared.pack(frames)
            num_left = len(packed.frames)
            for frame in packed.frames:
                num_left -= 1
                send = self._send_first if is_first else self._send
                try:
                    send(frame, _MORE_FRAMES if num_left else _LAST_FRAME, frame_bytes(frame) < SEND_LENT_BYTES)
                except zmq.Again:
                    sent = False
                    if is_first:
                        break
                    # The link broke in the middle of the message. libzmq forgets what it has of it and swallows what
                    # still comes up to its last frame (lb.cpp, _dropping). So go on; else it would swallow the next
                    # message too.
                is_first = False
        except zmq.ZMQError as error:
            raise TransportError(f"cannot send: {error}; the endpoint is closed or broken, make a new one") from error
        if self._shared is not None and not sent:
            self._shared.take_back(packed)
        return sent

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message; None when the time is over.

        Raises:
            TransportError: this endpoint is closed.
        """
        arrived = self._receive(timeout_seconds, has_envelope=False)
        if arrived is None:
            return None
        return arrived[1] if self._shared is None else self._shared.unpack(arrived[1])

    def _hear_of(self, part: zmq.Frame) -> None:
        """Of a server on this machine: memory is made for both."""
        self._asks_who = False
        with contextlib.suppress(OSError, zmq.ZMQError):  # none to be had, or no address: the socket carries all
            if self._is_ipc or is_of_this_machine(str(part.get("Peer-Address"))):
                self._shared = WorkerSide()

    def close(self) -> None:
        """Closes the socket and takes the offer of memory back."""
        super().close()
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _shut(socket: zmq.Socket[bytes], own_context: Context | None) -> None:
    socket.close()
    if own_context is not None:
        own_context.term()


def _milliseconds(seconds: float) -> int:
    """Rounded up, so that a short wait is not a busy one; never negative (that would be for ever)."""
    return math.ceil(min(max(seconds, 0.0) * 1000.0, 2**31 - 1))


def _check_frames(frames: Frames) -> None:
    if not frames:
        raise LocalProtocolError("a message of 0 frames; send at least one (mergesfl.protocol.codec.encode)")
