"""What of a step in parts is transfer: by hand, and against a pipeline written out.

Legend, in seconds, all for one part of P: f forward, u way up, d way down, b backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workers.timing import StepTiming


def transfer_of(
    sent: Sequence[float], answered: Sequence[float], held: Sequence[float], computing: float = 0.0, begin: float = 0.0
) -> float:
    timing = StepTiming(begin)
    for seconds in sent:
        timing.sent(begin + seconds)
    for seconds, held_seconds in zip(answered, held, strict=True):
        timing.answered(begin + seconds, held_seconds)
    timing.computed(computing)
    return timing.transfer_seconds()


def test_unsplit_it_is_the_exchange_less_what_was_held() -> None:
    assert transfer_of([0.0], [7.0], [4.0], begin=100.0) == pytest.approx(3.0)
    assert transfer_of([0.0], [7.0], [99.0]) == pytest.approx(-92.0)  # a pace makes 0 of it


@pytest.mark.parametrize(("waited", "is_held_up"), [([0.3, 0.2], False), ([0.3, 0.21], True), ([], False)])
def test_a_step_is_held_up_when_it_waits_for_more_than_a_tenth_of_its_computing(
    waited: Sequence[float], is_held_up: bool
) -> None:
    timing = StepTiming(0.0)
    for seconds in (2.0, 3.0):
        timing.computed(seconds)
    for seconds in waited:
        timing.waited(seconds)
    assert timing.is_held_up is is_held_up


@pytest.mark.parametrize(
    ("sent", "answered", "held", "computing", "expected"),
    [
        # u = 2, d = 1: there at 2 and 4, back at 3 and 5. Held until 10: back at 11 and 12, held for 8 and 6.
        ([0, 0], [3, 5], [0, 0], 0, 5),
        ([0, 0], [11, 12], [8, 6], 0, 5),
        # u = 1, d = 2: there at 1 and 2, back at 3 and 5. Held until 10: back at 12 and 14.
        ([0, 0], [3, 5], [0, 0], 0, 5),
        ([0, 0], [12, 14], [9, 8], 0, 5),
        # u = d = 1, b = 3: back at 2 and 3, the second is taken in when the first has gone backward, at 5.
        ([0, 0], [2, 5], [0, 0], 3, 2),
        ([0, 0], [11, 14], [9, 8], 3, 2),
        # u = d = 1, f = 5: the second is out at 5 and back at 7; the first was back before, also if it was held for 2.
        ([0, 5], [5, 7], [0, 0], 5, 2),
        ([0, 5], [5, 7], [2, 0], 5, 2),
    ],
)
def test_two_parts_by_hand(
    sent: list[float], answered: list[float], held: list[float], computing: float, expected: float
) -> None:
    assert transfer_of(sent, answered, held, computing, begin=50.0) == pytest.approx(expected)


seconds = st.integers(0, 20).map(float)  # sums of them are exact


@given(st.integers(1, 5), seconds, seconds, seconds, seconds, seconds)
def test_what_the_server_holds_all_parts_for_is_not_counted(
    num_parts: int, f: float, u: float, d: float, b: float, wait: float
) -> None:
    """Held until after the last has arrived, or not at all: the same transfer, and with computing it is the step.

    But for the case that the docstring names (a long forward, more than two parts, d > b).
    """
    assume(num_parts <= 2 or d <= b)

    def play(opens_seconds: float) -> tuple[float, float]:
        """(transfer, the step) of a step whose server answers nothing before; its first part goes out at 0."""
        sent = [f * part for part in range(num_parts)]
        arrived: list[float] = []
        for seconds in sent:
            arrived.append(max(arrived[-1] if arrived else 0.0, seconds) + u)
        left = [max(seconds, opens_seconds) for seconds in arrived]
        back, answered = 0.0, []
        for part, seconds in enumerate(left):
            back = max(back, seconds) + d
            answered.append(max(back, answered[-1] + b if part else sent[-1]))
        held = [one - other for one, other in zip(left, arrived, strict=True)]
        computing = (num_parts - 1) * (f + b)
        return transfer_of(sent, answered, held, computing), answered[-1] - computing

    transfer, unheld = play(0.0)
    assert transfer == unheld >= 0.0
    last_arrival = num_parts * (f + u)  # at the latest
    assert play(last_arrival + wait)[0] == unheld
