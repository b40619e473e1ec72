"""A throttled link by hand: 8 Mb/s = 1,000,000 bytes per second, latency 0.003 s. Legend: see ThrottledEndpoint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergesfl.methods.flops import WorkFlops
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.coding import PLAIN
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import Assign, Features, Goodbye, Gradient, Message, Ready, Release
from mergesfl.protocol.session import Arrival, Role, Session
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.emulation import SMALL_MESSAGE_BYTES, EmulatedDevice
from mergesfl.simulation.events import EventLoop
from mergesfl.simulation.network import Link as SimulatedLink
from mergesfl.simulation.network import SharedPipe
from mergesfl.transport import bind, connect
from mergesfl.transport.base import Frames
from tests.memory_cluster import FEATURE_SHAPE, HandClock, registration, welcome
from tests.test_runtime_emulation import STEADY, changed
from workers.__main__ import make_pace, throttled
from workers.exchange import TimedExchange
from workers.link import Link, RoundReleasedError, RunFinishedError
from workers.pace import EmulatedPace, Stretch
from workers.sender import Sender
from workers.throttle import MAX_QUEUED_MESSAGES, RETRY_SECONDS, EmulatedLink, ThrottledEndpoint

HALF_SECOND: list[bytes] = [b"head", bytes(499_996)]  # 500,000 bytes
OTHER_HALF_SECOND: list[bytes] = [b"tail", bytes(499_996)]
SMALL: list[bytes] = [bytes(SMALL_MESSAGE_BYTES)]


class Wire:
    """An endpoint that notes when what was sent, and hands out what has arrived by the hand's clock."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.online_at_seconds = 0.0
        self.closed_at_seconds = -1.0
        self.num_calls = 0
        self.sent: list[tuple[float, Frames]] = []
        self.arrivals: list[tuple[float, list[bytes]]] = []  # (seconds, frames)
        self.answer: Callable[[Frames], None] = lambda frames: None

    def send(self, frames: Frames) -> bool:
        self.num_calls += 1
        if self._clock.seconds < self.online_at_seconds:
            return False
        self.sent.append((self._clock.seconds, frames))
        self.answer(frames)
        return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        assert timeout_seconds >= 0
        self.num_calls += 1
        end_seconds = self._clock.seconds + timeout_seconds
        if self.arrivals and self.arrivals[0][0] <= end_seconds:
            seconds, frames = self.arrivals.pop(0)
            self._clock.seconds = max(self._clock.seconds, seconds)
            return [memoryview(frame) for frame in frames]
        self._clock.seconds = end_seconds
        return None

    def close(self) -> None:
        self.closed_at_seconds = self._clock.seconds


class Bench:
    """A throttled wire, and the clock that moves it."""

    def __init__(self, **changes: object) -> None:
        self.clock = HandClock()
        self.wire = Wire(self.clock)
        self.device = EmulatedDevice(changed(**changes), 0, "a")
        self.link = EmulatedLink(lambda: self.wire, self.clock, self.device)
        self.endpoint = self.link.connect()

    def register(self) -> None:
        """Sends the first message; the clock and the notes begin anew."""
        assert self.endpoint.send(SMALL)
        self.clock.seconds = 0.0
        self.wire.sent.clear()

    def download(self) -> tuple[list[Frame], float]:
        """Receives as a Link does: the message and when it is there."""
        while True:
            frames = self.endpoint.recv(0.2)
            if frames is not None:
                return frames, self.clock.seconds

    def hear(self, message: Message, at_seconds: float) -> None:
        """The server's message is there (at the real connection) then."""
        self.wire.arrivals.append((at_seconds, [bytes(frame) for frame in encode(message)]))


@pytest.fixture
def bench() -> Bench:
    """A bench whose connection is known to be there."""
    made = Bench()
    made.register()
    return made


def test_an_upload_takes_bytes_over_rate_plus_latency_and_then_goes_on_in_one_piece(bench: Bench) -> None:
    """500,000 / 1,000,000 + 0.003 = 0.503 s; nobody waits for it."""
    assert bench.endpoint.send(HALF_SECOND)
    assert bench.clock.seconds == 0.0 and bench.wire.sent == []
    assert bench.endpoint.recv(2.0) is None
    assert bench.wire.sent == [(pytest.approx(0.503), HALF_SECOND)]
    assert bench.clock.seconds == pytest.approx(2.0)


