"""The worker daemon: registers, waits, works, reports, waits again; survives a restart of the parameter server."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import mergesfl
from mergesfl.data.sampling import Batches
from mergesfl.data.scale import Scale
from mergesfl.errors import ConfigError, RemoteProtocolError
from mergesfl.methods import find_method
from mergesfl.methods.base import Assignment
from mergesfl.protocol.coding import PLAIN, RunCodecs
from mergesfl.protocol.messages import PROTOCOL_VERSION, Assign, Ready, Register, Survey, Update, Welcome, round_of
from mergesfl.protocol.rules import check_worker_id
from mergesfl.runtime.arrays import Array, arrays_to_state, state_to_arrays
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.devices import describe_device
from mergesfl.runtime.patience import REAL, Patience
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.placement import place
from mergesfl.transport.base import WorkerEndpoint
from workers.exchange import TimedExchange
from workers.link import Link, RoundReleasedError, RunFinishedError, SessionLostError, StoppedError
from workers.local_data import LocalData
from workers.models import ModelSource, OwnModel, WorkFailedError
from workers.pace import Pace
from workers.prefetch import Prefetched
from workers.sender import Sender
from workers.survey import SelfSurvey

RETRY_SECONDS = 1.0  # between the end of a session and the next registration


@dataclass(frozen=True)
class DaemonSettings:
    """Who this worker is and how it behaves.

    Attributes:
        once: end after the first run instead of waiting for the next.
        sender_thread: encode and send beside computing. Not beside a throttle: encoding would not be slowed, and a
            throttled link (workers/throttle.py) is moved by the computing thread.
    """

    worker_id: str
    once: bool = False
    sender_thread: bool = False


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
        models: where its network comes from; None: one of its own.
        patience: how often to look around while it waits.
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
        models: ModelSource | None = None,
        patience: Patience = REAL,
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
        self._models: ModelSource = models or OwnModel()
        self._patience = patience
        self._seed = 0
        self._codecs = PLAIN

    def run(self) -> None:
        """Serves runs until asked to stop (with `once`: until the first goodbye).

        Raises RefusedError, ConfigError, WorkFailedError.
        """
        while True:
            link = Link(self._connect(), self._clock, self._check, self._patience)
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
        link.send(Ready(feature_shape, self._codecs.feature_bytes(feature_shape)))
        self._log.info("registered: %s cut at %s, features %s", welcome.model, welcome.cut, feature_shape)
        while True:
            try:
                message = link.receive()
                if isinstance(message, Assign):
                    self._work(link, message)
                elif isinstance(message, Survey):
                    self._answer(link, message)
                else:
                    raise SessionLostError(f"expected Assign or Survey, got {type(message).__name__}")
            except RoundReleasedError as release:
                self._log.warning("released from the round: %s", release)

    def _build(self, welcome: Welcome) -> tuple[int, ...]:
        """Fits the data to the run and builds the model; the shape of one sample at its cut."""
        if welcome.sample_shape != self._data.sample_shape:
            raise ConfigError(
                f"the run is for samples of shape {welcome.sample_shape}, this worker holds {self._data.sample_shape}: "
                "name the data set of the run with --dataset"
            )
        scale = Scale(welcome.divisor, welcome.mean, welcome.std, welcome.flip, welcome.crop_padding_pixels)
        self._run_data = self._data.relabelled(welcome.class_names).rescaled(scale, welcome.stored_type)
        self._seed = welcome.seed
        self._codecs = RunCodecs.of(welcome)
        return self._models.prepare(welcome, self._device)

    def _work(self, link: Link, assign: Assign) -> None:
        """One round: runs the method's `work` and reports. Raises RoundReleasedError and the ends of a session."""
        data, worker_id, round_num = self._run_data, self._settings.worker_id, round_of(assign.round_num)
        generator = generator_for(self._seed, "batches", worker_id, round_num)
        batches = Batches(data.x, data.y, assign.batch_size, generator, data.scale, augment=True)
        prefetched = Prefetched(self._on_device(batches), assign.num_steps)
        assignment = Assignment(
            round_num=round_num,
            num_steps=assign.num_steps,
            batch_size=assign.batch_size,
            settings=assign.settings,
            state=arrays_to_state(self._state_of(assign)),
            seed=seed_for(self._seed, "worker", worker_id, round_num),
            parts_per_step=assign.parts_per_step,
        )
        try:
            work = find_method(assign.method).work
            self._pace.begin_round(round_num, lambda: self._models.work_flops(assign.method, work, assignment))
            sender = Sender(link, self._codecs, worker_id, self._settings.sender_thread)
            exchange = TimedExchange(
                link,
                assign.round_num,
                assign.batch_size,
                self._clock,
                self._pace,
                self._device,
                self._codecs,
                sender,
                prefetched.prepare,
            )
            with sender, self._models.lend() as model:
                place(model.bottom if assign.num_exchanges else model, self._device)
                result = work(model, assignment, prefetched, exchange)
        except (RuntimeError, ValueError, KeyError) as error:  # out of memory, or a state that does not fit the model
            raise WorkFailedError(f"round {round_num + 1} failed on this worker: {error}") from error
        exchange.finish(assign.num_steps)
        update = Update(
            round_num=assign.round_num,
            num_samples=result.num_samples,
            compute_seconds=exchange.compute_seconds,
            transfer_seconds=exchange.transfer_seconds,
            state=state_to_arrays(result.state),
            metrics={name: value for name, value in result.metrics.items() if math.isfinite(value)},
        )
        link.send(self._codecs.encode_update(update, worker_id))
        self._log.info(
            "round %d: %d samples, compute %.3f s, transfer %.3f s",
            round_num + 1,
            result.num_samples,
            exchange.compute_seconds,
            exchange.transfer_seconds,
        )

    def _state_of(self, assign: Assign) -> Mapping[str, Array]:
        """The state to start from. Raises SessionLostError: it is not of the run's codec."""
        try:
            return self._codecs.decode_assign(assign)
        except RemoteProtocolError as error:
            raise SessionLostError(f"the server {error}") from error

    def _answer(self, link: Link, survey: Survey) -> None:
        """Measures one step and reports. Raises like `_work`."""
        data, round_num = self._run_data, round_of(survey.round_num)
        generator = generator_for(self._seed, "survey", self._settings.worker_id, round_num)
        batches = Batches(data.x, data.y, survey.num_samples, generator, data.scale, augment=True)
        measured = SelfSurvey(link, self._clock, self._pace, self._device, self._models)
        try:
            report = measured.report(survey, self._on_device(batches))
        except (RuntimeError, ValueError) as error:
            raise WorkFailedError(f"the survey of round {round_num + 1} failed on this worker: {error}") from error
        link.send(report)

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches on the worker's device; also the place where a long local round notices a wish to stop."""
        for x, y in batches:
            self._check()
            yield x.to(self._device), y.to(self._device)
