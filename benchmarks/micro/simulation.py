"""What the simulation costs beside the computing itself, and how far it scales.

python -m benchmarks.micro.simulation --dataset har:PATH
1. Worker-steps per second of a simulated run, and its ratio to the floor (benchmarks/micro/floor.py): the same rounds
   back to back in this process, without messages, clock, sessions or checks. Both are measured in turns in one process,
   in seconds of CPU time of one thread (others may use the machine), medians over the repeats.
2. 10,000 simulated workers, 100 chosen per round: seconds per round, memory.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.micro.against_floor import measure_floor
from benchmarks.micro.cpu import UNCOUNTED_ROUNDS, RoundMarks, counted
from mergesfl.config import RunConfig, load_config
from mergesfl.data import load_dataset
from mergesfl.data.dataset import Dataset
from mergesfl.runtime.journal import read_journal
from mergesfl.runtime.process import StopFlag, keep_freed_memory
from mergesfl.simulation.fleet import with_fleet
from mergesfl.simulation.run import simulate

BATCH_SIZE = 16
NUM_STEPS = 10
NUM_PARTICIPANTS = 10


def base_settings(dataset: str, folder: str, name: str) -> list[str]:
    """A run that leaves as little as a run can."""
    return [
        *(f"data.dataset={dataset}", f"output.folder={folder}", f"name={name}", "cluster.ps_threads=1"),
        *("output.tensorboard=false", "output.plots=false", "output.export=false"),
        *("method.name=minibatch-sfl", f"training.batch_size={BATCH_SIZE}", f"training.local_steps={NUM_STEPS}"),
    ]


def simulated_seconds(config: RunConfig) -> tuple[float, int]:
    """CPU seconds of the rounds of a simulated run, without its beginning and end; and its worker-steps."""
    marks: list[float] = []

    class Marking(StopFlag):
        """Asked at every message: the first and the last question are the first and last message."""

        def is_set(self) -> bool:
            marks.append(time.process_time())
            return False

    simulate(config, False, True, Console(quiet=True), Marking())
    lines = read_journal(config.run_folder / "journal.jsonl")
    return marks[-1] - marks[0], sum(len(line["finished_worker_ids"]) for line in lines) * NUM_STEPS


def measure_overhead(dataset_name: str, num_rounds: int, num_repeats: int) -> None:
    """Part 1."""
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(num_repeats):
            settings = base_settings(dataset_name, folder, f"overhead-{repeat}")
            settings += [f"training.num_rounds={num_rounds + UNCOUNTED_ROUNDS}", "data.partition=iid"]
            settings += [f"control.participants_per_round={NUM_PARTICIPANTS}"]
            settings += ["training.evaluate_every_rounds=1000", "output.checkpoint_every_rounds=1000"]
            config = with_fleet(load_config(None, settings))
            marks = RoundMarks(config.run_folder / "journal.jsonl", list)
            simulate(config, False, True, Console(quiet=True), marks)
            seconds = counted(marks.marks, config.training.num_rounds).cpu_seconds
            floor = measure_floor(config)[0].cpu_seconds
            ratios.append(seconds / floor)
            rates.append(num_rounds * NUM_STEPS * NUM_PARTICIPANTS / seconds)
            print(f"repeat {repeat + 1}: simulated {seconds:.2f} s, floor {floor:.2f} s, {seconds / floor:.3f}")
    print(f"\nworker-steps per second, median: {statistics.median(rates):.0f}")
    print(f"simulated / floor, median of {num_repeats}: {statistics.median(ratios):.3f}")


def repeated(dataset: Dataset, folder: Path, num_samples: int) -> str:
    """The data set as often as it takes to give many workers samples; an npz for the loader."""
    rows = np.arange(num_samples) % len(dataset.train.y)
    path = folder / "repeated.npz"
    np.savez(
        path,
        X_train=dataset.train.x[rows],
        y_train=dataset.train.y[rows],
        X_test=dataset.test.x,
        y_test=dataset.test.y,
    )
    return f"npz:{path}"


def measure_scale(dataset_name: str, num_workers: int, num_participants: int, num_rounds: int) -> None:
    """Part 2: every worker holds a few samples of the data set, repeated until there are ten per worker."""
    dataset = load_dataset(dataset_name)
    with tempfile.TemporaryDirectory() as folder:
        many = repeated(dataset, Path(folder), 10 * num_workers)
        settings = base_settings(many, folder, "many")
        settings += [f"cluster.num_workers={num_workers}", f"control.participants_per_round={num_participants}"]
        settings += [f"training.num_rounds={num_rounds}", f"training.evaluate_every_rounds={num_rounds}"]
        settings += ["output.checkpoint_every_rounds=1000", "data.partition=iid", "method.name=mergesfl"]
        settings += [f"control.max_participants={num_participants}"]
        begin_seconds = time.process_time()
        seconds, worker_steps = simulated_seconds(load_config(None, settings))
        whole_seconds = time.process_time() - begin_seconds
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"\n{num_workers} workers, {num_participants} per round: {seconds / num_rounds:.2f} s per round of {NUM_STEPS} "
        f"steps (registration included), {worker_steps / seconds:.0f} worker-steps per second; whole run "
        f"{whole_seconds:.1f} s; peak memory {peak_bytes / 2**30:.2f} GiB"
    )


def main(
    dataset: Annotated[str, typer.Option(help="NAME:PATH; har for the figures that we publish")] = "digits",
    rounds: Annotated[int, typer.Option(help="rounds per repeat")] = 5,
    repeats: Annotated[int, typer.Option(help="repeats of part 1")] = 5,
    workers: Annotated[int, typer.Option(help="workers of part 2; 0: leave it out")] = 10_000,
    participants: Annotated[int, typer.Option(help="chosen per round in part 2")] = 100,
) -> None:
    """Prints both parts."""
    torch.set_num_threads(1)
    keep_freed_memory()
    measure_overhead(dataset, rounds, repeats)
    if workers:
        measure_scale(dataset, workers, participants, 3)


if __name__ == "__main__":
    typer.run(main)
