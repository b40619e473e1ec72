"""The timed exchange by hand: a link that answers from a script and moves the clock. Legend: d = 4 samples a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import torch

from mergesfl.methods.flops import WorkFlops
from mergesfl.protocol.coding import PLAIN
from mergesfl.protocol.messages import Features, Gradient, Message, Pong
from tests.memory_cluster import HandClock
from workers.exchange import TimedExchange
from workers.link import Link, SessionLostError
from workers.pace import DeclaredPace, MeasuredPace, Pace, Stretch
from workers.prefetch import Prefetched
from workers.sender import Sender

CPU = torch.device("cpu")
Z = torch.arange(8.0).reshape(4, 2)  # (4, 2)
Y = torch.tensor([0, 1, 2, 0])  # (4,)


class FakeLink:
    """Sending takes 0.5 s, the answer comes 2 s later; the server says that it held the request for so long."""

    def __init__(self, clock: HandClock, held_seconds: float, gradient: torch.Tensor, answer: Message | None) -> None:
        self.sent: list[Message] = []
        self._clock = clock
        self._held_seconds = held_seconds
        self._gradient = gradient
        self._answer = answer

    def send(self, message: Message) -> None:
        self.sent.append(message)
        self._clock.seconds += 0.5

    def receive(self) -> Message:
        self._clock.seconds += 2.0
        asked = self.sent[-1]
        assert isinstance(asked, Features)
        return self._answer or Gradient(asked.round_num, asked.step, self._held_seconds, self._gradient.numpy())


def exchange_over(
    link: FakeLink | PipedLink, clock: HandClock, pace: Pace, prepare: Callable[[], None] = lambda: None
) -> TimedExchange:
    """Of round 100, 4 samples a step, sent by the computing thread as they are."""
    pretended = cast(Link, link)
    sender = Sender(pretended, PLAIN, "w", has_thread=False)
    return TimedExchange(pretended, 100, 4, clock, pace, CPU, PLAIN, sender, prepare)


class Bench:
    """An exchange over a fake link, ready to be timed."""

    def __init__(
        self,
        pace: Pace | None = None,
        held_seconds: float = 1.5,
        gradient: torch.Tensor = Z,
        answer: Message | None = None,
        slowdown: float = 1.0,
    ) -> None:
        self.clock = HandClock()
        self.link = FakeLink(self.clock, held_seconds, gradient, answer)
        pace = pace or MeasuredPace(self.clock, slowdown)
        self.exchange = exchange_over(self.link, self.clock, pace)


def test_compute_is_all_but_the_exchanges_and_transfer_is_exchange_less_held() -> None:
    """By hand: 3 s forward, exchange 0.5 + 2 s of which 1.5 s were held: 1 s of transfer. 4 s backward and forward,
    the same exchange, 5 s backward. Compute 3 + 4 + 5 = 12, transfer 2 * 1 = 2."""
    bench = Bench()
    bench.clock.seconds += 3.0
    gradient = bench.exchange(0, Z, Y)()
    bench.clock.seconds += 4.0
    bench.exchange(1, Z, Y)()
    bench.clock.seconds += 5.0
    bench.exchange.finish(2)
    assert bench.exchange.compute_seconds == pytest.approx(12.0)
    assert bench.exchange.transfer_seconds == pytest.approx(2.0)
    assert torch.equal(gradient, Z)


def test_a_slowdown_lengthens_every_stretch_of_computing_but_no_exchange() -> None:
    """3 s forward and 5 s backward, three times slower: 24 s; the clock itself shows them and the 2.5 s between."""
    bench = Bench(slowdown=3.0)
    bench.clock.seconds += 3.0
    bench.exchange(0, Z, Y)()
    bench.clock.seconds += 5.0
    bench.exchange.finish(1)
    assert bench.exchange.compute_seconds == pytest.approx(24.0)
    assert bench.exchange.transfer_seconds == pytest.approx(1.0)
    assert bench.clock.seconds == pytest.approx(26.5)


def test_declared_durations_replace_both() -> None:
    """Compute 0.01 s x 4 samples x 2 steps; transfer 0.002 s x 4 samples for each of two exchanges."""
    bench = Bench(DeclaredPace(0.01, 0.002))
    for step in range(2):
        bench.clock.seconds += 7.0
        bench.exchange(step, Z, Y)()
    bench.exchange.finish(2)
    assert bench.exchange.compute_seconds == pytest.approx(0.08)
    assert bench.exchange.transfer_seconds == pytest.approx(0.016)


class NotingPace:
    """Writes down what it is told of; reports nothing."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        raise AssertionError("a round begins before its exchange is made")

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        return 0.0

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        return 0.0

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        self.stretches.append(stretch)


