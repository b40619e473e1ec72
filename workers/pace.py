"""How fast a worker is, as it reports it: measured, slowed down, emulated, or declared.

Measured is the truth of a real device. A slowdown makes one machine behave like several different ones, with real
seconds; an emulated pace makes it behave like a given device, and on a virtual clock it is the device. Declared
durations are not measured at all: then the plans, and with them the whole run, repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mergesfl.methods.flops import WorkFlops
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.emulation import EmulatedDevice


@dataclass(frozen=True)
class Stretch:
    """What was computed without a pause: samples of each kind of work, and in how many steps."""

    num_forward_samples: int = 0
    num_backward_samples: int = 0
    num_full_samples: int = 0  # forward and backward, of a method without exchanges
    num_steps: int = 1

    def flops(self, work: WorkFlops) -> float:
        """FLOPs of the whole stretch."""
        return (
            self.num_forward_samples * work.forward_flops_per_sample
            + self.num_backward_samples * work.backward_flops_per_sample
            + self.num_full_samples * work.full_flops_per_sample
        )


class Pace(Protocol):
    """Turns measured durations into reported ones; may let real time pass."""

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        """A round begins. `count_flops` counts the work of its method, for a pace that wants to know."""
        ...

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Reported compute time for one step over this many samples."""
        ...

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Reported transfer time for one step over this many samples."""
        ...

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        """Called after each stretch of computing, with its length and its content."""
        ...


@dataclass(frozen=True)
class MeasuredPace:
    """Real durations; with a slowdown of x every stretch of computing takes x times as long."""

    clock: Clock
    slowdown: float = 1.0

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        """Nothing: no two rounds differ."""

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured (the throttle's sleep included)."""
        return measured_seconds

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured; never negative, though it is a difference of two machines' durations."""
        return max(measured_seconds, 0.0)

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        """Sleeps (slowdown - 1) times the stretch."""
        self.clock.sleep(measured_seconds * (self.slowdown - 1.0))


@dataclass(frozen=True)
class DeclaredPace:
    """Durations from the configuration: seconds per sample times samples."""

    compute_seconds_per_sample: float
    transfer_seconds_per_sample: float

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        """Nothing: no two rounds differ."""

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Declared, whatever was measured."""
        return self.compute_seconds_per_sample * num_samples

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """Declared, whatever was measured."""
        return self.transfer_seconds_per_sample * num_samples

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        """Nothing: declared time does not pass."""


class EmulatedPace:
    """The durations of an emulated device: a stretch takes as long as the device would, if this machine is faster.

    On a virtual clock computing itself takes no time, so exactly the emulated time passes.

    Args:
        device: whose speed it is; a round of the pace is a round of the device.
        clock: what is slept on; of a throttled worker its link (workers/throttle.py), which moves meanwhile.
    """

    def __init__(self, device: EmulatedDevice, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self._flops: WorkFlops | None = None

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        """The device's power mode and link of this round; the FLOPs of its method."""
        self._device.begin_round(round_num)
        self._flops = count_flops()

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured (the throttle's sleep included)."""
        return measured_seconds

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        """What was measured; never negative, though it is a difference of two machines' durations."""
        return max(measured_seconds, 0.0)

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        """Sleeps for what the stretch lacks of the device's time; every step costs the device its overhead."""
        assert self._flops is not None, "begin_round() comes before the first stretch"
        step_flops = stretch.flops(self._flops) / stretch.num_steps
        emulated_seconds = sum(self._device.compute_seconds(step_flops) for _ in range(stretch.num_steps))
        self._clock.sleep(max(0.0, emulated_seconds - measured_seconds))
