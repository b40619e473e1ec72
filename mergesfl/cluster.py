"""A whole cluster on this machine: one parameter server and N workers, as processes (tcp, ipc) or threads (memory)."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mergesfl.config import RunConfig
from mergesfl.data import load_partition, parse_partition, save_partition
from mergesfl.data.dataset import Dataset
from mergesfl.data.partition import Partition
from mergesfl.errors import ConfigError, QuorumError
from mergesfl.methods import CENTRAL
from mergesfl.processes import (
    FAREWELL_SECONDS,
    end_workers,
    local_address,
    pace_of,
    profile_names,
    start_worker,
    watching,
    worker_name,
)
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.devices import local_thread_plan, resolve_device, set_threads, usable_cores
from mergesfl.runtime.emulation import EmulatedDevice
from mergesfl.runtime.files import write_atomic
from mergesfl.runtime.process import StopFlag
from mergesfl.runtime.profiles import load_profile
from mergesfl.seeding import generator_for
from mergesfl.transport import bind
from mergesfl.transport.memory import MemoryHub
from ps.central import train_centrally
from ps.plots import plot_partition
from ps.progress import Progress
from ps.recorder import check_folder, prepare_folder
from ps.run import Scene, serve, set_scene
from ps.switchboard import InterruptedRunError
from workers.__main__ import make_pace, throttled
from workers.daemon import Daemon, DaemonSettings
from workers.local_data import share_of


def run_cluster(config: RunConfig, resume: bool, overwrite: bool, console: Console, stop: StopFlag) -> dict[str, Any]:
    """Starts everything, runs it, ends everything; returns the summary.

    Raises ConfigError, DataError before anything was started; QuorumError, InterruptedRunError with the last closed
    round saved.
    """
    if config.method.name != CENTRAL:
        _check_paces(config)
    check_folder(config, resume, overwrite)
    progress = Progress(console)
    cores = usable_cores()
    ps_threads, worker_threads = local_thread_plan(config.cluster.num_workers, cores)
    set_threads(config.cluster.ps_threads or (cores if config.method.name == CENTRAL else ps_threads))

    check = stop_check(config, stop)
    try:
        scene = set_scene(config, partition_text(config), WallClock(), progress)
        partition = None if config.method.name == CENTRAL else partition_of(config, scene.dataset, resume)
        folder = prepare_folder(config, resume)
        if partition is None:
            summary = train_centrally(scene, resume, check)
        else:
            leave_partition_once(partition, scene, folder, resume)
            threads = config.cluster.worker_threads or worker_threads
            if config.cluster.transport == "memory":
                summary = _run_threads(scene, partition, resume, check)
            else:
                summary = _run_processes(scene, partition, folder, resume, threads, check)
    finally:
        progress.close()
    progress.finished(summary, str(folder))
    return summary


def stop_check(config: RunConfig, stop: StopFlag) -> Callable[[], None]:
    """What raises InterruptedRunError once the run should stop, and says how to go on."""

    def check() -> None:
        if stop.is_set():
            raise InterruptedRunError(
                f"stopped on request; go on with --resume (what is done is in {config.run_folder})"
            )

    return check


def leave_partition_once(partition: Partition, scene: Scene, folder: Path, resume: bool) -> None:
    """Leaves the partition in the run's folder, unless a resumed run finds its own there."""
    if not (resume and (folder / "partition.npz").exists()):
        leave_partition(partition, scene.dataset, folder, scene.config.output.plots)


def partition_text(config: RunConfig) -> str:
    """How the summary names the partition."""
    if config.method.name == CENTRAL:
        return "none"
    file = config.data.partition_file
    return config.data.partition if file is None else load_partition(file).text


def partition_of(config: RunConfig, dataset: Dataset, resume: bool) -> Partition:
    """A new partition, or that of the run to resume: its workers hold the same samples as before."""
    saved = config.run_folder / "partition.npz"
    if resume and saved.exists():
        data = config.data.model_copy(update={"partition_file": saved})
        return draw_partition(config.model_copy(update={"data": data}), dataset)
    return draw_partition(config, dataset)


