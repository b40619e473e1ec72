"""An emulated device: what a profile says, drawn for one worker. The same object drives simulation and throttling.

All draws are a pure function of (seed, worker, round), so a resumed, a simulated and a throttled run draw alike:

    power mode, link rate     drawn anew every `redraw_every_rounds` rounds                         (spec, section 7)
    seconds of a stretch      (overhead + FLOPs / (peak * efficiency * mode)) * jitter                         [ours]
    seconds of a transfer     bytes / rate * jitter + latency                                                  [ours]

A device turns to a new round when its work of that round begins: what brings it the work still travels at the old rate.
A jitter is normal around 1, cut at a half and at double [ours]. Compute and link have a stream of jitters each, for the
order in which stretches and transfers alternate is no property of the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergesfl.errors import LocalProtocolError
from mergesfl.runtime.profiles import DeviceProfile
from mergesfl.seeding import generator_for

BYTES_PER_MBIT = 125_000
MIN_JITTER, MAX_JITTER = 0.5, 2.0
NUM_DRAWN_AHEAD = 32  # jitters [ours: no more than a round of some steps needs]
SMALL_MESSAGE_BYTES = 4096  # what is no larger travels in the latency alone: 33 ms at 1 Mb/s, and seldom [ours]


class EmulatedDevice:
    """One device; it stands in round 0 until `begin_round` says otherwise.

    Args:
        profile: the kind of device.
        seed: of all its draws.
        worker_id: whose device it is.
    """

    def __init__(self, profile: DeviceProfile, seed: int, worker_id: str) -> None:
        self.profile = profile
        self._seed = seed
        self._worker_id = worker_id
        self._traced_bytes_per_second: float | None = None
        self.begin_round(0)

    def begin_round(self, round_num: int) -> None:
        """Draws power mode and link rate of the round's epoch, and starts the jitters of the round."""
        epoch = round_num // self.profile.redraw_every_rounds
        generator = generator_for(self._seed, "device", self._worker_id, epoch)
        self._power_mode = int(generator.integers(len(self.profile.power_modes)))
        self._drawn_bytes_per_second = float(generator.uniform(*self.profile.link_mbit_per_second)) * BYTES_PER_MBIT
        jitters = self._seed, "jitter", self._worker_id, round_num
        self._compute_jitters = _jitters(generator_for(*jitters, "compute"), self.profile.compute_jitter)
        self._link_jitters = _jitters(generator_for(*jitters, "link"), self.profile.link_jitter)

    @property
    def power_mode(self) -> int:
        """Index into the profile's power modes."""
        return self._power_mode

    @property
    def flops_per_second(self) -> float:
        """Effective throughput in the present power mode."""
        profile = self.profile
        return profile.peak_flops_per_second * profile.efficiency * profile.power_modes[self._power_mode]

    @property
    def link_bytes_per_second(self) -> float:
        """The present rate of the link: that of the trace, else the drawn one."""
        traced = self._traced_bytes_per_second
        return self._drawn_bytes_per_second if traced is None else traced

    def set_link_bytes_per_second(self, value: float | None) -> None:
        """From now on this rate, whatever is drawn (a bandwidth trace); None: the drawn rate again."""
        if value is not None and not 0.0 < value < float("inf"):
            raise LocalProtocolError(f"link rate of {value} bytes per second: expected a finite rate above 0, or None")
        self._traced_bytes_per_second = value

    @property
    def latency_seconds(self) -> float:
        """One way."""
        return self.profile.link_latency_seconds

    def compute_seconds(self, flops: float) -> float:
        """How long the next stretch of computing takes; draws a jitter."""
        mean_seconds = self.profile.step_overhead_seconds + flops / self.flops_per_second
        return mean_seconds * next(self._compute_jitters)

    def transfer_factor(self) -> float:
        """How many times longer than bytes / rate the next transfer takes, 0.5 to 2; draws a jitter."""
        return next(self._link_jitters)


def _jitters(generator: np.random.Generator, deviation: float) -> Iterator[float]:
    """The same numbers as one draw after the other; a draw of its own costs as much as all others of a message."""
    while True:
        for jitter in generator.normal(1.0, deviation, NUM_DRAWN_AHEAD).tolist():
            yield min(max(jitter, MIN_JITTER), MAX_JITTER)
