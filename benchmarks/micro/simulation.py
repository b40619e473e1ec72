"""What the simulation costs beside the computing itself, and how far it scales.

python -m benchmarks.micro.simulation --dataset har:PATH
1. Worker-steps per second of a simulated run, and its ratio to the pure compute of the same steps: the same bottoms,
   top, batches and steps back to back in this process, without messages, clock, sessions or checks. Both are measured
   in turns in one process, in seconds of CPU time of one thread (others may use the machine), medians over the repeats.
2. 10,000 simulated workers, 100 chosen per round: seconds per round, memory.
"""

from __future__ import annotations

import functools
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

from mergesfl.config import RunConfig, load_config
from mergesfl.data import load_dataset
from mergesfl.data.dataset import Dataset
from mergesfl.data.sampling import Batches
from mergesfl.models import build_model
from mergesfl.runtime.journal import read_journal
from mergesfl.runtime.process import StopFlag
from mergesfl.simulation.run import simulate
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.merging import merged_step
from mergesfl.training.placement import place
from mergesfl.training.schedule import make_sgd

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


def pure_seconds(dataset: Dataset, batch_sizes: list[list[int]]) -> float:
    """CPU seconds of the same steps back to back: batches drawn, bottoms, merged step, bottoms again, optimisers."""
    num_workers = max(len(sizes) for sizes in batch_sizes)
    cpu = torch.device("cpu")
    build = functools.partial(build_model, "cnn", None, dataset.sample_shape, dataset.num_classes, 0)
    models = [place(build(), cpu) for _ in range(num_workers)]
    top = models[0].top
    generator = np.random.default_rng(0)
    begin_seconds = time.process_time()
    for sizes in batch_sizes:
        workers = list(zip(models, sizes, strict=False))
        streams = [Batches(dataset.train.x, dataset.train.y, d, generator, dataset.scale, True) for _, d in workers]
        optimizers = [make_sgd(model.bottom.parameters(), 0.01) for model, _ in workers]
        top_optimizer = make_sgd(top.parameters(), 0.01)
        for step in range(NUM_STEPS):
            seed_dropout(top, step)
            drawn = [next(stream) for stream in streams]  # x (d, *sample), y (d,)
            features = [model.bottom(x) for (model, _), (x, _) in zip(workers, drawn, strict=True)]  # (d, F...)
            merged = merged_step(top, top_optimizer, features, [y for _, y in drawn])
            for z, gradient, optimizer in zip(features, merged.gradients, optimizers, strict=True):
                optimizer.zero_grad(set_to_none=True)
                z.backward(gradient)
                optimizer.step()
    return time.process_time() - begin_seconds


def measure_overhead(dataset_name: str, num_rounds: int, num_repeats: int) -> None:
    """Part 1."""
    dataset = load_dataset(dataset_name)
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(num_repeats):
            settings = base_settings(dataset_name, folder, f"overhead-{repeat}")
            settings += [f"training.num_rounds={num_rounds}", f"control.participants_per_round={NUM_PARTICIPANTS}"]
            settings += [f"training.evaluate_every_rounds={num_rounds}", "output.checkpoint_every_rounds=1000"]
            # the last round is evaluated and saved after the last message of a round, so neither is counted
            config = load_config(None, [*settings, "data.partition=iid"])
            seconds, worker_steps = simulated_seconds(config)
            sizes = [line["batch_sizes"] for line in read_journal(config.run_folder / "journal.jsonl")]
            pure = pure_seconds(dataset, sizes)
            ratios.append(seconds / pure)
            rates.append(worker_steps / seconds)
            print(f"repeat {repeat + 1}: simulated {seconds:.2f} s, pure compute {pure:.2f} s, {seconds / pure:.3f}")
    print(f"\nworker-steps per second, median: {statistics.median(rates):.0f}")
    print(f"simulated / pure compute, median of {num_repeats}: {statistics.median(ratios):.3f}")


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
    measure_overhead(dataset, rounds, repeats)
    if workers:
        measure_scale(dataset, workers, participants, 3)


if __name__ == "__main__":
    typer.run(main)
