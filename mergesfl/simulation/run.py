"""`mergesfl simulate`: the run of a configuration on emulated devices and a virtual clock."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mergesfl.cluster import leave_partition_once, partition_of, partition_text, stop_check
from mergesfl.config import RunConfig
from mergesfl.errors import ConfigError
from mergesfl.methods import CENTRAL
from mergesfl.runtime.devices import set_threads
from mergesfl.runtime.process import StopFlag
from mergesfl.simulation.events import EventLoop
from mergesfl.simulation.fleet import VirtualFleet, with_fleet
from ps.progress import Progress
from ps.recorder import check_folder, prepare_folder
from ps.run import set_scene


def simulate(config: RunConfig, resume: bool, overwrite: bool, console: Console, stop: StopFlag) -> dict[str, Any]:
    """Runs the whole fleet; returns the summary, whose seconds are virtual.

    Raises ConfigError, DataError before anything was started; QuorumError, InterruptedRunError with the last closed
    round saved.
    """
    if config.method.name == CENTRAL:
        raise ConfigError("the method 'central' has no workers to simulate: start it with `mergesfl run`")
    config = with_fleet(config)
    check_folder(config, resume, overwrite)
    progress = Progress(console)
    set_threads(config.cluster.ps_threads)
    loop = EventLoop()

    check = stop_check(config, stop)
    try:
        scene = set_scene(config, partition_text(config), loop, progress)
        partition = partition_of(config, scene.dataset, resume)
        checkpoint = scene.recorder.load() if resume else None
        if checkpoint is not None:  # traces go on where they were
            loop.begin_at(float(checkpoint.state["wall_seconds"]))
        fleet = VirtualFleet(scene, partition, loop)
        fleet.begin_round(checkpoint.round_num - 1 if checkpoint is not None else 0)
        folder = prepare_folder(config, resume)
        leave_partition_once(partition, scene, folder, resume)
        summary = loop.run(lambda: fleet.serve(resume, check))
    finally:
        progress.close()
    progress.finished(summary, str(folder))
    return summary