def test_the_stretches_of_a_split_round_are_forward_then_backward_and_forward_then_backward() -> None:
    pace = NotingPace()
    bench = Bench(pace)
    bench.exchange(0, Z, Y)()
    bench.exchange(1, Z, Y)()
    bench.exchange.finish(2)
    assert pace.stretches == [
        Stretch(num_forward_samples=4),
        Stretch(num_forward_samples=4, num_backward_samples=4),
        Stretch(num_backward_samples=4),
    ]


def test_after_an_empty_gradient_there_is_no_backward() -> None:
    pace = NotingPace()
    bench = Bench(pace, gradient=torch.empty(0))
    bench.exchange(0, Z, Y)()
    bench.exchange.finish(1)
    assert pace.stretches == [Stretch(num_forward_samples=4), Stretch()]


def test_the_stretch_of_a_round_without_exchanges_is_full() -> None:
    pace = NotingPace()
    Bench(pace).exchange.finish(5)
    assert pace.stretches == [Stretch(num_full_samples=20, num_steps=5)]


def test_a_server_that_claims_to_have_held_longer_than_it_took_gives_no_negative_transfer() -> None:
    bench = Bench(held_seconds=99.0)
    bench.exchange(0, Z, Y)()
    assert bench.exchange.transfer_seconds == 0.0


def test_a_federated_round_has_compute_only() -> None:
    bench = Bench()
    bench.clock.seconds += 6.0
    bench.exchange.finish(5)
    assert bench.exchange.compute_seconds == pytest.approx(6.0)
    assert bench.exchange.transfer_seconds == 0.0


def test_what_is_sent_are_round_step_features_and_labels() -> None:
    bench = Bench()
    bench.exchange(3, Z, Y)()
    (message,) = bench.link.sent
    assert isinstance(message, Features)
    assert (message.round_num, message.step) == (100, 3)
    np.testing.assert_array_equal(message.features, Z.numpy())
    np.testing.assert_array_equal(message.labels, np.array([0, 1, 2, 0], np.int64))


def test_an_empty_gradient_is_handed_on() -> None:
    assert Bench(gradient=torch.empty(0)).exchange(0, Z, Y)().shape == (0,)


@pytest.mark.parametrize("gradient", [torch.zeros(3, 2), torch.zeros(4, 3), torch.zeros(8)])
def test_a_gradient_of_another_shape_ends_the_session(gradient: torch.Tensor) -> None:
    with pytest.raises(SessionLostError, match=r"the server sent a gradient float32.*, expected float32\(4, 2\)"):
        Bench(gradient=gradient).exchange(0, Z, Y)()


def test_an_answer_that_is_no_gradient_ends_the_session() -> None:
    with pytest.raises(SessionLostError, match="expected Gradient for step 5, got Pong"):
        Bench(answer=Pong()).exchange(5, Z, Y)()


def test_the_next_batch_is_drawn_when_the_features_are_out_and_before_the_answer_is_waited_for() -> None:
    bench, told = Bench(), []

    def prepare() -> None:
        told.append((len(bench.link.sent), bench.clock.seconds))
        bench.clock.seconds += 0.25

    exchange = exchange_over(bench.link, bench.clock, MeasuredPace(bench.clock, 1.0), prepare)
    exchange(0, Z, Y)()
    exchange(1, Z, Y)()
    assert told == [(1, 0.5), (2, 0.5 + 0.25 + 2.0 + 0.5)]  # sending takes 0.5 s, the answer 2 s