def test_a_download_takes_bytes_over_rate_plus_latency_from_its_arrival(bench: Bench) -> None:
    """It comes at 1 s; 0.503 s later it is through."""
    bench.wire.arrivals = [(1.0, HALF_SECOND)]
    frames, seconds = bench.download()
    assert seconds == pytest.approx(1.503)
    assert frames == HALF_SECOND


def test_two_downloads_come_one_after_the_other_and_share_the_latency(bench: Bench) -> None:
    """The second is through 0.5 s after the first: while one is in the latency the next is carried."""
    bench.wire.arrivals = [(0.0, HALF_SECOND), (0.0, HALF_SECOND)]
    assert bench.download()[1] == pytest.approx(0.503)
    assert bench.download()[1] == pytest.approx(1.003)


def test_a_download_is_looked_at_again_and_again_but_delivered_once(bench: Bench) -> None:
    bench.wire.arrivals = [(0.0, HALF_SECOND)]
    assert [bench.endpoint.recv(0.1) is not None for _ in range(7)] == [False] * 5 + [True] + [False]


def test_three_parts_go_up_one_after_the_other_while_the_worker_computes(bench: Bench) -> None:
    """Sent at 0, 0.2 and 1.3 s. The second follows the first (through at 0.5 s) at 1 s; then the link stands until the
    third. Each arrives the latency after it is through. The worker itself is never held up."""
    for at_seconds in (0.0, 0.2, 1.3):
        bench.link.sleep(at_seconds - bench.clock.seconds)
        assert bench.endpoint.send(HALF_SECOND)
        assert bench.clock.seconds == pytest.approx(at_seconds)
    bench.link.sleep(1.0)
    assert bench.clock.seconds == pytest.approx(2.3)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.503, 1.003, 1.803])


def test_a_download_that_comes_while_the_worker_computes_is_delivered_with_its_own_arrival_time(bench: Bench) -> None:
    """It begins at 0.1 s and is there at 0.603 s: before the worker has computed until 1 s, so it is heard at once. A
    second one that comes at 0.9 s is heard at 1.403 s."""
    bench.wire.arrivals = [(0.1, HALF_SECOND), (0.9, HALF_SECOND)]
    bench.link.sleep(1.0)
    assert bench.clock.seconds == pytest.approx(1.0)
    assert bench.endpoint.recv(0.0) == HALF_SECOND
    assert bench.clock.seconds == pytest.approx(1.0)
    assert bench.download()[1] == pytest.approx(1.403)


def test_both_directions_go_on_at_the_same_time(bench: Bench) -> None:
    """Up at 0.503 and 1.003 s, down (from 0.1 and 0.2 s) at 0.603 and 1.103 s: neither waits for the other."""
    bench.wire.arrivals = [(0.1, HALF_SECOND), (0.2, HALF_SECOND)]
    assert bench.endpoint.send(HALF_SECOND) and bench.endpoint.send(HALF_SECOND)
    assert bench.download()[1] == pytest.approx(0.603)
    assert bench.download()[1] == pytest.approx(1.103)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.503, 1.003])


def test_a_small_message_costs_the_latency_alone(bench: Bench) -> None:
    assert bench.endpoint.send(SMALL)
    bench.wire.arrivals = [(0.0, SMALL)]
    assert bench.download()[1] == pytest.approx(0.003)
    assert bench.endpoint.recv(0.0) is None
    assert bench.wire.sent == [(pytest.approx(0.003), SMALL)]
    assert bench.endpoint.send([bytes(SMALL_MESSAGE_BYTES + 1)])
    assert bench.endpoint.recv(1.0) is None
    assert bench.wire.sent[1][0] == pytest.approx(0.003 + 4097 / 1e6 + 0.003)


def test_a_small_message_never_overtakes_and_holds_nothing_up(bench: Bench) -> None:
    """Half a second, a small one, half a second: 0.503, 0.503 and 1.003 s, in this order, up and down."""
    for frames in (HALF_SECOND, SMALL, OTHER_HALF_SECOND):
        assert bench.endpoint.send(frames)
        bench.wire.arrivals.append((0.0, frames))
    down = [bench.download() for _ in range(3)]
    assert [seconds for _, seconds in down] == pytest.approx([0.503, 0.503, 1.003])
    assert [frames for frames, _ in down] == [HALF_SECOND, SMALL, OTHER_HALF_SECOND]
    bench.link.sleep(0.0)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.503, 0.503, 1.003])
    assert [frames for _, frames in bench.wire.sent] == [HALF_SECOND, SMALL, OTHER_HALF_SECOND]


