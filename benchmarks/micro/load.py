"""One parameter server under many live workers: `python -m benchmarks.micro.load` prints one table.

The server is the real one (ps.run.serve over TCP) in a fresh process per row; its workers are live connections that
replay features of HAR's shape at once (benchmarks/micro/replay.py, another process), so the server is all that is
waited for. Told are steps per second on the wall, p50 and p99 of the time between two steps of a round, the server's
peak memory, its CPU seconds per step, and the pure compute: the same top, `MergedTop.step` on the same merged batches
without server and workers. The ratio is pure / server in CPU seconds per step: 1 would be a server that costs nothing.
Streaming, the server's top computes in groups, as many as happen to be there; the pure compute is the merged step's.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.micro.samples import dataset_text, find_workload
from mergesfl.config import RunConfig, load_config
from mergesfl.methods.base import StepFeatures
from mergesfl.methods.merged_top import MergedTop
from mergesfl.runtime.arrays import Array, to_tensor
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.journal import read_journal
from mergesfl.runtime.process import keep_freed_memory
from mergesfl.transport import bind
from ps.progress import Progress
from ps.recorder import prepare_folder
from ps.run import Scene, serve, set_scene


@dataclass(frozen=True)
class Load:
    """How much is asked of the server: all workers take part in every step of every round."""

    num_workers: int
    batch_size: int  # d, of each worker
    num_steps: int  # of a round
    num_rounds: int
    merge: str = "barrier"


@dataclass(frozen=True)
class Served:
    """What the server made of it.

    Attributes:
        step_seconds: between two steps of the same round, on the wall.
        cpu_seconds: of the server's process, all its threads, between the same steps together.
        pure_seconds: CPU seconds of the top alone for one such step.
        peak_bytes: resident memory of the server's process at its largest.
        num_samples_trained: what the run's journal counts.
    """

    step_seconds: tuple[float, ...]
    cpu_seconds: float
    pure_seconds: float
    peak_bytes: int
    num_samples_trained: int

    @property
    def pure_share(self) -> float:
        """Pure compute / what the server needs, per step."""
        return self.pure_seconds * len(self.step_seconds) / self.cpu_seconds

    def cells(self) -> str:
        """One row of the table, without the load."""
        p50, p99 = 1e3 * np.percentile(self.step_seconds, (50, 99))
        rate = len(self.step_seconds) / sum(self.step_seconds)
        per_step = 1e3 * self.cpu_seconds / len(self.step_seconds)
        return (
            f"{rate:.1f} | {p50:.0f} | {p99:.0f} | {self.peak_bytes / 2**20:.0f} | {per_step:.1f} | "
            f"{1e3 * self.pure_seconds:.1f} | {self.pure_share:.2f}"
        )


def load_run(load: Load, folder: Path) -> RunConfig:
    """The server's run: it evaluates and saves as little as a run can."""
    dataset = dataset_text(find_workload("har"), None, folder, 4 * load.batch_size)
    return load_config(
        None,
        [
            *(f"data.dataset={dataset}", "model.name=cnn", f"output.folder={folder}", "method.name=minibatch-sfl"),
            *("output.tensorboard=false", "output.plots=false", "output.export=false", "cluster.device=cpu"),
            *("output.checkpoint_every_rounds=1000", "training.evaluate_every_rounds=1000", "cluster.ps_threads=1"),
            *(f"training.batch_size={load.batch_size}", f"training.local_steps={load.num_steps}"),
            *(f"training.num_rounds={load.num_rounds}", f"cluster.num_workers={load.num_workers}"),
            *("cluster.start_deadline_seconds=600.0", "cluster.step_deadline_seconds=600.0"),
            *("training.learning_rate=0.001", f"training.merge={load.merge}"),
        ],
    )