def test_batches_drawn_ahead_are_the_same_and_none_is_drawn_in_vain() -> None:
    drawn: list[int] = []

    def source() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(10):
            drawn.append(number)
            yield torch.tensor([number]), Y

    batches = Prefetched(source(), num_batches=3)
    numbers = []
    for _ in range(3):
        numbers.append(int(next(batches)[0]))
        batches.prepare()
        batches.prepare()  # at most one ahead
    assert numbers == drawn == [0, 1, 2]
    assert int(next(batches)[0]) == 3  # more than was said are to be had, too


class PipedLink:
    """A link whose server answers the parts that are out one by one: each takes 2 s from when the one before was in."""

    def __init__(self, clock: HandClock) -> None:
        self.sent: list[Features] = []
        self._clock = clock
        self._num_answered = 0

    def send(self, message: Message) -> None:
        assert isinstance(message, Features)
        self.sent.append(message)

    def receive(self) -> Message:
        self._clock.seconds += 2.0
        asked = self.sent[self._num_answered]
        self._num_answered += 1
        return Gradient(asked.round_num, asked.step, 0.25, 2 * asked.features, part=asked.part)


def test_a_step_in_two_parts_computes_while_the_first_is_out() -> None:
    """By hand: forward 3 s, part 0 out; forward 1 s, part 1 out; gradient 0 after 2 s, backward 5 s, gradient 1 after
    2 s, backward 6 s. Computed in all 15 s. From part 0 out to gradient 1 in 1 + 2 + 5 + 2 = 10 s, of these 6 s of
    computing, and what was held delayed it by 0.25 s: 3.75 s of transfer. Every stretch is told of as it ends."""
    clock, pace = HandClock(), NotingPace()
    link = PipedLink(clock)
    told: list[int] = []
    measured = MeasuredPace(clock)
    for one in (pace, measured):
        clock.seconds, link.sent, link._num_answered = 0.0, [], 0
        exchange = exchange_over(link, clock, one, lambda: told.append(len(link.sent)))
        clock.seconds += 3.0
        first = exchange(0, Z[:3], Y[:3])
        clock.seconds += 1.0
        second = exchange(0, Z[3:], Y[3:])
        gradients = [first()]
        clock.seconds += 5.0
        gradients.append(second())
        clock.seconds += 6.0
        exchange.finish(1)
        assert torch.equal(torch.cat(gradients), 2 * Z)
    assert (exchange.compute_seconds, exchange.transfer_seconds) == (pytest.approx(15.0), pytest.approx(3.75))
    assert [(one.step, one.part, len(one.labels)) for one in link.sent] == [(0, 0, 3), (0, 1, 1)]
    assert told == [2, 2]  # the next batch is drawn when both parts are out
    assert pace.stretches == [
        Stretch(num_forward_samples=3),
        Stretch(num_forward_samples=1),
        Stretch(num_backward_samples=3),
        Stretch(num_backward_samples=1),
    ]


def test_the_parts_of_the_next_step_are_counted_anew_and_its_first_forward_follows_the_last_backward() -> None:
    clock, pace = HandClock(), NotingPace()
    link = PipedLink(clock)
    exchange = exchange_over(link, clock, pace)
    for step in range(2):
        waits = [exchange(step, Z[:2], Y[:2]), exchange(step, Z[2:], Y[2:])]
        for wait in waits:
            wait()
    exchange.finish(2)
    assert [(one.step, one.part) for one in link.sent] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert pace.stretches == [
        Stretch(num_forward_samples=2),
        Stretch(num_forward_samples=2),
        Stretch(num_backward_samples=2),
        Stretch(num_forward_samples=2, num_backward_samples=2),
        Stretch(num_forward_samples=2),
        Stretch(num_backward_samples=2),
        Stretch(num_backward_samples=2),
    ]


def test_a_part_whose_gradient_has_the_rows_of_another_ends_the_session() -> None:
    bench = Bench(gradient=torch.zeros(3, 2))
    first, _ = bench.exchange(0, Z[:2], Y[:2]), bench.exchange(0, Z[2:], Y[2:])
    with pytest.raises(SessionLostError, match=r"gradient float32\(3, 2\).*, expected float32\(2, 2\)"):
        first()