def draw_partition(config: RunConfig, dataset: Dataset) -> Partition:
    """Draws the partition of the configuration, or loads a saved one.

    Raises ConfigError, or DataError when a saved partition does not fit the data set or the number of workers.
    """
    labels, num_workers = dataset.train.y, config.cluster.num_workers
    if config.data.partition_file is None:
        generator = generator_for(config.seed, "partition")
        partitioner = parse_partition(config.data.partition)
        return partitioner.split(labels, num_workers, generator, dataset.train.groups, config.seed)
    partition = load_partition(config.data.partition_file)
    partition.check_labels(labels)
    if partition.num_workers != num_workers:
        raise ConfigError(
            f"{config.data.partition_file} is for {partition.num_workers} workers, this run has {num_workers}: "
            "set cluster.num_workers, or draw a new one"
        )
    return partition


def leave_partition(partition: Partition, dataset: Dataset, folder: Path, with_picture: bool) -> None:
    """Leaves partition.npz, its statistics (.json) and its picture (.png) in the folder."""
    labels = dataset.train.y
    statistics = save_partition(folder / "partition.npz", partition, labels, dataset.num_classes)
    if with_picture:
        counts = np.stack(
            [np.bincount(labels[share], minlength=dataset.num_classes) for share in partition.assignments]
        )
        title = f"{dataset.name}, {partition.text}"
        plot_partition(folder / "partition.png", counts, dataset.class_names, title, statistics.mean_kl_nats)


def _check_paces(config: RunConfig) -> None:
    """A list of paces is empty or has one entry per worker; both declarations or none; a fleet in their place."""
    cluster = config.cluster
    for key in ("slowdowns", "declared_compute_seconds_per_sample", "declared_transfer_seconds_per_sample"):
        length = len(getattr(cluster, key))
        if length not in (0, cluster.num_workers):
            raise ConfigError(
                f"cluster.{key} has {length} entries for {cluster.num_workers} workers: give none or one each"
            )
    if bool(cluster.declared_compute_seconds_per_sample) != bool(cluster.declared_transfer_seconds_per_sample):
        raise ConfigError(
            "declare both cluster.declared_compute_seconds_per_sample and cluster.declared_transfer_..., or none"
        )
    for profile in config.simulation.fleet:
        load_profile(profile)
    if config.simulation.fleet and (cluster.slowdowns or cluster.declared_compute_seconds_per_sample):
        raise ConfigError(
            "simulation.fleet says how fast the workers are: "
            "give no cluster.slowdowns and no cluster.declared_... beside it"
        )


def _run_threads(scene: Scene, partition: Partition, resume: bool, check: Callable[[], None]) -> dict[str, Any]:
    """The cluster as threads of this process over memory endpoints."""
    hub, stop, clock = MemoryHub(), StopFlag(), WallClock()
    endpoint = hub.server()
    device = resolve_device(scene.config.cluster.worker_device)
    profiles = profile_names(scene.config)
    threads = []
    for index, share in enumerate(partition.assignments):
        name = worker_name(index)
        emulated = EmulatedDevice(load_profile(profiles[index]), scene.config.seed, name) if profiles else None
        connect, pace_clock = throttled(hub.worker, clock, emulated)
        daemon = Daemon(
            DaemonSettings(name, once=True),
            connect,
            share_of(scene.dataset, share),
            device,
            clock,
            make_pace(pace_clock, *pace_of(scene.config, index), emulated),
            stop.is_set,
        )
        threads.append(threading.Thread(target=daemon.run, name=name, daemon=True))
    for thread in threads:
        thread.start()

    def watch() -> None:
        check()
        if not any(thread.is_alive() for thread in threads):
            raise QuorumError(f"all {len(threads)} worker threads have ended: see what they said above")

    try:
        return serve(scene, endpoint, resume, watch)
    finally:
        stop.set()
        for thread in threads:
            thread.join(FAREWELL_SECONDS)


def _run_processes(
    scene: Scene, partition: Partition, folder: Path, resume: bool, threads: int, check: Callable[[], None]
) -> dict[str, Any]:
    """The cluster as processes of this machine over tcp or ipc."""
    with local_address(scene.config.cluster.transport) as address:
        endpoint = bind(address)
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for index in range(len(partition.assignments)):
                name = worker_name(index)
                processes[name] = start_worker(scene.config, endpoint.address, folder, index, threads)
            pids = {name: process.pid for name, process in processes.items()}
            write_atomic(
                folder / "cluster.json",
                json.dumps(
                    {"address": endpoint.address, "ps_pid": os.getpid(), "worker_pids": pids}, indent=2
                ).encode(),
            )
            return serve(scene, endpoint, resume, watching(processes, folder, check))
        finally:
            end_workers(processes)
