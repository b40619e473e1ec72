"""A real link made as slow as that of an emulated device, without root: frames wait before they go on.

As in the simulation (mergesfl/simulation/network.py) each direction carries one message after the other, and the two do
not disturb each other. A message of n bytes begins when the one before is through, is through after n / rate * jitter,
and arrives the latency later, while the next is carried already. What is small takes the latency alone, but never
overtakes. So the parts of a step (training.parts_per_step) go up and come down while others are computed.

No thread does this, for a socket belongs to one: the link moves whenever its worker waits for a message, sends one, or
sleeps for what an emulated device computes longer than this machine (EmulatedLink is the clock to sleep on).

What is uncertain: while this machine really computes nothing moves. What should have gone up meanwhile leaves late,
though what comes after it does not: its time was fixed when it was sent. What comes down begins to arrive when it is
picked up here, not when the server sent it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from mergesfl.parts import MAX_PARTS_PER_STEP
from mergesfl.protocol.codec import wire_bytes
from mergesfl.protocol.layout import Frame
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.emulation import SMALL_MESSAGE_BYTES, EmulatedDevice
from mergesfl.transport.base import Frames, WorkerEndpoint, carried

MAX_QUEUED_MESSAGES = MAX_PARTS_PER_STEP  # on their way up; only pings could want to be more [ours]
RETRY_SECONDS = 0.1  # between two tries to send what should have left, without a connection [ours]
FINE_SECONDS = 0.002  # sockets wait for whole milliseconds, rounded up: the last one or two are left to the clock


class _Direction:
    """One direction of a link: the messages on their way, in order, and when each of them arrives."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device
        self._queue: deque[tuple[float, list[Frame]]] = deque()  # (when it arrives, message)
        self._through_seconds = -math.inf  # when the last one is through, and the next can begin

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def arrival_seconds(self) -> float:
        """When the next one arrives; infinite if nothing is on its way."""
        return self._queue[0][0] if self._queue else math.inf

    def book(self, frames: Frames, now_seconds: float) -> float:
        """When a message that is sent now arrives; the link is taken until it is through."""
        begin_seconds = max(now_seconds, self._through_seconds)
        num_bytes = wire_bytes(frames)
        if num_bytes <= SMALL_MESSAGE_BYTES:
            return begin_seconds + self._device.latency_seconds
        factor = self._device.transfer_factor()
        self._through_seconds = begin_seconds + num_bytes / self._device.link_bytes_per_second * factor
        return self._through_seconds + self._device.latency_seconds

    def put(self, frames: list[Frame], now_seconds: float) -> None:
        """Puts a message on its way."""
        self._queue.append((self.book(frames, now_seconds), frames))

    def first(self) -> list[Frame]:
        """The message that arrives next."""
        return self._queue[0][1]

    def pop(self) -> list[Frame]:
        """Takes it out."""
        return self._queue.popleft()[1]


class ThrottledEndpoint:
    """WorkerEndpoint over another one, at the rate and latency of a device.

    What was sent is not called back: a real link would carry it, too. If the server releases the round meanwhile, its
    messages still go up, before those of the next round, and are stale there. They are no more than the session allows
    (rule 3 of mergesfl/protocol/session.py): the worker has sent them all before it saw the release.

    Args:
        endpoint: the real connection; this object closes it.
        clock: what is waited on.
        device: whose link it is; its rate and jitter when a message is sent (or picked up) hold for the whole message.
    """

    def __init__(self, endpoint: WorkerEndpoint, clock: Clock, device: EmulatedDevice) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._up = _Direction(device)
        self._down = _Direction(device)
        self._is_connected = False  # as far as the last try to send has shown
        self._retry_seconds = -math.inf
        self._is_closed = False

    def send(self, frames: Frames) -> bool:
        """Puts one message on its way up, large frames lent; False (try again): too many are, or no connection now.

        The first message waits here until it has left, for nobody knows yet whether there is a connection. Later it
        shows when something that should leave cannot.
        """
        self.sleep(0.0)
        if not self._is_connected and not self._up:
            self.sleep(self._up.book(frames, self._clock.now_seconds()) - self._clock.now_seconds())
            self._is_connected = self._endpoint.send(frames)
            return self._is_connected
        if not self._is_connected or len(self._up) >= MAX_QUEUED_MESSAGES:
            return False
        self._up.put([carried(frame) for frame in frames], self._clock.now_seconds())
        return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message that has arrived; None when the time is over (0: only look). Meanwhile the link moves."""
        end_seconds = self._clock.now_seconds() + timeout_seconds
        return self._down.pop() if self._drive(end_seconds, until_arrival=True) else None

    def sleep(self, seconds: float) -> None:
        """Lets this much time pass, and the link moves; what arrives is kept for `recv`."""
        if self._is_closed:
            self._clock.sleep(seconds)
        else:
            self._drive(self._clock.now_seconds() + seconds, until_arrival=False)

    def close(self) -> None:
        """Closes the connection; what is on its way up leaves at once, in order, unless there is no connection."""
        while not self._is_closed and self._up and self._endpoint.send(self._up.first()):
            self._up.pop()
        self._is_closed = True
        self._endpoint.close()

    def _drive(self, end_seconds: float, until_arrival: bool) -> bool:
        """Moves both directions until then, or until a message has arrived: whether one has, if it is wanted."""
        while True:
            now_seconds = self._clock.now_seconds()
            self._send_due(now_seconds)
            if until_arrival and self._down.arrival_seconds <= now_seconds:
                return True
            next_seconds = min(end_seconds, max(self._up.arrival_seconds, self._retry_seconds))
            if until_arrival:
                next_seconds = min(next_seconds, self._down.arrival_seconds)
            left_seconds = max(0.0, next_seconds - now_seconds)
            if left_seconds <= FINE_SECONDS:
                self._clock.sleep(left_seconds)
                left_seconds = 0.0
            frames = self._endpoint.recv(max(0.0, left_seconds - FINE_SECONDS / 2))
            if frames is not None:
                self._down.put(frames, self._clock.now_seconds())
            elif now_seconds >= end_seconds:
                return False

    def _send_due(self, now_seconds: float) -> None:
        """Sends what has its way behind it; what cannot be sent is tried again, before all that follows."""
        while max(self._up.arrival_seconds, self._retry_seconds) <= now_seconds:
            self._is_connected = self._endpoint.send(self._up.first())
            if not self._is_connected:
                self._retry_seconds = now_seconds + RETRY_SECONDS
                return
            self._up.pop()


class EmulatedLink:
    """The link of an emulated device through all its sessions: opens connections, and is a Clock to sleep on.

    While it sleeps the present connection moves, for a device sends and receives while it computes.

    Args:
        connect: opens a real connection.
        clock: what is waited on.
        device: whose link it is.
    """

    def __init__(self, connect: Callable[[], WorkerEndpoint], clock: Clock, device: EmulatedDevice) -> None:
        self._connect = connect
        self._clock = clock
        self._device = device
        self._endpoint: ThrottledEndpoint | None = None  # the present one, or the last

    def connect(self) -> ThrottledEndpoint:
        """Opens a connection at the rate of the device, from now on the present one."""
        self._endpoint = ThrottledEndpoint(self._connect(), self._clock, self._device)
        return self._endpoint

    def now_seconds(self) -> float:
        """Seconds of the clock."""
        return self._clock.now_seconds()

    def sleep(self, seconds: float) -> None:
        """Lets this much time pass, and the present connection moves."""
        if self._endpoint is None:
            self._clock.sleep(seconds)
        else:
            self._endpoint.sleep(seconds)
