"""The workers of a local cluster as processes of this machine: started, watched, ended."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mergesfl.config import RunConfig
from mergesfl.errors import QuorumError
from mergesfl.runtime.clock import WallClock

FAREWELL_SECONDS = 15.0  # for the workers to end by themselves

log = logging.getLogger("cluster")


def worker_name(index: int) -> str:
    """The id of the worker that holds share `index` of the partition."""
    return f"worker-{index:02d}"


def pace_of(config: RunConfig, index: int) -> tuple[float, float | None, float | None]:
    """(slowdown, declared compute, declared transfer seconds per sample) of one worker."""
    cluster = config.cluster
    slowdown = cluster.slowdowns[index] if cluster.slowdowns else 1.0
    if not cluster.declared_compute_seconds_per_sample:
        return slowdown, None, None
    compute_seconds = cluster.declared_compute_seconds_per_sample[index]
    return slowdown, compute_seconds, cluster.declared_transfer_seconds_per_sample[index]


def profile_names(config: RunConfig) -> list[str]:
    """The device profile of each worker, in the order of the fleet's text; without a fleet none at all.

    A fleet of another size than the cluster is scaled to it, by largest remainder (of equal ones the first):

    >>> config = RunConfig.model_validate({"cluster": {"num_workers": 4}, "simulation": {"fleet": {"a": 30, "b": 50}}})
    >>> profile_names(config)  # quotas 1.5 and 2.5
    ['a', 'a', 'b', 'b']
    """
    fleet, num_workers = config.simulation.fleet, config.cluster.num_workers
    num_devices = sum(fleet.values())
    if not num_devices:
        return []
    counts = {name: count * num_workers // num_devices for name, count in fleet.items()}
    by_remainder = sorted(fleet, key=lambda name: -(fleet[name] * num_workers % num_devices))  # stable
    for name in by_remainder[: num_workers - sum(counts.values())]:
        counts[name] += 1
    return [name for name, count in counts.items() for _ in range(count)]


@contextlib.contextmanager
def local_address(transport: str) -> Iterator[str]:
    """An address on this machine that nobody else has."""
    if transport == "tcp":
        yield "tcp://127.0.0.1:*"
        return
    with tempfile.TemporaryDirectory(prefix="mergesfl-") as place:  # a short path: sun_path holds 107 bytes
        yield f"ipc://{place}/ps.sock"


def start_worker(config: RunConfig, address: str, folder: Path, index: int, threads: int) -> subprocess.Popen[bytes]:
    """One worker process; its output goes to workers/<name>.log."""
    slowdown, compute_seconds, transfer_seconds = pace_of(config, index)
    command = [sys.executable, "-m", "workers", "--connect", address, "--id", worker_name(index), "--once"]
    command += ["--dataset", config.data.dataset, "--partition", str(folder / "partition.npz"), "--index", str(index)]
    command += ["--image-size-pixels", str(config.data.image_size_pixels)]
    command += ["--device", config.cluster.worker_device, "--threads", str(threads), "--slowdown", str(slowdown)]
    if compute_seconds is not None:
        command += ["--declared-compute-seconds-per-sample", str(compute_seconds)]
        command += ["--declared-transfer-seconds-per-sample", str(transfer_seconds)]
    profiles = profile_names(config)
    if profiles:
        command += ["--profile", profiles[index], "--emulation-seed", str(config.seed)]
    command += ["--exit-with-parent", "--no-sender-thread"]  # the cores are shared by all of them and the server
    logs = folder / "workers"
    logs.mkdir(exist_ok=True)
    with (logs / f"{worker_name(index)}.log").open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def watching(
    processes: dict[str, subprocess.Popen[bytes]], folder: Path, check: Callable[[], None]
) -> Callable[[], None]:
    """`check`, which also says when a worker process has ended, and gives up when none is left."""
    reported: set[str] = set()

    def watch() -> None:
        check()
        for name, process in processes.items():
            code = process.poll()
            if code is not None and name not in reported:
                reported.add(name)
                log.warning("the process of %s ended with code %d: %s", name, code, _last_line(folder, name))
        if len(reported) == len(processes):
            first = min(reported)
            raise QuorumError(
                f"all {len(processes)} worker processes have ended; {first} said: {_last_line(folder, first)}"
            )

    return watch


def _last_line(folder: Path, name: str) -> str:
    path = folder / "workers" / f"{name}.log"
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1]} ({path})" if lines else f"nothing ({path})"


def end_workers(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Waits for the workers to end by themselves; then asks, then forces. Nothing is left behind."""
    for wait_seconds, act in (
        (FAREWELL_SECONDS, subprocess.Popen.terminate),
        (5.0, subprocess.Popen.kill),
        (5.0, subprocess.Popen.kill),
    ):
        deadline_seconds = WallClock().now_seconds() + wait_seconds
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_seconds - WallClock().now_seconds()))
        left = [process for process in processes.values() if process.poll() is None]
        if not left:
            return
        for process in left:
            act(process)
