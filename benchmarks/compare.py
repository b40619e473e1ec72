"""Runs several methods over several seeds on one configuration and writes one table.

python -m benchmarks.compare CONFIG.toml --methods mergesfl,fedavg --seeds 0,1,2 --out runs/compare
A run that is done, with the same configuration, is not repeated: an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mergesfl.config import RunConfig, config_values, load_config

COLUMNS = ("final_accuracy", "best_accuracy", "ingress_bytes", "egress_bytes", "merged_kl_nats_mean", "wall_seconds")


def is_same(saved: Path, wanted: RunConfig) -> bool:
    """Whether a run that is there was made with this configuration."""
    return bool(json.loads(saved.read_text(encoding="utf-8")) == config_values(wanted))


def run_one(config: Path, method: str, seed: int, out: Path, settings: list[str]) -> dict[str, Any]:
    """One run as a user starts it; returns its summary."""
    name = f"{method}-seed{seed}"
    summary = out / name / "summary.json"
    base, *switches_off = method.split("-without-")
    choices = [f"name={name}", f"seed={seed}", f"output.folder={out}", f"method.name={base}", *settings]
    choices += [f"method.{switch}=false" for switch in switches_off]
    if not (summary.exists() and is_same(out / name / "config.json", load_config(config, choices))):
        command = [sys.executable, "-m", "mergesfl", "run", str(config), "--overwrite"]
        subprocess.run([*command, *(part for choice in choices for part in ("--set", choice))], check=True)
    values: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return values


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds, one line per method."""
    lines = [
        "| method | final accuracy % | best accuracy % | up MB | down MB | merged KL nats | wall s |",
        "|---|" + "---:|" * 6,
    ]
    for method, summaries in rows.items():
        cells = []
        for column in COLUMNS:
            scale = 100 if column.endswith("accuracy") else 1e-6 if column.endswith("bytes") else 1
            values = [scale * float(summary[column]) for summary in summaries if summary[column] is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 and column.endswith("accuracy") else ""
            cells.append(f"{statistics.mean(values):.{3 if 'kl' in column else 2 if spread else 1}f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    config: Path,
    methods: Annotated[
        str, typer.Option(help="names with commas; mergesfl-without-merging is an ablation")
    ] = "mergesfl",
    seeds: Annotated[str, typer.Option(help="whole numbers with commas")] = "0",
    out: Annotated[Path, typer.Option(help="folder of the runs and of the table")] = Path("runs/compare"),
    dataset: Annotated[str, typer.Option(help="NAME or NAME:PATH instead of the configuration's")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for all runs")] = None,
) -> None:
    """Runs the grid and prints the table."""
    choices = [*(settings or []), *([f"data.dataset={dataset}"] if dataset else [])]
    rows = {
        method: [run_one(config, method, int(seed), out, choices) for seed in seeds.split(",")]
        for method in methods.split(",")
    }
    text = table(rows)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
