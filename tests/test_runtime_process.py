"""Signals, exit codes, one line per error."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergesfl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MergeSFLError,
    QuorumError,
    RemoteProtocolError,
    TransportError,
)
from mergesfl.runtime.process import StopFlag, keep_freed_memory, run_and_exit, set_up_logging
from ps.switchboard import InterruptedRunError


@pytest.fixture
def signals() -> Iterator[None]:
    """Gives the handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (QuorumError("x"), 3),
        (InterruptedRunError("x"), 130),
        (CheckpointError("x"), 1),
        (TransportError("x"), 1),
        (RemoteProtocolError("x"), 1),
    ],
)
def test_every_error_of_ours_is_one_line_and_a_telling_code(
    error: MergeSFLError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_and_exit(command)
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: x\n"


def test_success_returns_and_a_bug_keeps_its_traceback() -> None:
    done: list[int] = []
    run_and_exit(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        run_and_exit(lambda: done.append(1 // 0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_the_end(signals: None, number: signal.Signals) -> None:
    flag = StopFlag()
    flag.install()
    assert not flag.is_set()
    os.kill(os.getpid(), number)
    assert flag.is_set()


def test_the_second_signal_ends_the_process_the_hard_way() -> None:
    """In a process of its own: after the first SIGTERM it says so and waits for ever, the second ends it."""
    program = (
        "import time\n"
        "from mergesfl.runtime.process import StopFlag\n"
        "flag = StopFlag(); flag.install(); print('ready', flush=True)\n"
        "while not flag.is_set(): time.sleep(0.01)\n"
        "print('asked', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_a_flag_can_be_set_from_another_thread() -> None:
    flag = StopFlag()
    setter = threading.Thread(target=flag.set)
    setter.start()
    setter.join()
    assert flag.is_set()


def test_the_flag_counts_as_set_when_the_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    monkeypatch.setattr(os, "getppid", lambda: 100)
    assert not flag.is_set()
    flag.watch_parent()
    assert not flag.is_set()
    monkeypatch.setattr(os, "getppid", lambda: 1)  # init has adopted us
    assert flag.is_set()


def test_a_flag_that_watches_nobody_does_not_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not flag.is_set()


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.handlers = []
    yield root
    root.handlers = handlers
    root.setLevel(level)


def test_logging_is_one_line_on_stderr(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("info")
    logging.getLogger("workers.a").info("hello %d", 5)
    logging.getLogger("workers.a").debug("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.endswith("INFO    workers.a: hello 5")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="log level 'loud': expected debug, info, warning or error"):
        set_up_logging("loud")


FAULTS = """
import resource, sys
from mergesfl.runtime.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [bytes([1]) * (8 << 20) for _ in range(4)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_there_for_the_next_step() -> None:
    """Page faults of steps that use and free 32 MiB: none where it is kept, every page where it is not."""
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", FAULTS, how]
        result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        faults[how] = int(result.stdout)
    assert faults["keep"] < 10 * (32 << 20) // mmap.PAGESIZE // 100
    assert faults["leave"] > 10 * (faults["keep"] + 1)  # of huge pages there are few


def test_without_glibc_nothing_is_told_to_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
