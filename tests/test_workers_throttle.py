"""A throttled link by hand: 8 Mb/s = 1,000,000 bytes per second, latency 0.003 s. Legend: see ThrottledEndpoint."""

from __future__ import annotations

import numpy as np
import pytest

from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import Assign, Features, Message, Ready, Release
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.emulation import SMALL_MESSAGE_BYTES, EmulatedDevice
from mergesfl.transport import bind, connect
from mergesfl.transport.base import Frames
from tests.memory_cluster import FEATURE_SHAPE, HandClock, registration, welcome
from tests.test_runtime_emulation import STEADY, changed
from workers.link import Link, RoundReleasedError
from workers.throttle import ThrottledEndpoint

HALF_SECOND: list[bytes] = [b"head", bytes(499_996)]  # 500,000 bytes


class Wire:
    """An endpoint that notes when what was sent, and hands out what has arrived by the hand's clock."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.is_connected = True
        self.closed = False
        self.sent: list[tuple[float, Frames]] = []
        self.arrivals: list[tuple[float, list[bytes]]] = []  # (seconds, frames)

    def send(self, frames: Frames) -> bool:
        if self.is_connected:
            self.sent.append((self._clock.seconds, frames))
        return self.is_connected

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        assert timeout_seconds >= 0
        end_seconds = self._clock.seconds + timeout_seconds
        if self.arrivals and self.arrivals[0][0] <= end_seconds:
            seconds, frames = self.arrivals.pop(0)
            self._clock.seconds = max(self._clock.seconds, seconds)
            return [memoryview(frame) for frame in frames]
        self._clock.seconds = end_seconds
        return None

    def close(self) -> None:
        self.closed = True


class Bench:
    """A throttled wire."""

    def __init__(self, **changes: object) -> None:
        self.clock = HandClock()
        self.wire = Wire(self.clock)
        self.device = EmulatedDevice(changed(**changes), 0, "a")
        self.endpoint = ThrottledEndpoint(self.wire, self.clock, self.device)

    def upload(self, frames: Frames) -> float:
        """Sends as a Link does, and returns how long it took."""
        begin_seconds = self.clock.seconds
        while not self.endpoint.send(frames):
            assert self.endpoint.recv(0.2) is None
        return self.clock.seconds - begin_seconds

    def download(self) -> tuple[list[Frame], float]:
        """Receives as a Link does: the message and how long it took."""
        begin_seconds = self.clock.seconds
        while True:
            frames = self.endpoint.recv(0.2)
            if frames is not None:
                return frames, self.clock.seconds - begin_seconds


def test_an_upload_takes_bytes_over_rate_plus_latency_and_then_goes_on_in_one_piece() -> None:
    """500,000 / 1,000,000 + 0.003 = 0.503 s."""
    bench = Bench()
    assert bench.upload(HALF_SECOND) == pytest.approx(0.503)
    assert bench.wire.sent == [(pytest.approx(0.503), HALF_SECOND)]


def test_a_download_takes_bytes_over_rate_plus_latency_from_its_arrival() -> None:
    """It comes at 1 s; 0.503 s later it is through."""
    bench = Bench()
    bench.wire.arrivals = [(1.0, HALF_SECOND)]
    frames, seconds = bench.download()
    assert seconds == pytest.approx(1.503)
    assert frames == HALF_SECOND


def test_two_downloads_come_one_after_the_other() -> None:
    bench = Bench()
    bench.wire.arrivals = [(0.0, HALF_SECOND), (0.0, HALF_SECOND)]
    assert bench.download()[1] == pytest.approx(0.503)
    assert bench.download()[1] == pytest.approx(0.503)


def test_a_download_is_looked_at_again_and_again_but_delivered_once() -> None:
    bench = Bench()
    bench.wire.arrivals = [(0.0, HALF_SECOND)]
    assert [bench.endpoint.recv(0.1) is not None for _ in range(7)] == [False] * 5 + [True] + [False]


def test_a_small_message_costs_the_latency_alone() -> None:
    bench = Bench()
    assert bench.upload([bytes(SMALL_MESSAGE_BYTES)]) == pytest.approx(0.003)
    bench.wire.arrivals = [(bench.clock.seconds, [bytes(SMALL_MESSAGE_BYTES)])]
    assert bench.download()[1] == pytest.approx(0.003)
    assert bench.upload([bytes(SMALL_MESSAGE_BYTES + 1)]) == pytest.approx(4097 / 1e6 + 0.003)


def test_the_rate_is_the_devices_present_one() -> None:
    bench = Bench()
    bench.device.set_link_bytes_per_second(250_000.0)
    assert bench.upload(HALF_SECOND) == pytest.approx(2.003)


def test_every_large_message_draws_a_jitter_of_its_own() -> None:
    bench, twin = Bench(link_jitter=0.3), EmulatedDevice(changed(link_jitter=0.3), 0, "a")
    factors = [twin.transfer_factor() for _ in range(3)]
    seconds = [bench.upload(list(HALF_SECOND)) for _ in range(3)]
    assert seconds == [pytest.approx(0.5 * factor + 0.003) for factor in factors]
    assert len(set(factors)) == 3


def test_without_a_connection_the_upload_is_paid_once_and_nobody_spins() -> None:
    """The upload is over at 0.503 s, the connection comes at 2 s: polls of 0.2 s until then, no second upload."""
    bench = Bench()
    bench.wire.is_connected = False
    polls = 0
    while not bench.endpoint.send(HALF_SECOND):
        before_seconds = bench.clock.seconds
        bench.endpoint.recv(0.2)
        assert bench.clock.seconds > before_seconds
        polls += 1
        bench.wire.is_connected = bench.clock.seconds >= 2.0
    assert polls == 3 + 8  # 0.2, 0.4, 0.503; then 0.703 to 2.103
    assert bench.wire.sent == [(pytest.approx(2.103), HALF_SECOND)]


def test_what_the_server_says_during_an_upload_is_heard_and_the_upload_given_up() -> None:
    """A release comes 0.1 s after the start of an upload of 0.5 s; the next upload starts from its beginning."""
    bench = Bench()
    link = Link(bench.endpoint, bench.clock, lambda: None)

    def hear(message: Message, after_seconds: float = 0.0) -> None:
        bench.wire.arrivals.append((bench.clock.seconds + after_seconds, [bytes(frame) for frame in encode(message)]))

    link.send(registration("a"))
    hear(welcome(0))
    link.receive()
    link.send(Ready(FEATURE_SHAPE, 4))
    hear(Assign(0, 2, 2, 4, "mergesfl", {}, {}))
    link.receive()
    hear(Release(0, "void"), after_seconds=0.1)
    begin_seconds = bench.clock.seconds
    with pytest.raises(RoundReleasedError, match="void"):
        link.send(Features(0, 0, np.zeros((1, 125_000), np.float32), np.zeros(1, np.int64)))
    assert bench.clock.seconds - begin_seconds == pytest.approx(0.103)
    assert [type(decode(frames)).__name__ for _, frames in bench.wire.sent] == ["Register", "Ready"]
    assert bench.upload(HALF_SECOND) == pytest.approx(0.503)


def test_closing_closes_the_connection() -> None:
    bench = Bench()
    bench.endpoint.close()
    assert bench.wire.closed


def test_over_a_real_socket_a_transfer_takes_at_least_bytes_over_rate_in_both_directions() -> None:
    """300,000 bytes at 1,000,000 per second: 0.3 s each way and the latency; what this machine adds is open."""
    clock = WallClock()
    server = bind("tcp://127.0.0.1:*")
    worker = ThrottledEndpoint(connect(server.address), clock, EmulatedDevice(STEADY, 0, "a"))
    try:
        frames = [b"head", bytes(299_996)]
        begin_seconds = clock.now_seconds()
        while not worker.send(frames):
            worker.recv(0.1)
        arrived = server.recv(30.0)
        assert clock.now_seconds() - begin_seconds >= 0.303
        assert arrived is not None
        peer, heard = arrived
        assert [bytes(frame) for frame in heard] == frames
        begin_seconds = clock.now_seconds()
        server.send(peer, frames)
        back = None
        while back is None:
            back = worker.recv(0.1)
        assert clock.now_seconds() - begin_seconds >= 0.303
        assert [bytes(frame) for frame in back] == frames
    finally:
        worker.close()
        server.close()
