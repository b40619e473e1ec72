"""The network of a simulated fleet: every worker has a link of its own, and all share the parameter server's.

Fluid model: while n messages are on their way in one direction, each gets its max-min fair share of the server's
capacity, at most what its own link takes, as parallel TCP streams do in the long run. A link carries one message after
the other per direction. What is small travels beside the others, in the latency alone, but never overtakes. [ours]

The two directions are independent (full duplex), of every link and of the server's. On half-duplex links, as Wi-Fi is,
what goes up and what comes down share the air: steps in parts (training.parts_per_step) gain less there than here.
"""

from __future__ import annotations

import math
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
    bytes_per_second: float = 0.0  # of the first one, now
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
        self._settled_seconds = loop.now_seconds()
        self._next: Event | None = None

    def send(self, link: Link, num_bytes: int, deliver: Callable[[], None]) -> None:
        """Carries one message; `deliver` is called when its last byte has arrived, unless the link is cut before."""
        if num_bytes <= SMALL_MESSAGE_BYTES and not link.queue:
            self._arrive(link, deliver)
            return
        self._settle()
        link.queue.append(_Message(float(num_bytes), link.device.transfer_factor(), deliver))
        self._busy.setdefault(id(link), link)
        self._share()

    def cut(self, link: Link) -> None:
        """Drops all that is on its way on this link."""
        self._settle()
        link.is_cut = True
        link.queue.clear()
        self._busy.pop(id(link), None)
        self._share()

    def rates_changed(self) -> None:
        """To be called when a device's link rate has changed (a new round, a trace)."""
        self._settle()
        self._share()

    def _arrive(self, link: Link, deliver: Callable[[], None]) -> None:
        def arrive() -> None:
            if not link.is_cut:
                deliver()

        self._loop.call_at(self._loop.now_seconds() + link.device.latency_seconds, arrive)

    def _settle(self) -> None:
        """Books what has been carried since the rates were last changed."""
        now_seconds = self._loop.now_seconds()
        elapsed_seconds = now_seconds - self._settled_seconds
        self._settled_seconds = now_seconds
        if elapsed_seconds > 0:
            for link in self._busy.values():
                first = link.queue[0]
                first.num_bytes = max(first.num_bytes - link.bytes_per_second * elapsed_seconds, 0.0)

    def _share(self) -> None:
        """Gives every busy link its fair share and plans the next arrival."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if not self._busy:
            return
        links = list(self._busy.values())
        limits = [link.device.link_bytes_per_second / link.queue[0].factor for link in links]
        shares = max_min_shares(limits, self._capacity_bytes_per_second)
        least_seconds, first = math.inf, links[0]
        for link, share in zip(links, shares, strict=True):
            link.bytes_per_second = share
            seconds = link.queue[0].num_bytes / share if share > 0 else math.inf
            if seconds < least_seconds:
                least_seconds, first = seconds, link
        if math.isfinite(least_seconds):
            self._next = self._loop.call_at(self._loop.now_seconds() + least_seconds, lambda: self._finish(first))

    def _finish(self, link: Link) -> None:
        """The first message of this link is through."""
        self._next = None
        self._settle()
        message = link.queue.popleft()
        if not link.queue:
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
