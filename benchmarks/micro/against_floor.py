"""Our runs against the floor: `python -m benchmarks.micro.against_floor` prints one table.

The floor (benchmarks/micro/floor.py) and every run train the same rounds, one after the other in each repeat, on ONE
core with one torch thread per process: the workers' processes share the core that the floor has for itself. Compared
are CPU seconds of all processes together, which other work on the machine hardly touches, and seconds on the wall,
which it does. Counted are whole rounds, from the end of the first, evaluation and checkpoint left out. Beside every run
over sockets stands "bare": the floor in as many processes with nothing between but pyzmq (benchmarks/micro/bare.py),
which tells what of the rest is the processes' and what ours. Every repeat also sees that all end with the floor's
parameters to the bit.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.micro.bare import run_bare
from benchmarks.micro.cpu import UNCOUNTED_ROUNDS, Mark, RoundMarks, counted, mark, pin_to_one_core
from benchmarks.micro.floor import METHOD, played_rounds, run_floor
from benchmarks.micro.samples import dataset_text, find_workload
from mergesfl.cluster import run_cluster
from mergesfl.config import RunConfig, load_config
from mergesfl.data import load_dataset
from mergesfl.runtime.checkpoint import load_checkpoint
from mergesfl.runtime.process import keep_freed_memory


def run_settings(name: str, data: Path | None, folder: Path, num_workers: int, batch_size: int) -> list[str]:
    """A run of one workload that leaves as little as a run can."""
    workload = find_workload(name)
    dataset = dataset_text(workload, data, folder, 2 * num_workers * batch_size)
    return [
        *(f"data.dataset={dataset}", f"model.name={workload.model}", f"output.folder={folder}", "data.partition=iid"),
        *("output.tensorboard=false", "output.plots=false", "output.export=false", f"method.name={METHOD}"),
        *("output.checkpoint_every_rounds=1000", "training.evaluate_every_rounds=1000", "training.learning_rate=0.01"),
        *("cluster.ps_threads=1", "cluster.worker_threads=1", "cluster.device=cpu", "cluster.worker_device=cpu"),
        *(f"training.batch_size={batch_size}", f"cluster.num_workers={num_workers}"),
        *("cluster.start_deadline_seconds=600.0", "cluster.step_deadline_seconds=600.0"),
    ]


def measure_run(config: RunConfig) -> tuple[Mark, dict[str, Tensor]]:
    """What the counted rounds of a run took, and the parameters it ends with."""

    def worker_pids() -> list[int]:
        path = config.run_folder / "cluster.json"
        return list(json.loads(path.read_text())["worker_pids"].values()) if path.exists() else []

    marks = RoundMarks(config.run_folder / "journal.jsonl", worker_pids)
    run_cluster(config, False, True, Console(quiet=True), marks)
    tensors = load_checkpoint(config.run_folder / "checkpoints").tensors
    return counted(marks.marks, config.training.num_rounds), tensors


def measure_floor(config: RunConfig) -> tuple[Mark, dict[str, Tensor]]:
    """The same of the floor; the run of this configuration has left its rounds in its folder."""
    marks: list[Mark] = []
    dataset = load_dataset(config.data.dataset)
    tensors = run_floor(config, dataset, played_rounds(config.run_folder), lambda: marks.append(mark()))
    return counted(marks, config.training.num_rounds), tensors


def measure_bare(config: RunConfig) -> tuple[Mark, dict[str, Tensor]]:
    """The same of the floor in processes."""
    marks: list[Mark] = []
    dataset = load_dataset(config.data.dataset)
    rounds = played_rounds(config.run_folder)
    tensors = run_bare(config, dataset, rounds, lambda pids: marks.append(mark(pids)))
    return counted(marks, config.training.num_rounds), tensors


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names and equal tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def compare(settings: list[str], transports: Sequence[str], num_repeats: int) -> list[str]:
    """The cells of one workload, a row each: medians over the repeats of what was measured side by side."""
    runs: dict[str, list[Mark]] = {}
    equal: dict[str, bool] = {}
    floors = []
    for repeat in range(num_repeats):
        config, ended = load_config(None, settings), {}
        for transport in transports:
            config = load_config(None, [*settings, f"name={transport}-{repeat}", f"cluster.transport={transport}"])
            measured = {transport: measure_run(config)}
            if transport != "memory":
                measured[f"{transport}, bare"] = measure_bare(config)
            for name, (taken, tensors) in measured.items():
                runs.setdefault(name, []).append(taken)
                ended[name] = tensors
        floor, tensors = measure_floor(config)
        floors.append(floor)
        for name in ended:
            equal[name] = equal.get(name, True) and same_bits(ended[name], tensors)
    return [_row(name, taken, floors, equal[name]) for name, taken in runs.items()]


def _row(transport: str, taken: Sequence[Mark], floors: Sequence[Mark], is_equal: bool) -> str:
    cpu = [run.cpu_seconds / floor.cpu_seconds for run, floor in zip(taken, floors, strict=True)]
    wall = [run.wall_seconds / floor.wall_seconds for run, floor in zip(taken, floors, strict=True)]
    floor_seconds = statistics.median(floor.cpu_seconds for floor in floors)
    return (
        f"{transport} | {floor_seconds:.2f} | {statistics.median(cpu):.3f} | {min(cpu):.3f} to {max(cpu):.3f} | "
        f"{statistics.median(wall):.3f} | {'yes' if is_equal else 'NO'}"
    )


def main(
    workloads: Annotated[str, typer.Option(help="of har, m5, alexnet")] = "har,m5,alexnet",
    transports: Annotated[str, typer.Option(help="of memory, ipc, tcp")] = "memory,ipc,tcp",
    data: Annotated[Path | None, typer.Option(help="folder of data sets, for har; else drawn")] = None,
    workers: Annotated[int, typer.Option(help="workers, all of them in every round")] = 10,
    batch: Annotated[int, typer.Option(help="samples per worker and step; the default is the paper's code's")] = 64,
    steps: Annotated[int, typer.Option(help="steps per round")] = 4,
    rounds: Annotated[int, typer.Option(help="counted rounds per repeat")] = 2,
    repeats: Annotated[int, typer.Option(help="repeats")] = 3,
) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    cores = pin_to_one_core()
    print(f"{workers} workers, {batch} samples, {steps} steps per round, {rounds} rounds, {repeats} repeats; one core")
    print("ratios: all processes of the run / the floor, both on one core; medians of the repeats\n")
    print("| workload | transport | floor CPU s | CPU / floor | range | wall / floor | same bits |")
    print("|---|---|---|---|---|---|---|")
    for name in workloads.split(","):
        with tempfile.TemporaryDirectory() as folder:
            settings = run_settings(name, data, Path(folder), workers, batch)
            settings += [f"training.local_steps={steps}", f"training.num_rounds={rounds + UNCOUNTED_ROUNDS}"]
            for row in compare(settings, transports.split(","), repeats):
                print(f"| {name} | {row} |", flush=True)
    os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    typer.run(main)
