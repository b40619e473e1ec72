"""Real processes for tests: start, wait for what they write, kill, and see that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "training.batch_size=8",
    "training.local_steps=3",
    "output.plots=false",
    "output.export=false",
    "output.tensorboard=false",
    "output.checkpoint_every_rounds=1",
    "cluster.device=cpu",
    "cluster.worker_device=cpu",
    "cluster.ps_threads=1",
    "cluster.worker_threads=1",
)


def declared(num_workers: int) -> list[str]:
    """Settings that make the speeds, and so the plans, a matter of configuration: worker i is i + 1 times slower."""
    compute = [round(0.001 * (i + 1), 6) for i in range(num_workers)]
    transfer = [0.0005] * num_workers
    return [
        f"cluster.num_workers={num_workers}",
        f"cluster.declared_compute_seconds_per_sample={compute}",
        f"cluster.declared_transfer_seconds_per_sample={transfer}",
    ]


def command(*words: str, settings: Sequence[str] = ()) -> list[str]:
    """`python -m mergesfl WORDS --set ...`."""
    return [sys.executable, "-m", "mergesfl", *words, *(part for text in settings for part in ("--set", text))]


def start(*words: str, settings: Sequence[str] = (), log: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own; its output goes to the file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command(*words, settings=settings),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )


def run(*words: str, settings: Sequence[str] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs to the end; output is captured."""
    return subprocess.run(
        command(*words, settings=settings), capture_output=True, text=True, timeout=200, cwd=cwd, check=False
    )


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Waits for a condition; fails naming it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.02)


def journal(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal that may still be written to."""
    path = folder / "journal.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children, whatever state they are in."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
