"""Seconds of a run while it goes on: on the wall, and of the processors, of all its processes together (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergesfl.runtime.process import StopFlag

UNCOUNTED_ROUNDS = 2  # of a run: the first, which warms up, and the last, which is evaluated
_CPUCLOCK_SCHED = 2  # Linux, include/linux/posix-timers_types.h: nanoseconds that all threads of a process have run


@dataclass(frozen=True)
class Mark:
    """A moment: seconds on the wall, and CPU seconds of the processes so far."""

    wall_seconds: float
    cpu_seconds: float

    def since(self, earlier: Mark) -> Mark:
        """What has passed since then."""
        return Mark(self.wall_seconds - earlier.wall_seconds, self.cpu_seconds - earlier.cpu_seconds)


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a living process, those that have ended included. Raises OSError: it is gone."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def mark(pids: Sequence[int] = ()) -> Mark:
    """Now, for this process and these others."""
    return Mark(time.perf_counter(), time.process_time() + sum(cpu_seconds(pid) for pid in pids))


def counted(marks: Sequence[Mark], num_rounds: int) -> Mark:
    """What the counted rounds took, of marks at the ends of rounds: from the first end to the last but one."""
    return marks[num_rounds - UNCOUNTED_ROUNDS].since(marks[0])


class RoundMarks(StopFlag):
    """Never stops a run; marks when the server first looks for messages after each round is in the journal.

    Args:
        journal: the journal of the run, which grows by one line per round. What a repeated run finds there is of old.
        pids: the processes beside this one, asked once, at the first mark.
    """

    def __init__(self, journal: Path, pids: Callable[[], Sequence[int]]) -> None:
        super().__init__()
        self._journal = journal
        self._find_pids = pids
        self._pids: Sequence[int] = ()
        self._size_bytes = 0
        self.marks: list[Mark] = []

    def is_set(self) -> bool:
        """Asked by the server at every look for messages."""
        try:
            size_bytes = os.stat(self._journal).st_size  # noqa: PTH116 (half the time of a Path, at every message)
        except FileNotFoundError:
            return False
        if size_bytes > self._size_bytes:
            if not self.marks:
                self._pids = self._find_pids()
            self._size_bytes = size_bytes
            self.marks.append(mark(self._pids))
        return False


def pin_to_one_core() -> set[int]:
    """Lets this process, and those it starts from now on, run on the last of its cores only; the cores it had."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    return cores