def record(scene: Scene, batch_size: int, path: Path) -> tuple[Array, Array]:
    """Features (d, F...) and labels (d,) of one batch through the bottom, also left in an npz for the workers."""
    train = scene.dataset.train
    with torch.no_grad():
        features = scene.network.bottom(scene.dataset.scale.to_input(train.x[:batch_size])).numpy()  # (d, F...)
    labels = train.y[:batch_size]  # (d,)
    np.savez(
        path, features=features, labels=labels, sample_shape=np.array(scene.dataset.sample_shape),
        class_names=np.array(scene.dataset.class_names),
    )  # fmt: skip
    return features, labels


def pure_seconds(scene: Scene, load: Load, features: Array, labels: Array) -> float:
    """CPU seconds of one step of the top on the merged batch, without anything around it; the median of a few."""
    cpu = torch.device("cpu")
    merged, all_labels = (to_tensor(np.concatenate([one] * load.num_workers), cpu) for one in (features, labels))
    parts = zip(torch.split(merged, len(labels)), torch.split(all_labels, len(labels)), strict=True)
    arrived = [StepFeatures(str(index), z, y) for index, (z, y) in enumerate(parts)]
    top = MergedTop(copy.deepcopy(scene.network.top).train())
    top.open([one.worker_id for one in arrived], 0.001)
    seconds = []
    for step in range(max(3, load.num_steps)):
        begin_seconds = time.process_time()
        top.step(arrived, step)
        seconds.append(time.process_time() - begin_seconds)
    return float(np.median(seconds))


def measure(load: Load) -> Served:
    """One run under this load, in this process; the workers are another one."""
    torch.set_num_threads(1)
    keep_freed_memory()
    marks: list[tuple[float, float]] = []  # wall and CPU seconds at the end of every merged step
    num_merged = 0  # samples of the open step

    def mark(num_samples: int) -> None:
        nonlocal num_merged
        num_merged += num_samples
        if num_merged == load.num_workers * load.batch_size:
            num_merged = 0
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as place:
        folder, clock = Path(place), WallClock()
        config = load_run(load, folder)
        progress = Progress(Console(quiet=True))
        scene = set_scene(config, "replayed", clock, progress)
        features, labels = record(scene, load.batch_size, folder / "recording.npz")
        before = pure_seconds(scene, load, features, labels)
        prepare_folder(config, False)
        endpoint = bind("tcp://127.0.0.1:*")
        command = [sys.executable, "-m", "benchmarks.micro.replay", endpoint.address]
        command += [str(folder / "recording.npz"), str(load.num_workers)]
        with subprocess.Popen(command) as workers:
            try:
                serve(scene, endpoint, False, lambda: None, charge=mark)
                workers.wait(60.0)
            finally:
                progress.close()
                workers.kill()
        after = pure_seconds(scene, load, features, labels)
        lines = read_journal(config.run_folder / "journal.jsonl")
        num_samples_trained = sum(line["samples_trained"] for line in lines)
    assert len(marks) == load.num_steps * load.num_rounds, "a worker was lost"
    tau = load.num_steps
    pairs = [(marks[i - 1], marks[i]) for i in range(1, len(marks)) if i % tau]  # within one round
    return Served(
        tuple(end[0] - begin[0] for begin, end in pairs),
        sum(end[1] - begin[1] for begin, end in pairs),
        (before + after) / 2,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        num_samples_trained,
    )


def main(
    workers: Annotated[str, typer.Option(help="live workers, a row each")] = "10,50,100,200,400",
    batch: Annotated[int, typer.Option(help="samples of each worker in a step")] = 4,
    steps: Annotated[int, typer.Option(help="steps per round")] = 20,
    rounds: Annotated[int, typer.Option(help="rounds")] = 3,
    merge: Annotated[str, typer.Option(help="barrier, streaming or streaming-in-order")] = "barrier",
) -> None:
    """Prints the table."""
    header = (
        "workers | steps/s | step p50 ms | step p99 ms | peak MiB | CPU ms per step | pure compute ms | pure / server"
    )
    print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for num_workers in map(int, workers.split(",")):
        load = Load(num_workers, batch, steps, rounds, merge)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process: its peak memory is its own
            print(f"| {num_workers} | {pool.apply(measure, (load,)).cells()} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