def test_a_look_sends_what_is_due_and_takes_no_time(bench: Bench) -> None:
    """Nothing has moved for 1 s, as when the machine itself computes. What was due leaves at the next look; what has
    come begins only now; and the second upload keeps its time, for it follows the first."""
    assert bench.endpoint.send(HALF_SECOND) and bench.endpoint.send(HALF_SECOND)
    bench.wire.arrivals = [(0.2, HALF_SECOND), (0.3, SMALL)]
    bench.clock.seconds = 0.9
    assert bench.endpoint.recv(0.0) is None
    assert bench.clock.seconds == 0.9 and bench.wire.arrivals == []
    assert bench.wire.sent == [(0.9, HALF_SECOND)]
    assert bench.download()[1] == pytest.approx(0.9 + 0.503)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.9, 1.003])


def test_what_is_queued_is_the_sender_s_no_more_if_it_is_small_and_lent_if_it_is_large(bench: Bench) -> None:
    """As every transport has it: frames below 64 KiB may change once they are sent."""
    small, large = bytearray(b"before"), bytearray(100_000)
    assert bench.endpoint.send([small, large])
    small[:] = b"after!"
    bench.link.sleep(1.0)
    _, frames = bench.wire.sent[0]
    assert bytes(frames[0]) == b"before" and frames[1] is large


def test_the_rate_is_the_devices_present_one(bench: Bench) -> None:
    bench.device.set_link_bytes_per_second(250_000.0)
    assert bench.endpoint.send(HALF_SECOND)
    bench.device.set_link_bytes_per_second(None)
    bench.link.sleep(3.0)
    assert bench.wire.sent[0][0] == pytest.approx(2.003)


def test_every_large_message_draws_a_jitter_of_its_own() -> None:
    bench, twin = Bench(link_jitter=0.3), EmulatedDevice(changed(link_jitter=0.3), 0, "a")
    bench.register()
    factors = [twin.transfer_factor() for _ in range(3)]
    for frames in (HALF_SECOND, SMALL, HALF_SECOND, HALF_SECOND):
        assert bench.endpoint.send(frames)
    bench.link.sleep(10.0)
    seconds = [seconds - 0.003 for seconds, frames in bench.wire.sent if frames != SMALL]
    assert np.diff([0.0, *seconds]) == pytest.approx([0.5 * factor for factor in factors])
    assert len(set(factors)) == 3


def test_messages_arrive_when_they_do_in_the_simulation() -> None:
    """The same twelve messages at the same times, with the same jitters; the server's capacity is no limit. Small ones
    are sent while the link stands: behind a large one the simulation carries their bytes, too."""
    rng = np.random.default_rng(0)
    seconds, sizes = np.sort(rng.uniform(0.1, 4.0, 9)), rng.integers(100_000, 900_000, 9)
    messages = [(0.01, 4096), *zip(seconds.tolist(), sizes.tolist(), strict=True), (20.0, 4096), (20.1, 5000)]
    bench, twin = Bench(link_jitter=0.3), EmulatedDevice(changed(link_jitter=0.3), 0, "a")
    bench.register()
    for at_seconds, num_bytes in messages:
        bench.link.sleep(at_seconds - bench.clock.seconds)
        assert bench.endpoint.send([bytes(num_bytes)])
    bench.link.sleep(10.0)
    loop, simulated_seconds = EventLoop(), []
    link, pipe = SimulatedLink(twin), SharedPipe(loop, 1e12)

    def simulate() -> None:
        for at_seconds, num_bytes in messages:
            loop.sleep(at_seconds - loop.now_seconds())
            pipe.send(link, num_bytes, lambda: simulated_seconds.append(loop.now_seconds()))
        loop.sleep(10.0)

    loop.run(simulate)
    assert len(simulated_seconds) == len(messages)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx(simulated_seconds)


