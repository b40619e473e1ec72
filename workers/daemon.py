"""The worker daemon: registers, waits, works, reports, waits again; survives a restart of the parameter server."""

from __future__ import annotations

import logging
import math
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mergesfl
from mergesfl.data.sampling import Batches
from mergesfl.data.scale import Scale
from mergesfl.errors import ConfigError, MergeSFLError
from mergesfl.methods import find_method
from mergesfl.methods.base import Assignment
from mergesfl.models import build_model
from mergesfl.protocol.messages import PROTOCOL_VERSION, Assign, Ready, Register, Update, Welcome, round_of
from mergesfl.protocol.rules import check_worker_id
from mergesfl.runtime.arrays import arrays_to_state, state_to_arrays
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.devices import describe_device
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.split import SplitModel
from mergesfl.transport.base import WorkerEndpoint
from workers.exchange import TimedExchange
from workers.link import Link, RoundReleasedError, RunFinishedError, SessionLostError, StoppedError
from workers.local_data import LocalData
from workers.pace import Pace

# Cutting a torchvision network patches torch.nn while it traces (mergesfl/training/tracing.py): one thread at a time.
_BUILD_LOCK = threading.Lock()

WARM_UP_SAMPLES = 2  # enough to load the kernels, little enough for a slow device [ours]
RETRY_SECONDS = 1.0  # between the end of a session and the next registration


class WorkFailedError(MergeSFLError):
    """This worker could not compute its round: out of memory, or a state that does not fit the model."""


@dataclass(frozen=True)
class DaemonSettings:
    """Who this worker is and how it behaves; `once`: end after the first run instead of waiting for the next."""

    worker_id: str
    once: bool = False


