"""What streaming the merge saves: runs that differ in training.merge and training.parts_per_step alone.

python -m benchmarks.micro.streaming [CONFIG.toml] --dataset har:PATH [--rounds 60] [--jitters 0.1,0.5] [--parts 2,4]
                                     [--real]

For every relative deviation of the transfers (link_jitter of the device profiles, whose own is 0.1), with and without
regulation: mean seconds of a round without its survey, mean waiting seconds of a worker in a round (held by the server,
and from its update to the last one) and the mean of the last three evaluated accuracies. What streaming can save are
stragglers that differ from step to step; a worker that is the slowest in every step costs the same either way. What
steps in parts save is the slowest worker's own step, whose ways up and down then overlap: of at most half of it.

Simulated, unless --real: then the workers are throttled processes (benchmarks/configs/throttled.toml), whose emulated
links carry messages while the emulated devices compute, as in the simulation. They take as long as real devices would,
so steps in parts are played there only if asked for (--parts).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import RunConfig, load_config
from mergesfl.errors import ConfigError
from mergesfl.runtime.journal import read_journal
from mergesfl.runtime.process import StopFlag, run_and_exit
from mergesfl.simulation.run import simulate

CONFIG = Path("benchmarks/configs/streaming.toml")
PROFILES = Path("benchmarks/profiles")
POLICIES = ("barrier", "streaming")
PARTS = "2,4"  # of the steps of simulated runs, beside the unsplit ones
LAST_EVALUATIONS = 3  # accuracy swings from round to round


def jittery_fleet(fleet: Mapping[str, int], link_jitter: float, folder: Path) -> dict[str, int]:
    """The same devices with this jitter of their links, as profiles in the folder. Raises ConfigError: no profile."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {}
    for name, share in fleet.items():
        try:
            text = (PROFILES / f"{name}.toml").read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"no profile {PROFILES / name}.toml: run this at the root of a checkout") from error
        path = folder / f"{name}-{link_jitter:g}.toml"
        path.write_text(re.sub(r"(?m)^link_jitter = \S+", f"link_jitter = {link_jitter}", text), encoding="utf-8")
        result[str(path.resolve())] = share
    return result


def with_values(
    config: RunConfig, name: str, merge: str, regulation: bool, fleet: dict[str, int], parts_per_step: int = 1
) -> RunConfig:
    """The configuration under another name, with these four changed."""
    training = {"merge": merge, "parts_per_step": parts_per_step}
    return config.model_copy(
        update={
            "name": name,
            "training": config.training.model_copy(update=training),
            "method": config.method.model_copy(update={"regulation": regulation}),
            "simulation": config.simulation.model_copy(update={"fleet": fleet}),
        }
    )


def mean_of(lines: list[dict[str, Any]], key: str) -> float:
    """Mean over the rounds without the first, in which real workers count their FLOPs."""
    return statistics.fmean(line[key] for line in lines[1:])


def play(config: RunConfig, is_real: bool, stop: StopFlag) -> tuple[float, float, float]:
    """(seconds of a round, waiting seconds, accuracy) of one run."""
    console = Console(quiet=True)
    if is_real:
        run_cluster(config, False, True, console, stop)
    else:
        simulate(config, False, True, console, stop)
    lines = read_journal(config.run_folder / "journal.jsonl")
    accuracies = [line["accuracy"] for line in lines if line["accuracy"] is not None][-LAST_EVALUATIONS:]
    seconds = mean_of(lines, "round_seconds") - mean_of(lines, "survey_seconds")
    return seconds, mean_of(lines, "waiting_seconds"), statistics.fmean(accuracies)


def main(
    path: Annotated[Path, typer.Argument(help="run configuration with a fleet")] = CONFIG,
    dataset: Annotated[str | None, typer.Option(help="as data.dataset")] = None,
    rounds: Annotated[int | None, typer.Option(help="as training.num_rounds, 2 or more")] = None,
    jitters: Annotated[str, typer.Option(help="relative deviations of the transfers")] = "0.1,0.5",
    regulations: Annotated[str, typer.Option(help="of method.regulation: on, off or both")] = "on,off",
    parts: Annotated[
        str | None, typer.Option(help="of the steps, streaming; '' for unsplit ones only, as is the default of --real")
    ] = None,
    real: Annotated[bool, typer.Option("--real", help="throttled processes instead of a simulation")] = False,
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs/streaming"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Runs all of them and prints a table."""

    def command() -> None:
        more = [f"output.folder={out}", *([f"data.dataset={dataset}"] if dataset else [])]
        more += [f"training.num_rounds={rounds}"] if rounds else []
        config = load_config(path, [*(settings or []), *more])
        if not config.simulation.fleet or config.training.num_rounds < 2:
            raise ConfigError(f"{path}: expected a simulation.fleet and at least 2 rounds")
        chosen_parts = ("" if real else PARTS) if parts is None else parts
        policies = [(merge, 1) for merge in POLICIES]
        policies += [("streaming", int(text)) for text in chosen_parts.split(",") if text]
        stop = StopFlag()
        stop.install()
        print("| link jitter | regulation | merge | s per round | waiting s | accuracy | faster |")
        print("|---:|---|---|---:|---:|---:|---:|")
        for jitter in (float(text) for text in jitters.split(",")):
            fleet = jittery_fleet(config.simulation.fleet, jitter, out / "profiles")
            for regulation in regulations.split(","):
                barrier_seconds = None
                for merge, num_parts in policies:
                    suffix, words = (f"-{num_parts}", f", {num_parts} parts") if num_parts > 1 else ("", "")
                    name = f"{merge}-{jitter:g}-{regulation}{suffix}"
                    varied = with_values(config, name, merge, regulation == "on", fleet, num_parts)
                    seconds, waiting_seconds, accuracy = play(varied, real, stop)
                    barrier_seconds = barrier_seconds or seconds
                    print(
                        f"| {jitter:g} | {regulation} | {merge}{words} | {seconds:.3f} | {waiting_seconds:.3f} "
                        f"| {100 * accuracy:.1f} % | {barrier_seconds / seconds:.3f} |",
                        flush=True,
                    )

    run_and_exit(command)


if __name__ == "__main__":
    typer.run(main)
