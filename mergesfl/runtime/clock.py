"""Time as an argument."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Durations are differences of `now_seconds`; its zero means nothing."""

    def now_seconds(self) -> float:
        """Seconds that only grow."""
        ...

    def sleep(self, seconds: float) -> None:
        """Lets this much time pass."""
        ...


class WallClock:
    """The monotonic clock of this machine."""

    now_seconds = staticmethod(time.perf_counter)  # itself, not a call of it: every message asks several times

    def sleep(self, seconds: float) -> None:
        """Sleeps; not at all for zero and below."""
        if seconds > 0:
            time.sleep(seconds)
