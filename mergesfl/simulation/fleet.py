"""A simulated fleet: emulated devices, their network and the parameter server, on one virtual clock.

Everything that a real run computes is computed, in one thread; only the clock, the transport and the source of the
durations differ. What takes virtual time: forward and backward on the workers (counted FLOPs through their devices),
every message (its bytes through the worker's own link and the server's), and the merged step on the server (counted
FLOPs of the top). What takes none: planning, averaging and evaluating. [ours]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mergesfl.config import RunConfig
from mergesfl.data.partition import Partition
from mergesfl.errors import ConfigError, QuorumError
from mergesfl.methods import find_method
from mergesfl.processes import profile_names, worker_name
from mergesfl.runtime.emulation import BYTES_PER_MBIT, EmulatedDevice
from mergesfl.runtime.patience import VIRTUAL, VIRTUAL_WITH_LOSSES
from mergesfl.runtime.profiles import load_profile
from mergesfl.runtime.traces import read_availability, read_bandwidth
from mergesfl.simulation.endpoints import Network
from mergesfl.simulation.events import EventLoop
from mergesfl.simulation.models import SharedModels
from mergesfl.simulation.workers import VirtualWorker
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.split import SplitModel
from ps.evaluator import InlineEvaluator
from ps.run import Scene, serve
from workers.local_data import share_of
from workers.pace import EmulatedPace

NUM_WORKERS = 80  # of a configuration that does not say; the paper's testbed
FLEET = {"jetson-tx2": 30, "jetson-xavier-nx": 40, "jetson-agx-xavier": 10}  # [paper]


def with_fleet(config: RunConfig) -> RunConfig:
    """The configuration with what `simulate` assumes where it is silent: the paper's 80 devices."""
    cluster, simulation = config.cluster, config.simulation
    if "num_workers" not in cluster.model_fields_set:
        cluster = cluster.model_copy(update={"num_workers": sum(simulation.fleet.values()) or NUM_WORKERS})
    if not simulation.fleet:
        simulation = simulation.model_copy(update={"fleet": FLEET})
    return config.model_copy(update={"cluster": cluster, "simulation": simulation})


class VirtualFleet:
    """N emulated workers and the network between them and the parameter server.

    Args:
        scene: data, network and recorder of the run; its clock is the loop.
        partition: who holds which samples.
        loop: the virtual clock.
    Raises ConfigError for an unknown profile, a device that is too small for the bottom, or a trace that cannot be read
    or names an unknown worker.
    """

    def __init__(self, scene: Scene, partition: Partition, loop: EventLoop) -> None:
        config = scene.config
        self._scene = scene
        self._loop = loop
        simulation = config.simulation
        capacity_bytes_per_second = simulation.ps_link_mbit_per_second * BYTES_PER_MBIT
        self._network = Network(loop, capacity_bytes_per_second, capacity_bytes_per_second)
        trace = simulation.availability_trace
        self._availability = {} if trace is None else read_availability(trace)
        trace = simulation.bandwidth_trace
        self._bandwidth = {} if trace is None else read_bandwidth(trace)
        self._patience = VIRTUAL_WITH_LOSSES if self._availability else VIRTUAL
        profiles = {name: load_profile(name) for name in simulation.fleet}
        splits = find_method(config.method.name).splits
        trained = scene.network.bottom if splits else scene.network
        what, advice = (
            ("bottom", "cut the network earlier (model.cut)") if splits else ("network", "use a split method")
        )
        trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained.parameters())
        for name, profile in profiles.items():
            if 2 * trained_bytes > profile.memory_bytes:  # and its gradient
                raise ConfigError(
                    f"the {what} and its gradient take {2 * trained_bytes} bytes, a {name} has {profile.memory_bytes}: "
                    f"{advice}, or leave the device out of simulation.fleet"
                )
        models = SharedModels()
        self.workers = {
            worker_name(index): VirtualWorker(
                worker_name(index),
                share_of(scene.dataset, share),
                EmulatedDevice(profiles[profile], config.seed, worker_name(index)),
                loop,
                self._network,
                models,
                lambda device: EmulatedPace(device, loop),
                self._patience,
            )
            for index, (share, profile) in enumerate(zip(partition.assignments, profile_names(config), strict=True))
        }
        for name in (*self._availability, *self._bandwidth):
            if name not in self.workers:
                raise ConfigError(
                    f"a trace names the worker '{name}', this fleet has {worker_name(0)} to "
                    f"{worker_name(len(self.workers) - 1)}: change its column worker_id"
                )

    def begin_round(self, round_num: int) -> None:
        """Puts all devices in this round; each goes on by itself when it is assigned work."""
        for worker in self.workers.values():
            worker.device.begin_round(round_num)

    def serve(self, resume: bool, check: Callable[[], None]) -> dict[str, Any]:
        """Turns the devices on and runs the parameter server, as a process of the loop; returns the summary."""
        self._follow_traces()
        for name, worker in self.workers.items():
            if self._is_on_at_first(name):
                worker.turn_on()

        def watch() -> None:
            check()
            if not self._availability and not any(worker.is_on for worker in self.workers.values()):
                raise QuorumError(f"all {len(self.workers)} simulated workers have ended: see what they said above")

        scene = self._scene
        flops_per_sample = top_flops_per_sample(scene.network, scene.dataset.sample_shape)
        seconds_per_sample = flops_per_sample / scene.config.simulation.ps_flops_per_second

        def charge(num_samples: int) -> None:
            """Once through the top and back; what a method does more (mix-ups, a second backward) is free [ours]."""
            self._loop.sleep(num_samples * seconds_per_sample)

        return serve(scene, self._network.server(), resume, watch, self._patience, charge, InlineEvaluator)

    def _is_on_at_first(self, name: str) -> bool:
        """What the trace says at or before the beginning; a worker that it does not name is always on."""
        begin_seconds = self._loop.now_seconds()
        past = [available for seconds, available in self._availability.get(name, ()) if seconds <= begin_seconds]
        return past[-1] if past else True

    def _follow_traces(self) -> None:
        """Plans what the traces say, from now on."""
        begin_seconds = self._loop.now_seconds()
        for name, changes in self._availability.items():
            worker = self.workers[name]
            for seconds, available in changes:
                if seconds > begin_seconds:
                    self._loop.call_at(seconds, worker.turn_on if available else worker.turn_off)
        for name, rates in self._bandwidth.items():
            for seconds, bytes_per_second in rates:
                self._loop.call_at(seconds, self._set_rate(name, bytes_per_second))

    def _set_rate(self, name: str, bytes_per_second: float) -> Callable[[], None]:
        def set_rate() -> None:
            self.workers[name].device.set_link_bytes_per_second(bytes_per_second)
            self._network.rates_changed()

        return set_rate


def top_flops_per_sample(network: SplitModel, sample_shape: tuple[int, ...]) -> float:
    """Forward and backward of the top, down to the features, for one sample."""
    top = copy.deepcopy(network.top).cpu().train()
    seed_dropout(top, 0)
    num_samples = 2  # batch-norm refuses one
    features = torch.zeros(num_samples, *network.feature_shape(sample_shape), requires_grad=True)  # (2, F...)
    with FlopCounterMode(display=False) as counter:
        top(features).sum().backward()
    return float(counter.get_total_flops()) / num_samples
