"""Runs methods against each other over data sets, levels of non-IID data and seeds; leaves tables and plots.

python -m benchmarks.compare PRESET.toml --dataset har --level 10 --methods mergesfl,fedavg --seeds 0,1 --out runs/bench
PRESET: a file of benchmarks/configs, or any run configuration (see presets.py). Without the options all that the preset
lists is run. Runs that are done are not repeated: stop it with Ctrl-C and start the same command again to go on.
An ablation is a method, too: mergesfl-without-merging; and a variant of the preset: mergesfl@int8.
Exit codes: 1 a run failed, 2 wrong input, 130 stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from benchmarks.cells import Choice, cells_of
from benchmarks.grid import mergesfl_command, read_provenance, run_grid
from benchmarks.presets import load_preset
from benchmarks.progress import GridProgress
from benchmarks.provenance import provenance
from benchmarks.report import PAGE_NAME, write_report
from mergesfl.errors import ConfigError
from mergesfl.runtime.devices import usable_cores
from mergesfl.runtime.process import EXIT_FAILURE, EXIT_INTERRUPTED, StopFlag, run_and_exit

Value = TypeVar("Value", int, float, str)


def parse_list(what: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
    """Values with commas between them. Raises ConfigError for one that is not of this kind."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--{what} {text}: expected values with commas between them, e.g. 0,1,2") from None


def main(
    config: Annotated[Path, typer.Argument(help="preset or run configuration")],
    dataset: Annotated[str, typer.Option(help="names with commas of the preset; else one NAME or NAME:PATH")] = "",
    level: Annotated[str, typer.Option(help="levels of non-IID data with commas, 0 is IID")] = "",
    methods: Annotated[str, typer.Option(help="names with commas; mergesfl-without-merging is an ablation")] = "",
    seeds: Annotated[str, typer.Option(help="whole numbers with commas")] = "",
    targets: Annotated[str, typer.Option(help="accuracies 0..1 to measure the time to, with commas")] = "",
    ours: Annotated[str, typer.Option(help="the method that the others are compared with")] = "mergesfl",
    out: Annotated[Path, typer.Option(help="folder of the runs, tables and plots")] = Path("runs/compare"),
    data: Annotated[Path, typer.Option(help="folder of data sets, {data} of a preset")] = Path("../shared/data"),
    jobs: Annotated[int, typer.Option(help="runs at once; 0: the cores, or 1 where time is measured", min=0)] = 0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for all runs")] = None,
) -> None:
    """Runs the cells that are not done and writes the report."""

    def command() -> None:
        preset = load_preset(config)
        benchmark = preset.benchmark
        choice = Choice(
            datasets=parse_list("dataset", dataset, str) or benchmark.datasets or tuple(preset.datasets) or ("",),
            levels=parse_list("level", level, float) or benchmark.levels,
            methods=parse_list("methods", methods, str) or benchmark.methods,
            seeds=parse_list("seeds", seeds, int) or benchmark.seeds,
        )
        asked = parse_list("targets", targets, float)
        cells = cells_of(preset, choice, out, data, settings or [])
        is_simulated = benchmark.command == "simulate"
        num_jobs = jobs or (usable_cores() if is_simulated else 1)
        stop = StopFlag()
        stop.install()
        console = Console()
        known = {cell: read_provenance(cell).get("cell_seconds") for cell in cells if cell.is_done()}
        progress = GridProgress(console, cells, {cell: s for cell, s in known.items() if s is not None}, num_jobs)
        try:
            outcome = run_grid(cells, mergesfl_command(benchmark.command), num_jobs, stop.is_set, progress, provenance)
        finally:
            progress.close()
        words = shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]])
        told = {**provenance(), "title": f"Comparison {config.stem}", "command": words}
        clock = "simulated" if is_simulated else "measured"
        more = {cell.dataset: (*benchmark.targets.get(cell.dataset, ()), *asked) for cell in cells}
        page = write_report(out, cells, outcome, ours, more, clock, told)
        console.print(page, highlight=False, markup=False, soft_wrap=True)
        console.print(f"written to {out / PAGE_NAME}", highlight=False, soft_wrap=True)
        if outcome.was_stopped:
            count = f"{len(outcome.done)} of {len(cells)} runs"
            print(f"stopped: {count} are done; the same command goes on", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED)
        if outcome.failures:
            names = ", ".join(failure.cell.name for failure in outcome.failures)
            print(f"{len(outcome.failures)} of {len(cells)} runs failed: {names}", file=sys.stderr)
            raise SystemExit(EXIT_FAILURE)

    run_and_exit(command)


if __name__ == "__main__":
    typer.run(main)
