"""How fast a worker is, as it reports it: measured, slowed down, or declared.

Measured is the truth of a real device. A slowdown makes one machine behave like several different ones, with real
seconds. Declared durations are not measured at all: then the plans, and with them the whole run, repeat to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mergesfl.runtime.clock import Clock


class Pace(Protocol):
    """Turns measured durations into reported ones; may let real time pass."""

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Reported compute time for one step over this many samples."""
        ...

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Reported transfer time for one step over this many samples."""
        ...

    def throttle(self, measured_seconds: float) -> None:
        """Called after each stretch of computing, with its length."""
        ...


@dataclass(frozen=True)
class MeasuredPace:
    """Real durations; with a slowdown of x every stretch of computing takes x times as long."""

    clock: Clock
    slowdown: float = 1.0

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured (the throttle's sleep included)."""
        return measured_seconds

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured; never negative, though it is a difference of two machines' durations."""
        return max(measured_seconds, 0.0)

    def throttle(self, measured_seconds: float) -> None:
        """Sleeps (slowdown - 1) times the stretch."""
        self.clock.sleep(measured_seconds * (self.slowdown - 1.0))


@dataclass(frozen=True)
class DeclaredPace:
    """Durations from the configuration: seconds per sample times samples."""

    compute_seconds_per_sample: float
    transfer_seconds_per_sample: float

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Declared, whatever was measured."""
        return self.compute_seconds_per_sample * num_samples

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Declared, whatever was measured."""
        return self.transfer_seconds_per_sample * num_samples

    def throttle(self, measured_seconds: float) -> None:
        """Nothing: declared time does not pass."""
