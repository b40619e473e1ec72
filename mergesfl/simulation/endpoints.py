"""The endpoints of a simulated fleet: memory endpoints whose frames arrive when the simulated network says so.

As over mergesfl.transport.memory small frames are copied and large ones lent, and a peer that has closed is known to be
gone at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mergesfl.errors import TransportError
from mergesfl.protocol.codec import wire_bytes
from mergesfl.protocol.layout import Frame
from mergesfl.simulation.events import EventLoop, Mailbox
from mergesfl.simulation.network import Device, Link, SharedPipe
from mergesfl.transport.base import Frames, carried

Packet = list[Frame]


@dataclass(frozen=True)
class _Connection:
    """One worker's session: its mailbox and its two directions."""

    mailbox: Mailbox[Packet]
    up: Link
    down: Link


class Network:
    """Where one server and its workers meet.

    Args:
        loop: the virtual clock.
        ingress_bytes_per_second: what the server takes from all workers together.
        egress_bytes_per_second: what it sends to all together.
    """

    def __init__(self, loop: EventLoop, ingress_bytes_per_second: float, egress_bytes_per_second: float) -> None:
        self._loop = loop
        self._ingress = SharedPipe(loop, ingress_bytes_per_second)
        self._egress = SharedPipe(loop, egress_bytes_per_second)
        self._inbox: Mailbox[tuple[bytes, Packet]] = Mailbox(loop)
        self._connections: dict[bytes, _Connection] = {}
        self._peers = itertools.count()

    def server(self) -> NetworkServer:
        """The server's end."""
        return NetworkServer(self)

    def worker(self, device: Device) -> NetworkWorker:
        """A new connection of the worker on this device."""
        peer = b"v%015d" % next(self._peers)
        self._connections[peer] = _Connection(Mailbox(self._loop), Link(device), Link(device))
        return NetworkWorker(self, peer)

    def rates_changed(self) -> None:
        """To be called when a device's link rate has changed."""
        self._ingress.rates_changed()
        self._egress.rates_changed()

    def _disconnect(self, peer: bytes) -> None:
        connection = self._connections.pop(peer, None)
        if connection is not None:
            self._egress.cut(connection.down)  # what it has sent still arrives, as over a real link

    def _cut(self, peer: bytes) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            self._ingress.cut(connection.up)
            self._disconnect(peer)

    def _up(self, peer: bytes, frames: Frames) -> None:
        packet = [carried(frame) for frame in frames]
        link = self._connection(peer).up
        self._ingress.send(link, wire_bytes(packet), lambda: self._inbox.put((peer, packet)))

    def _down(self, peer: bytes, frames: Frames) -> None:
        connection = self._connections.get(peer)
        if connection is None:
            raise TransportError(f"peer {peer.hex()} is unreachable; drop it")
        packet = [carried(frame) for frame in frames]
        self._egress.send(connection.down, wire_bytes(packet), lambda: connection.mailbox.put(packet))

    def _connection(self, peer: bytes) -> _Connection:
        connection = self._connections.get(peer)
        if connection is None:
            raise TransportError("this worker's connection is closed; make a new one")
        return connection


class NetworkServer:
    """ServerEndpoint of a simulated network. Made by Network.server."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @property
    def address(self) -> str:
        """For people."""
        return "simulation://ps"

    def send(self, peer: bytes, frames: Frames) -> None:
        """Puts one message on its way. Raises TransportError when the peer is gone."""
        self._network._down(peer, frames)

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        """The next message and the peer it came from; None when the virtual time is over."""
        return self._network._inbox.get(timeout_seconds)

    def close(self) -> None:
        """Nothing: the simulation ends with its server."""


class NetworkWorker:
    """WorkerEndpoint of a simulated network. Made by Network.worker."""

    def __init__(self, network: Network, peer: bytes) -> None:
        self._network = network
        self._peer = peer

    def send(self, frames: Frames) -> bool:
        """Puts one message on its way. Raises TransportError when this connection is closed."""
        self._network._up(self._peer, frames)
        return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message; None when the virtual time is over. Raises TransportError: this connection is closed."""
        return self._network._connection(self._peer).mailbox.get(timeout_seconds)

    def cut(self) -> None:
        """Closes, and what is on its way to the server is lost, too: the device has lost its power."""
        self._network._cut(self._peer)

    def close(self) -> None:
        """From now on the server's send raises."""
        self._network._disconnect(self._peer)
