"""`python -m workers`, the same as `mergesfl worker`: one worker daemon."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from mergesfl.data.request import IMAGE_SIZE_PIXELS
from mergesfl.errors import ConfigError
from mergesfl.runtime.clock import Clock, WallClock
from mergesfl.runtime.devices import resolve_device, set_threads, usable_cores
from mergesfl.runtime.emulation import EmulatedDevice
from mergesfl.runtime.process import StopFlag, keep_freed_memory, run_and_exit, set_up_logging
from mergesfl.runtime.profiles import load_profile
from mergesfl.transport import connect as connect_to
from mergesfl.transport.base import WorkerEndpoint
from workers.daemon import Daemon, DaemonSettings
from workers.local_data import load_local_data
from workers.pace import DeclaredPace, EmulatedPace, MeasuredPace, Pace
from workers.throttle import EmulatedLink


def make_pace(
    clock: Clock,
    slowdown: float,
    compute_seconds_per_sample: float | None,
    transfer_seconds_per_sample: float | None,
    device: EmulatedDevice | None = None,
) -> Pace:
    """The pace of the command line.

    Raises ConfigError for half a declaration, an impossible number, or a device beside another pace.
    """
    if (compute_seconds_per_sample is None) != (transfer_seconds_per_sample is None):
        raise ConfigError(
            "declare both --declared-compute-seconds-per-sample and --declared-transfer-seconds-per-sample"
        )
    if slowdown < 1:
        raise ConfigError(f"--slowdown {slowdown}: expected 1 or more (2 computes half as fast)")
    if device is not None:
        if slowdown != 1 or compute_seconds_per_sample is not None:
            raise ConfigError(
                f"a device profile ({device.profile.name}) says how fast the worker is: "
                "give no slowdown and no declared durations beside it"
            )
        return EmulatedPace(device, clock)
    if compute_seconds_per_sample is None or transfer_seconds_per_sample is None:
        return MeasuredPace(clock, slowdown)
    return DeclaredPace(compute_seconds_per_sample, transfer_seconds_per_sample)


def has_sender_thread(wanted: bool | None, device: torch.device, is_slowed: bool) -> bool:
    """Whether this worker encodes features beside its computing; None: if that leaves a core free.

    Raises ConfigError for a worker that behaves like a slower device, whose encoding would not be slowed.
    """
    if wanted and is_slowed:
        raise ConfigError("a worker with --slowdown or --profile encodes where it computes: leave out --sender-thread")
    if wanted is None:
        num_computing = 1 if device.type == "cuda" else torch.get_num_threads()  # one thread gives the GPU its work
        return not is_slowed and num_computing < usable_cores()
    return wanted


def throttled(
    connect: Callable[[], WorkerEndpoint], clock: Clock, device: EmulatedDevice | None
) -> tuple[Callable[[], WorkerEndpoint], Clock]:
    """What opens a connection at the rate of this device, and the clock of its pace; None: those that there are."""
    if device is None:
        return connect, clock
    link = EmulatedLink(connect, clock, device)
    return link.connect, link


def worker(
    connect: Annotated[str, typer.Option(help="address of the parameter server, e.g. tcp://192.168.1.10:5555")],
    worker_id: Annotated[str, typer.Option("--id", help="name of this worker, unique in the fleet")] = "",
    dataset: Annotated[
        str, typer.Option(help="this worker's data: NAME or NAME:PATH (see mergesfl datasets)")
    ] = "digits",
    partition: Annotated[Path | None, typer.Option(help="take a share of a saved partition (.npz)")] = None,
    index: Annotated[int | None, typer.Option(help="which share, from 0")] = None,
    image_size_pixels: Annotated[
        int, typer.Option(help="size of the images of the data set 'folder'")
    ] = IMAGE_SIZE_PIXELS,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    threads: Annotated[int | None, typer.Option(help="torch threads; default: all cores")] = None,
    sender_thread: Annotated[
        bool | None,
        typer.Option(
            "--sender-thread/--no-sender-thread",
            help="encode and send features beside computing; default: if a GPU computes or --threads leaves a core",
        ),
    ] = None,
    once: Annotated[bool, typer.Option(help="end after one run instead of waiting for the next")] = False,
    slowdown: Annotated[float, typer.Option(help="compute this many times slower, to try heterogeneity")] = 1.0,
    declared_compute_seconds_per_sample: Annotated[
        float | None, typer.Option(help="report this instead of measured compute time (repeatable runs)")
    ] = None,
    declared_transfer_seconds_per_sample: Annotated[
        float | None, typer.Option(help="report this instead of measured transfer time (repeatable runs)")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="behave like this device: NAME or PATH.toml (see benchmarks/profiles)")
    ] = "",
    emulation_seed: Annotated[int, typer.Option(help="of the device's power modes, link rates and jitter")] = 0,
    exit_with_parent: Annotated[bool, typer.Option(help="end when the process that started this one ends")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Start one worker daemon: it registers with the parameter server, works, and waits for the next run."""

    def command() -> None:
        set_up_logging(log_level)
        keep_freed_memory()
        stop = StopFlag()
        stop.install()
        if exit_with_parent:
            stop.watch_parent()
        clock = WallClock()
        name = worker_id or socket.gethostname()
        emulated = EmulatedDevice(load_profile(profile), emulation_seed, name) if profile else None
        opener, pace_clock = throttled(lambda: connect_to(connect), clock, emulated)
        pace = make_pace(
            pace_clock, slowdown, declared_compute_seconds_per_sample, declared_transfer_seconds_per_sample, emulated
        )
        set_threads(threads)
        computes_on, is_slowed = resolve_device(device), slowdown != 1 or emulated is not None
        data = load_local_data(dataset, partition, index, image_size_pixels)
        settings = DaemonSettings(name, once, has_sender_thread(sender_thread, computes_on, is_slowed))
        Daemon(settings, opener, data, computes_on, clock, pace, stop.is_set).run()

    run_and_exit(command)


def main() -> None:
    """Entry point."""
    typer.run(worker)


if __name__ == "__main__":
    main()
