"""The network of a simulated fleet: every worker has a link of its own, and all share the parameter server's.

Fluid model: while n messages are on their way in one direction, each gets its max-min fair share of the server's
capacity, at most what its own link takes, as parallel TCP streams do in the long run. A link carries one message after
the other per direction. What is small travels beside the others, in the latency alone, but never overtakes. [ours]

The two directions are independent (full duplex), of every link and of the server's. On half-duplex links, as Wi-Fi is,
what goes up and what comes down share the air: steps in parts (training.parts_per_step) gain less there than here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mergesfl.runtime.emulation import SMALL_MESSAGE_BYTES
from mergesfl.simulation.events import Event, EventLoop


class Device(Protocol):
    """What the network must know of the device at the end of a link (mergesfl.runtime.emulation.EmulatedDevice)."""

    @property
    def link_bytes_per_second(self) -> float:
        """Now."""
        ...

    @property
    def latency_seconds(self) -> float:
        """One way."""
        ...

    def transfer_factor(self) -> float:
        """How many times longer than the rate says the next transfer takes."""
        ...


@dataclass
class _Message:
    num_bytes: float  # left to carry
    factor: float
    deliver: Callable[[], None]


@dataclass
class Link:
    """One direction of one worker's link."""

    device: Device
    queue: deque[_Message] = field(default_factory=deque)  # the first one is on its way
    limit_bytes_per_second: float = 0.0  # what the link itself takes of the first one
    bytes_per_second: float = 0.0  # its share of the server's capacity, since settled_seconds
    settled_seconds: float = 0.0
    arrival: Event | None = None  # of the first one, if nothing changes
    is_cut: bool = False


class SharedPipe:
    """One direction at the parameter server: all links' messages share its capacity.

    Args:
        loop: the virtual clock.
        capacity_bytes_per_second: what all together get at most.
    """

    def __init__(self, loop: EventLoop, capacity_bytes_per_second: float) -> None:
        self._loop = loop
        self._capacity_bytes_per_second = capacity_bytes_per_second
        self._busy: dict[int, Link] = {}  # in the order in which they became so

    def send(self, link: Link, num_bytes: int, deliver: Callable[[], None]) -> None:
        """Carries one message; `deliver` is called when its last byte has arrived, unless the link is cut before."""
        if num_bytes <= SMALL_MESSAGE_BYTES and not link.queue:
            self._arrive(link, deliver)
            return
        link.queue.append(_Message(float(num_bytes), link.device.transfer_factor(), deliver))
        if len(link.queue) == 1:
            self._busy[id(link)] = link
            self._limit(link)
            self._share()

    def cut(self, link: Link) -> None:
        """Drops all that is on its way on this link."""
        link.is_cut = True
        link.queue.clear()
        if self._busy.pop(id(link), None) is not None:
            self._give(link, 0.0)
            self._share()

    def rates_changed(self) -> None:
        """To be called when a device's link rate has changed while something may be on its way (a trace)."""
        for link in self._busy.values():
            self._limit(link)
        self._share()

    def _arrive(self, link: Link, deliver: Callable[[], None]) -> None:
        def arrive() -> None:
            if not link.is_cut:
                deliver()

        self._loop.call_at(self._loop.now_seconds() + link.device.latency_seconds, arrive)

    def _limit(self, link: Link) -> None:
        """What the link takes of its first message, at the device's present rate."""
        link.limit_bytes_per_second = link.device.link_bytes_per_second / link.queue[0].factor

    def _share(self) -> None:
        """Gives every busy link its fair share. Only those whose share is another one now are planned anew."""
        limits = [link.limit_bytes_per_second for link in self._busy.values()]
        shares = max_min_shares(limits, self._capacity_bytes_per_second)
        for link, share in zip(self._busy.values(), shares, strict=True):
            if share != link.bytes_per_second:
                self._give(link, share)

    def _give(self, link: Link, share_bytes_per_second: float) -> None:
        """Books what the link has carried at its old rate, and plans when it is through at the new one."""
        now_seconds = self._loop.now_seconds()
        if link.arrival is not None:
            link.arrival.cancel()
            link.arrival = None
        if link.queue:
            first = link.queue[0]
            first.num_bytes = max(first.num_bytes - link.bytes_per_second * (now_seconds - link.settled_seconds), 0.0)
            if share_bytes_per_second > 0:
                through_seconds = now_seconds + first.num_bytes / share_bytes_per_second
                link.arrival = self._loop.call_at(through_seconds, lambda: self._finish(link))
        link.bytes_per_second, link.settled_seconds = share_bytes_per_second, now_seconds

    def _finish(self, link: Link) -> None:
        """The first message of this link is through."""
        message = link.queue.popleft()
        link.arrival, link.bytes_per_second = None, 0.0
        if link.queue:
            self._limit(link)
        else:
            del self._busy[id(link)]
        self._arrive(link, message.deliver)
        self._share()


def max_min_shares(limits: list[float], capacity: float) -> list[float]:
    """The max-min fair shares of a capacity: nobody gets more than its limit, and what it leaves the others share."""
    if sum(limits) <= capacity:
        return limits
    shares, left = [0.0] * len(limits), capacity
    order = sorted(range(len(limits)), key=limits.__getitem__)
    for place, index in enumerate(order):
        shares[index] = min(limits[index], left / (len(order) - place))
        left -= shares[index]
    return shares