class Daemon:
    """One worker.

    Args:
        settings: who it is.
        connect: opens a new connection to the parameter server.
        data: the private data.
        device: where the bottom runs.
        clock: the only source of time.
        pace: how durations are reported.
        should_stop: asked at every poll.
    """

    def __init__(
        self,
        settings: DaemonSettings,
        connect: Callable[[], WorkerEndpoint],
        data: LocalData,
        device: torch.device,
        clock: Clock,
        pace: Pace,
        should_stop: Callable[[], bool],
    ) -> None:
        check_worker_id(settings.worker_id)
        self._settings = settings
        self._connect = connect
        self._data = data
        self._run_data = data  # with labels and scale of the run
        self._device = device
        self._clock = clock
        self._pace = pace
        self._should_stop = should_stop
        self._log = logging.getLogger(f"workers.{settings.worker_id}")
        self._model: SplitModel | None = None
        self._model_key: tuple[object, ...] = ()
        self._seed = 0

    def run(self) -> None:
        """Serves runs until asked to stop (with `once`: until the first goodbye).

        Raises RefusedError, ConfigError, WorkFailedError.
        """
        while True:
            link = Link(self._connect(), self._clock, self._check)
            try:
                self._serve(link)
            except RunFinishedError as end:
                self._log.info("run finished: %s", end)
                if self._settings.once:
                    return
            except SessionLostError as loss:
                self._log.warning("session lost: %s; registering again", loss)
            except StoppedError:
                link.leave("stopped on this device")
                self._log.info("stopped")
                return
            except (ConfigError, WorkFailedError) as error:
                link.leave(f"cannot take part: {error}")
                raise
            finally:
                link.close()
            if self._pause():
                return

    def _pause(self) -> bool:
        """Waits a moment before the next registration; True when asked to stop meanwhile."""
        end_seconds = self._clock.now_seconds() + RETRY_SECONDS
        while self._clock.now_seconds() < end_seconds:
            if self._should_stop():
                return True
            self._clock.sleep(0.1)
        return False

    def _check(self) -> None:
        if self._should_stop():
            raise StoppedError("asked to stop")

    def _serve(self, link: Link) -> None:
        """One session, from registration to its end by exception."""
        data = self._data
        self._log.info("waiting for the parameter server; %d samples, labels %s", len(data.y), data.label_counts)
        link.send(
            Register(
                worker_id=self._settings.worker_id,
                protocol_version=PROTOCOL_VERSION,
                device=describe_device(self._device),
                versions={
                    "mergesfl": mergesfl.__version__,
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
                num_samples=len(data.y),
                label_counts=data.label_counts,
                class_names=data.class_names,
                sample_shape=data.sample_shape,
            )
        )
        welcome = link.receive()
        if not isinstance(welcome, Welcome):
            raise SessionLostError(f"expected Welcome, got {type(welcome).__name__}")
        feature_shape = self._build(welcome)
        link.send(Ready(feature_shape, 4 * int(torch.Size(feature_shape).numel())))
        self._log.info("registered: %s cut at %s, features %s", welcome.model, welcome.cut, feature_shape)
        while True:
            try:
                assign = link.receive()
                if not isinstance(assign, Assign):
                    raise SessionLostError(f"expected Assign, got {type(assign).__name__}")
                self._work(link, assign)
            except RoundReleasedError as release:
                self._log.warning("released from the round: %s", release)

    def _build(self, welcome: Welcome) -> tuple[int, ...]:
        """Builds the model once per kind and fits the data to the run; the shape of one sample at its cut."""
        if welcome.sample_shape != self._data.sample_shape:
            raise ConfigError(
                f"the run is for samples of shape {welcome.sample_shape}, this worker holds {self._data.sample_shape}: "
                "name the data set of the run with --dataset"
            )
        scale = Scale(welcome.divisor, welcome.mean, welcome.std, welcome.flip, welcome.crop_padding_pixels)
        self._run_data = self._data.relabelled(welcome.class_names).rescaled(scale, welcome.stored_type)
        num_classes = len(welcome.class_names)
        key = (welcome.model, welcome.cut, welcome.sample_shape, num_classes)
        if self._model is None or key != self._model_key:
            with _BUILD_LOCK:
                model = build_model(welcome.model, welcome.cut, welcome.sample_shape, num_classes, 0)
                try:
                    warm_up(model.bottom, welcome.sample_shape, self._device)
                except RuntimeError as error:
                    raise WorkFailedError(
                        f"the bottom of {welcome.model} cut at {welcome.cut} does not run on {self._device}: {error}"
                    ) from error
            self._model, self._model_key = model, key
        self._seed = welcome.seed
        return self._model.feature_shape(welcome.sample_shape)

    def _work(self, link: Link, assign: Assign) -> None:
        """One round: runs the method's `work` and reports. Raises RoundReleasedError and the ends of a session."""
        assert self._model is not None, "the model is built before the first assignment"
        data, worker_id, round_num = self._run_data, self._settings.worker_id, round_of(assign.round_num)
        generator = generator_for(self._seed, "batches", worker_id, round_num)
        batches = Batches(data.x, data.y, assign.batch_size, generator, data.scale, augment=True)
        exchange = TimedExchange(link, assign.round_num, assign.batch_size, self._clock, self._pace, self._device)
        assignment = Assignment(
            round_num=round_num,
            num_steps=assign.num_steps,
            batch_size=assign.batch_size,
            settings=assign.settings,
            state=arrays_to_state(assign.state),
            seed=seed_for(self._seed, "worker", worker_id, round_num),
        )
        try:
            (self._model.bottom if assign.num_exchanges else self._model).to(self._device)
            result = find_method(assign.method).work(self._model, assignment, self._on_device(batches), exchange)
        except (RuntimeError, ValueError, KeyError) as error:  # out of memory, or a state that does not fit the model
            raise WorkFailedError(f"round {round_num + 1} failed on this worker: {error}") from error
        exchange.finish(assign.num_steps)
        link.send(
            Update(
                round_num=assign.round_num,
                num_samples=result.num_samples,
                compute_seconds=exchange.compute_seconds,
                transfer_seconds=exchange.transfer_seconds,
                state=state_to_arrays(result.state),
                metrics={name: value for name, value in result.metrics.items() if math.isfinite(value)},
            )
        )
        self._log.info(
            "round %d: %d samples, compute %.3f s, transfer %.3f s",
            round_num + 1,
            result.num_samples,
            exchange.compute_seconds,
            exchange.transfer_seconds,
        )

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches on the worker's device; also the place where a long local round notices a wish to stop."""
        for x, y in batches:
            self._check()
            yield x.to(self._device), y.to(self._device)


def warm_up(bottom: nn.Module, sample_shape: tuple[int, ...], device: torch.device) -> None:
    """Moves the bottom to the device and runs it once, forward and backward, so that no observation pays for loading.

    In evaluation mode and without an optimizer: parameters, buffers, gradients and generators stay as they are.
    Raises RuntimeError when the device cannot do it.
    """
    bottom.to(device).eval()
    z = bottom(torch.zeros(WARM_UP_SAMPLES, *sample_shape, device=device))  # (WARM_UP_SAMPLES, F...)
    if z.requires_grad:  # else the bottom has nothing to train
        parameters = [parameter for parameter in bottom.parameters() if parameter.requires_grad]
        torch.autograd.grad(z.sum(), parameters, allow_unused=True)
    bottom.train()