def test_no_more_than_the_parts_of_one_step_wait(bench: Bench) -> None:
    """Eight are on their way; there is room for another when the first has arrived, at 0.503 s."""
    for _ in range(MAX_QUEUED_MESSAGES):
        assert bench.endpoint.send(HALF_SECOND)
    assert not bench.endpoint.send(HALF_SECOND) and not bench.endpoint.send(SMALL)
    bench.link.sleep(0.5)
    assert not bench.endpoint.send(HALF_SECOND)
    bench.link.sleep(0.1)
    assert bench.endpoint.send(HALF_SECOND)
    bench.link.sleep(10.0)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.5 * n + 0.003 for n in range(1, 10)])


def test_the_first_message_waits_for_a_connection() -> None:
    """It takes its time, and is not on its way before there is a connection: the sender keeps it. Nobody spins."""
    bench = Bench()
    bench.wire.online_at_seconds = 2.0
    while not bench.endpoint.send(SMALL):
        assert bench.endpoint.recv(0.2) is None
    assert bench.wire.sent == [(bench.clock.seconds, SMALL)]
    assert 2.0 <= bench.clock.seconds <= 2.0 + 0.2 + 0.003
    assert bench.wire.num_calls < 100


def test_a_lost_connection_keeps_what_was_sent_in_order_and_takes_nothing_more() -> None:
    """Two go up while it is away (they are through at 0.503 and 1.003 s) and leave when it is back, at 2 s: at the next
    try, of which there is one every 0.1 s, whether the worker waits or computes. What it sends meanwhile is refused,
    once it shows. The third, sent then, takes its own half second."""
    bench = Bench()
    bench.register()
    bench.wire.online_at_seconds = 2.0
    assert bench.endpoint.send(HALF_SECOND) and bench.endpoint.send(OTHER_HALF_SECOND)
    assert bench.endpoint.recv(0.8) is None
    assert not bench.endpoint.send(SMALL)
    bench.link.sleep(0.7)
    assert not bench.endpoint.send(SMALL)
    calls_before = bench.wire.num_calls
    bench.link.sleep(1.0)
    assert bench.wire.num_calls - calls_before < 40
    assert [frames for _, frames in bench.wire.sent] == [HALF_SECOND, OTHER_HALF_SECOND]
    back_seconds = bench.wire.sent[0][0]
    assert 2.0 <= back_seconds <= 2.0 + RETRY_SECONDS
    assert bench.wire.sent[1][0] == back_seconds
    assert bench.endpoint.send(HALF_SECOND)
    bench.link.sleep(1.0)
    assert bench.wire.sent[2][0] == pytest.approx(2.5 + 0.503)


def test_closing_sends_what_is_queued_at_once_and_then_closes(bench: Bench) -> None:
    frames = [HALF_SECOND, SMALL, OTHER_HALF_SECOND]
    assert all(bench.endpoint.send(each) for each in frames)
    bench.link.sleep(0.1)
    bench.endpoint.close()
    assert bench.wire.sent == [(0.1, each) for each in frames]
    assert bench.wire.closed_at_seconds == bench.clock.seconds == 0.1
    bench.endpoint.close()
    assert len(bench.wire.sent) == 3


def test_closing_without_a_connection_drops_what_is_queued(bench: Bench) -> None:
    assert bench.endpoint.send(HALF_SECOND) and bench.endpoint.send(SMALL)
    bench.wire.online_at_seconds = 1e9
    bench.endpoint.close()
    assert bench.wire.sent == [] and bench.wire.closed_at_seconds == 0.0


def test_the_clock_of_a_link_moves_the_present_connection_and_goes_on_without_one() -> None:
    """Before the first and after the last connection it only sleeps; of two it moves the later."""
    clock = HandClock()
    wires = [Wire(clock), Wire(clock)]
    unused = iter(wires)
    link = EmulatedLink(lambda: next(unused), clock, EmulatedDevice(STEADY, 0, "a"))
    link.sleep(1.0)
    assert link.now_seconds() == clock.seconds == 1.0
    for wire in wires:
        endpoint = link.connect()
        assert endpoint.send(SMALL) and endpoint.send(HALF_SECOND)
        begin_seconds = clock.seconds
        link.sleep(1.0)
        assert wire.sent[1][0] == pytest.approx(begin_seconds + 0.503)
        endpoint.close()
        num_calls = wire.num_calls
        link.sleep(1.0)
        assert clock.seconds == pytest.approx(begin_seconds + 2.0)
        assert wire.num_calls == num_calls


