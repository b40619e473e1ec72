"""`python -m ps`, the same as `mergesfl ps`: one parameter server; workers connect to it from anywhere.

Under torchrun every rank runs this; rank 0 is the parameter server, the others share the work of its top.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mergesfl.config import RunConfig, load_config
from mergesfl.data import load_partition
from mergesfl.errors import ConfigError
from mergesfl.methods import CENTRAL
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.devices import set_threads
from mergesfl.runtime.files import write_atomic
from mergesfl.runtime.process import StopFlag, keep_freed_memory, run_and_exit, set_up_logging
from mergesfl.transport import bind as bind_to
from ps.following import follow_run, lead, require_merging
from ps.progress import Progress
from ps.ranks import Ranks, is_follower, num_ranks, threads_of
from ps.recorder import check_folder, prepare_folder
from ps.run import serve, set_scene
from ps.switchboard import InterruptedRunError

LOCAL_PARTITION = "local"  # every worker brings its own data


def serve_config(
    config: RunConfig, address: str, resume: bool, overwrite: bool, console: Console, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Runs one parameter server for workers that are started elsewhere; returns the summary."""
    if config.method.name == CENTRAL:
        raise ConfigError("the method 'central' has no workers: start it with `mergesfl run`")
    if ranks is not None:
        require_merging(config)
        ranks.require_device(config.cluster.device)
    stop = StopFlag()
    stop.install()

    def check() -> None:
        if stop.is_set():
            raise InterruptedRunError(
                f"stopped on request; go on with --resume (the last closed round is in {config.run_folder}/checkpoints)"
            )

    set_threads(threads_of(config.cluster.ps_threads))
    check_folder(config, resume, overwrite)
    progress = Progress(console)
    try:
        file = config.data.partition_file
        partition = LOCAL_PARTITION if file is None else load_partition(file).text
        scene = set_scene(config, partition, WallClock(), progress)
        if ranks is not None:
            lead(ranks, scene)
        endpoint = bind_to(address)
        folder = prepare_folder(config, resume)
        write_atomic(folder / "cluster.json", json.dumps({"address": endpoint.address}, indent=2).encode())
        console.print(f"parameter server listens on {endpoint.address}", highlight=False)
        summary = serve(scene, endpoint, resume, check)
    finally:
        progress.close()
    progress.finished(summary, str(folder))
    return summary


def parameter_server(
    config: Annotated[Path | None, typer.Argument(help="TOML or JSON file; without one: all defaults")] = None,
    bind: Annotated[str, typer.Option(help="address to listen on, e.g. tcp://0.0.0.0:5555")] = "tcp://127.0.0.1:5555",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace an earlier run of this name")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Start one parameter server and wait for the workers."""

    def command() -> None:
        set_up_logging(log_level)
        keep_freed_memory()
        if is_follower():
            follow_run()
        elif num_ranks() > 1:
            with Ranks.join() as ranks:
                serve_config(load_config(config, settings or []), bind, resume, overwrite, Console(), ranks)
        else:
            serve_config(load_config(config, settings or []), bind, resume, overwrite, Console())

    run_and_exit(command)


def main() -> None:
    """Entry point."""
    typer.run(parameter_server)


if __name__ == "__main__":
    main()
