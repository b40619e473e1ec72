"""Paces by hand."""

from __future__ import annotations

import pytest

from mergesfl.errors import ConfigError
from mergesfl.runtime.clock import WallClock
from tests.memory_cluster import HandClock
from workers.__main__ import make_pace
from workers.pace import DeclaredPace, MeasuredPace


def test_measured_durations_are_reported_as_they_are_but_never_below_zero() -> None:
    pace = MeasuredPace(HandClock())
    assert pace.compute_seconds(1.5, 8) == 1.5
    assert pace.transfer_seconds(0.25, 8) == 0.25
    assert pace.transfer_seconds(-0.001, 8) == 0.0  # a difference of two machines' durations


@pytest.mark.parametrize(("slowdown", "pause_seconds"), [(1.0, 0.0), (2.0, 3.0), (4.5, 10.5)])
def test_a_slowdown_of_x_makes_a_stretch_of_3_s_take_3x_s(slowdown: float, pause_seconds: float) -> None:
    clock = HandClock()
    MeasuredPace(clock, slowdown).throttle(3.0)
    assert clock.seconds == pytest.approx(pause_seconds)


def test_declared_durations_are_per_sample_whatever_was_measured() -> None:
    pace = DeclaredPace(0.01, 0.002)
    assert pace.compute_seconds(99.0, 8) == pytest.approx(0.08)
    assert pace.transfer_seconds(99.0, 8) == pytest.approx(0.016)
    pace.throttle(3600.0)  # an hour of declared time does not pass


def test_the_command_line_makes_the_pace_that_was_asked_for() -> None:
    clock = WallClock()
    assert make_pace(clock, 2.0, None, None) == MeasuredPace(clock, 2.0)
    assert make_pace(clock, 1.0, 0.1, 0.2) == DeclaredPace(0.1, 0.2)


@pytest.mark.parametrize(
    ("slowdown", "compute", "transfer", "expected"),
    [
        (1.0, 0.1, None, "declare both"),
        (1.0, None, 0.1, "declare both"),
        (0.5, None, None, "--slowdown 0.5: expected 1 or more"),
    ],
)
def test_half_a_pace_is_refused(slowdown: float, compute: float | None, transfer: float | None, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_pace(WallClock(), slowdown, compute, transfer)


def test_the_wall_clock_grows_and_does_not_sleep_backwards() -> None:
    clock = WallClock()
    before = clock.now_seconds()
    clock.sleep(0.01)
    assert clock.now_seconds() - before >= 0.0099
    clock.sleep(0.0)
    clock.sleep(-3600.0)  # time.sleep would raise