def test_the_pace_of_an_emulated_worker_moves_its_link() -> None:
    """As the command line wires them: a stretch of 0.25 + 50 * 1e6 / 1e8 = 0.75 s, and meanwhile half a second up."""
    clock = HandClock()
    wire, device = Wire(clock), EmulatedDevice(STEADY, 0, "a")
    opener, pace_clock = throttled(lambda: wire, clock, device)
    pace = make_pace(pace_clock, 1.0, None, None, device)
    pace.begin_round(0, lambda: WorkFlops(forward_flops_per_sample=1e6, backward_flops_per_sample=2e6))
    endpoint = opener()
    assert endpoint.send(SMALL) and endpoint.send(HALF_SECOND)
    begin_seconds = clock.seconds
    pace.throttle(0.0, Stretch(num_forward_samples=50))
    assert clock.seconds == pytest.approx(begin_seconds + 0.75)
    assert wire.sent[1] == (pytest.approx(begin_seconds + 0.503), HALF_SECOND)
    assert throttled(opener, clock, None) == (opener, clock)


def working(bench: Bench, num_parts: int = 1) -> Link:
    """A link at work: round 0, two steps of four samples, each in so many parts; the clock and the notes begin anew."""
    link = Link(bench.endpoint, bench.clock, lambda: None)
    link.send(registration("a"))
    bench.hear(welcome(0), 0.0)
    link.receive()
    link.send(Ready(FEATURE_SHAPE, 4))
    bench.hear(Assign(0, 2, 2, 4, "mergesfl", {}, {}, parts_per_step=num_parts), 0.0)
    link.receive()
    bench.link.sleep(1.0)
    bench.clock.seconds = 0.0
    bench.wire.sent.clear()
    return link


def names(bench: Bench) -> list[str]:
    """What has been sent, by kind."""
    return [type(decode(frames)).__name__ for _, frames in bench.wire.sent]


def part_of_half_a_second(round_num: int = 0, part: int = 0) -> Features:
    """500,000 bytes of features, and a header."""
    return Features(round_num, 0, np.zeros((1, 125_000), np.float32), np.zeros(1, np.int64), part=part)


def test_a_release_is_heard_while_parts_go_up_and_they_go_up_before_the_next_round() -> None:
    """A release comes 0.1 s after two parts of half a second were sent. What was sent still goes up, as over a real
    link, and the session of the server drops it: it may be as many messages as the parts that it has not seen. The next
    round's first part follows them."""
    bench = Bench()
    link = working(bench, num_parts=2)
    server = Session(Role.SERVER)
    for role, message in (
        (Role.WORKER, registration("a")),
        (Role.SERVER, welcome(0)),
        (Role.WORKER, Ready(FEATURE_SHAPE, 4)),
        (Role.SERVER, Assign(0, 2, 2, 4, "mergesfl", {}, {}, parts_per_step=2)),
    ):
        _ = server.send(message) if role is Role.SERVER else server.receive(message)
    link.send(part_of_half_a_second(part=0))
    link.send(part_of_half_a_second(part=1))
    following = Assign(1, 1, 1, 1, "mergesfl", {}, {})
    for message in (Release(0, "void"), following):
        server.send(message)
        bench.hear(message, 0.1)
    with pytest.raises(RoundReleasedError, match="void"):
        link.receive()
    assert bench.clock.seconds == pytest.approx(0.103)
    assert isinstance(link.receive(), Assign)
    link.send(part_of_half_a_second(round_num=1))
    assert bench.clock.seconds == pytest.approx(0.103)
    bench.link.sleep(2.0)
    assert [seconds for seconds, _ in bench.wire.sent] == pytest.approx([0.503, 1.003, 1.503], abs=0.001)
    arrivals = [server.receive(decode([memoryview(frame) for frame in frames])) for _, frames in bench.wire.sent]
    assert arrivals == [Arrival.STALE, Arrival.STALE, Arrival.FRESH]


