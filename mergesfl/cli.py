"""The command line: `mergesfl run`, `ps`, `worker`, and what helps to choose their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mergesfl.config import RunConfig, load_config
from mergesfl.data import DATASETS, load_dataset
from mergesfl.data.dataset import Dataset
from mergesfl.errors import ConfigError
from mergesfl.methods import SUMMARIES
from mergesfl.models import MODELS, build_network, split_name
from mergesfl.runtime.process import StopFlag, keep_freed_memory, run_and_exit, set_up_logging
from mergesfl.runtime.profiles import known_profiles, load_profile
from mergesfl.training.cuts import cut_table
from ps.__main__ import parameter_server
from workers.__main__ import worker

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Split federated learning for real edge clusters.")
app.command("ps")(parameter_server)
app.command("worker")(worker)

Settings = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated")]
ConfigFile = Annotated[Path | None, typer.Argument(help="TOML or JSON file; without one: all defaults")]


Resume = Annotated[bool, typer.Option(help="go on from the last checkpoint")]
Overwrite = Annotated[bool, typer.Option(help="replace an earlier run of this name")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error")]
RunFleet = Callable[[RunConfig, bool, bool, Console, StopFlag], object]


def _start(
    find: Callable[[], RunFleet],
    config: Path | None,
    settings: list[str] | None,
    resume: bool,
    overwrite: bool,
    log_level: str,
) -> None:
    """Runs a whole fleet until it ends or is stopped; `find` imports what runs it, for no other command needs it."""

    def command() -> None:
        run_fleet = find()
        set_up_logging(log_level)
        keep_freed_memory()
        stop = StopFlag()
        stop.install()
        run_fleet(load_config(config, settings or []), resume, overwrite, Console(), stop)

    run_and_exit(command)


@app.command()
def run(
    config: ConfigFile = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run a whole cluster on this machine: one parameter server and its workers."""

    def find() -> RunFleet:
        from mergesfl.cluster import run_cluster

        return run_cluster

    _start(find, config, settings, resume, overwrite, log_level)


@app.command()
def simulate(
    config: ConfigFile = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run 80 (or 10,000) emulated devices in this process, on a virtual clock."""

    def find() -> RunFleet:
        from mergesfl.simulation.run import simulate as run_simulation

        return run_simulation

    _start(find, config, settings, resume, overwrite, log_level)


@app.command()
def partition(
    out: Annotated[Path, typer.Option(help="folder for partition.npz, .json and .png")],
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Draw a partition without running anything: for workers that are started one by one."""

    def command() -> None:
        from mergesfl.cluster import draw_partition, leave_partition

        values = load_config(config, settings or [])
        dataset = _dataset_of(values)
        drawn = draw_partition(values, dataset)
        out.mkdir(parents=True, exist_ok=True)
        leave_partition(drawn, dataset, out, values.output.plots)
        sizes = [len(share) for share in drawn.assignments]
        Console().print(
            f"{drawn.text}: {len(sizes)} shares of {min(sizes)} to {max(sizes)} samples in {out}", highlight=False
        )

    run_and_exit(command)


def _dataset_of(config: RunConfig) -> Dataset:
    data = config.data
    return load_dataset(data.dataset, download=data.download, image_size_pixels=data.image_size_pixels)


@app.command()
def cuts(
    model: Annotated[str, typer.Argument(help="cnn, m5, alexnet, vgg16, or torchvision:NAME")],
    dataset: Annotated[str, typer.Option(help="take sample shape and classes from this data set")] = "",
    sample_shape: Annotated[str, typer.Option(help="shape of one sample, e.g. 3,224,224")] = "",
    num_classes: Annotated[int, typer.Option(help="classes of the last layer")] = 10,
) -> None:
    """Print where a network can be cut: features, bytes per sample, parameters below and above."""

    def command() -> None:
        shape, classes = _sample_shape(model, dataset, sample_shape, num_classes)
        name, _ = split_name(model)
        network = build_network(name, shape, classes, seed=0)
        default_cut = MODELS[name].default_cut if name in MODELS else None
        table = Table(title=f"{model}, samples of shape {shape}", title_justify="left")
        for heading in ("cut", "feature shape", "feature bytes per sample", "parameters below", "parameters above"):
            table.add_column(heading, justify="left" if heading == "cut" else "right")
        for size in cut_table(network, shape):
            mark = " (default)" if size.name == default_cut else ""
            table.add_row(
                size.name + mark,
                "x".join(str(extent) for extent in size.feature_shape),
                f"{size.feature_bytes_per_sample:,}",
                f"{size.num_params_bottom:,}",
                f"{size.num_params_top:,}",
            )
        Console(width=None).print(table)

    run_and_exit(command)


def _sample_shape(model: str, dataset: str, text: str, num_classes: int) -> tuple[tuple[int, ...], int]:
    """The sample shape and the classes to build for: given, or the data set's, or those of the model's own task."""
    if dataset:
        data = load_dataset(dataset)
        return data.sample_shape, data.num_classes
    if text:
        try:
            return tuple(int(extent) for extent in text.split(",")), num_classes
        except ValueError:
            raise ConfigError(f"--sample-shape {text}: expected whole numbers with commas, e.g. 3,224,224") from None
    name, _ = split_name(model)
    return (MODELS[name].example_shape if name in MODELS else (3, 224, 224)), num_classes


@app.command()
def methods() -> None:
    """List the methods."""
    for name, summary in SUMMARIES.items():
        typer.echo(f"{name:14s} {summary}")


@app.command()
def datasets() -> None:
    """List the data sets, what is expected on the disk and where to get it."""
    for name, loader in DATASETS.items():
        typer.echo(f"{name:14s} {loader.description}\n{'':14s} expects {loader.expected}; get it: {loader.source}")


@app.command()
def profiles() -> None:
    """List the device profiles that `mergesfl simulate` and `mergesfl worker --profile` know."""
    for name in known_profiles():
        profile = load_profile(name)
        fastest = profile.peak_flops_per_second * profile.efficiency * max(profile.power_modes)
        low, high = profile.link_mbit_per_second
        typer.echo(
            f"{name:20s} {len(profile.power_modes)} power modes, {fastest / 1e9:.0f} GFLOP/s and less, "
            f"link {low:g} to {high:g} Mb/s, {profile.memory_bytes / 2**30:.0f} GiB"
        )


@app.command()
def models() -> None:
    """List the models; any torchvision classification network is torchvision:NAME."""
    for name, spec in MODELS.items():
        typer.echo(f"{name:14s} {spec.description}; cut at {spec.default_cut}")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
