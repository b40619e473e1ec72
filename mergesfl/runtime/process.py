"""What every process of a run does alike: stop on a signal, log one line per event, end with a telling exit code, and
hold on to memory that the next step will want again."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from mergesfl.errors import ConfigError, DataError, MergeSFLError, QuorumError

EXIT_USER_ERROR = 2
EXIT_QUORUM = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_FAILURE = 1

# glibc's malloc.h. By default freed memory soon goes back to the system, and the next step has its pages zeroed anew:
# 2 to 5 % of a step of HAR or M5 with 64 samples, half of a transfer of 4 MiB (benchmarks/LOG.md, 2026-11-26). 32 MiB
# is the most that mallopt takes. [ours]
KEPT_AT_THE_END_BYTES = 128 << 20
MAPPED_ALONE_BYTES = 32 << 20  # from here on a block has a mapping of its own, and goes back at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class StopFlag:
    """Set by the first Ctrl-C or SIGTERM; the second one ends the process the hard way."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._parent_pid: int | None = None

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM; main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def watch_parent(self) -> None:
        """From now on the flag counts as set once the process that started this one is gone."""
        self._parent_pid = os.getppid()

    def set(self) -> None:
        """Asks for the end."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the process should end."""
        return self._event.is_set() or (self._parent_pid is not None and os.getppid() != self._parent_pid)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._event.set()


def set_up_logging(level: str) -> None:
    """One line per event on stderr: time, level, who, what. Raises ConfigError for an unknown level."""
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"log level '{level}': expected debug, info, warning or error")
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )


def keep_freed_memory() -> bool:
    """Tells malloc to keep freed memory of tensors for the next step; whether there is a malloc that listens (glibc's).

    Freed blocks below MAPPED_ALONE_BYTES stay with the process; of what is free at the end of each heap (threads may
    have their own) what exceeds KEPT_AT_THE_END_BYTES goes back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (_M_TRIM_THRESHOLD, KEPT_AT_THE_END_BYTES),
            (_M_MMAP_THRESHOLD, MAPPED_ALONE_BYTES),
        )
    )


def run_and_exit(command: Callable[[], None]) -> None:
    """Runs a command; an error of ours becomes one line on stderr and an exit code, never a traceback."""
    try:
        command()
    except MergeSFLError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(_exit_code(error)) from None


def _exit_code(error: MergeSFLError) -> int:
    if isinstance(error, ConfigError | DataError):
        return EXIT_USER_ERROR
    if isinstance(error, QuorumError):
        return EXIT_QUORUM
    return getattr(error, "exit_code", EXIT_FAILURE)