def test_a_goodbye_is_heard_while_an_upload_goes_up() -> None:
    bench = Bench()
    link = working(bench)
    link.send(part_of_half_a_second())
    bench.hear(Goodbye("done"), 0.1)
    with pytest.raises(RunFinishedError, match="done"):
        link.receive()
    assert bench.clock.seconds == pytest.approx(0.103) and bench.wire.sent == []


def test_a_leave_goes_behind_what_is_queued_when_the_link_is_closed() -> None:
    bench = Bench()
    link = working(bench)
    link.send(part_of_half_a_second())
    link.leave("stopped")
    link.close()
    assert names(bench) == ["Features", "Leave"]
    assert bench.clock.seconds == bench.wire.closed_at_seconds == 0.0


def test_a_registration_waits_for_the_server_as_over_a_real_connection() -> None:
    """For longer than the patience with an answer: `send` does not return before it has left."""
    bench = Bench()
    bench.wire.online_at_seconds = 60.0
    link = Link(bench.endpoint, bench.clock, lambda: None)
    link.send(registration("a"))
    assert names(bench) == ["Register"]
    assert bench.clock.seconds == pytest.approx(60.0, abs=0.3)


def timed_round(num_parts: int, held_seconds: float = 0.0) -> tuple[float, TimedExchange]:
    """One step of a round in so many parts of half a second (and a header) each way, of one sample each; how long it
    took, and the exchange. Each part is forwarded in 0.2 s and gone back through in 0.3 s; the server answers a part
    after it held it for so long."""
    bench = Bench(step_overhead_seconds=0.0)
    link = working(bench, num_parts)
    pace = EmulatedPace(bench.device, bench.link)  # 1e8 FLOP/s
    pace.begin_round(0, lambda: WorkFlops(forward_flops_per_sample=2e7, backward_flops_per_sample=3e7))
    sender = Sender(link, PLAIN, "a", has_thread=False)
    exchange = TimedExchange(link, 0, num_parts, bench.clock, pace, torch.device("cpu"), PLAIN, sender)

    def answer(frames: Frames) -> None:
        asked = decode([memoryview(frame) for frame in frames])
        if isinstance(asked, Features):
            gradient = np.zeros((1, 125_000), np.float32)
            reply = Gradient(0, 0, held_seconds, gradient, part=asked.part)
            bench.hear(reply, bench.clock.seconds + held_seconds)

    bench.wire.answer = answer
    features, labels = torch.zeros(1, 125_000), torch.zeros(1, dtype=torch.int64)
    waits = [exchange(0, features, labels) for _ in range(num_parts)]
    for wait in waits:
        wait()
    exchange.finish(1)
    return bench.clock.seconds, exchange


@pytest.mark.parametrize("held_seconds", [0.0, 1.0])
def test_an_unsplit_step_is_reported_as_computing_and_transfer_whatever_the_server_held(held_seconds: float) -> None:
    """0.2 forward, 0.503 up, held, 0.503 down, 0.3 backward; headers and labels are less than a millisecond."""
    step_seconds, exchange = timed_round(1, held_seconds)
    assert step_seconds == pytest.approx(1.506 + held_seconds, abs=0.002)
    assert exchange.compute_seconds == pytest.approx(0.5)
    assert exchange.transfer_seconds == pytest.approx(1.006, abs=0.002)


@pytest.mark.parametrize("held_seconds", [0.0, 1.0])
def test_of_a_step_in_two_parts_what_computing_hides_is_not_transfer(held_seconds: float) -> None:
    """By hand: the first forward ends at 0.2 s, its part is up at 0.703 s, the second, forwarded meanwhile, at 1.203 s.
    They are down at 1.206 and 1.706 s, the first is gone back through meanwhile, the second until 2.006 s. Computed was
    0.2 + 0.2 + 0.3 + 0.3 = 1 s, so 1.006 s are transfer, and both are what the step took less what was held."""
    step_seconds, exchange = timed_round(2, held_seconds)
    assert step_seconds == pytest.approx(2.006 + held_seconds, abs=0.004)
    assert exchange.compute_seconds == pytest.approx(1.0)
    assert exchange.transfer_seconds == pytest.approx(1.006, abs=0.004)


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
        assert worker.send(frames)
        assert server.recv(0.0) is None
        worker.sleep(0.4)
        assert server.recv(30.0) is not None
        assert clock.now_seconds() - begin_seconds >= 0.4
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
