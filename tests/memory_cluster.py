"""A whole cluster in one thread on a clock moved by hand, and one of real daemons in threads; both over memory.

In the scripted cluster the parameter server is the real one; its workers answer as honest ones do (with random
features) unless a test's script says otherwise. Time passes only while the server waits: the clock then jumps to the
next thing that happens. So a deadline of a minute costs nothing, and every run is the same.

Legend: d samples of one worker's step, C classes, F... shape of one sample at the cut.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mergesfl.config import RunConfig, load_config
from mergesfl.errors import RemoteProtocolError
from mergesfl.parts import part_bytes, part_sizes
from mergesfl.protocol.codec import decode, encode, wire_bytes
from mergesfl.protocol.coding import PLAIN, RunCodecs
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Assign,
    Echo,
    Features,
    Goodbye,
    Gradient,
    Message,
    Probe,
    Ready,
    Refuse,
    Register,
    Report,
    Reset,
    Survey,
    Update,
    Welcome,
    round_of,
)
from mergesfl.runtime.checkpoint import Checkpoint, load_checkpoint
from mergesfl.runtime.clock import WallClock
from mergesfl.seeding import generator_for
from mergesfl.transport.base import Frames, ServerEndpoint
from mergesfl.transport.memory import MemoryHub
from ps.evaluator import BackgroundEvaluator, InlineEvaluator
from ps.progress import Progress
from ps.recorder import prepare_folder
from ps.run import serve, set_scene
from workers.daemon import Daemon, DaemonSettings
from workers.local_data import share_of
from workers.pace import DeclaredPace

SAMPLE_SHAPE = (1, 8, 8)
FEATURE_SHAPE = (32, 2, 2)  # of the model "cnn" at its default cut: two pools halve 8 x 8 twice
FEATURE_BYTES = 4 * 32 * 2 * 2
CLASS_NAMES = ("0", "1", "2")
NUM_CLASSES = len(CLASS_NAMES)
# What differs between any two runs.
MEASURED = {"survey_seconds", "planning_seconds", "round_seconds", "evaluation_seconds", "waiting_seconds"}
NAMES = ("worker-00", "worker-01", "worker-02")


def write_dataset(folder: Path, num_train: int = 60) -> Path:
    """An npz of 8 x 8 images of C = 3 classes, told apart by which third of the rows is bright."""
    rng = np.random.default_rng(0)

    def split(num_samples: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        y = np.arange(num_samples) % NUM_CLASSES  # (n,)
        x = rng.normal(0.0, 0.3, (num_samples, *SAMPLE_SHAPE)).astype(np.float32)  # (n, 1, 8, 8)
        for label in range(NUM_CLASSES):
            x[y == label, :, 3 * label : 3 * label + 2] += 1.0
        return x, y

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bars.npz"
    (x_train, y_train), (x_test, y_test) = split(num_train), split(30)
    np.savez(path, X_train=x_train, y_train=y_train, X_test=x_test, y_test=y_test)
    return path


def small_config(folder: Path, *settings: str) -> RunConfig:
    """Three workers, tau = 2, batches of 8, a checkpoint after every round, nothing drawn; settings come on top."""
    return load_config(
        None,
        [
            *(f"output.folder={folder}", f"data.dataset=npz:{write_dataset(folder)}", "data.partition=iid"),
            *("training.num_rounds=3", "training.local_steps=2", "training.batch_size=8"),
            *("cluster.num_workers=3", "cluster.transport=memory", "cluster.device=cpu", "cluster.worker_device=cpu"),
            *("cluster.ps_threads=1", "cluster.worker_threads=1", "output.checkpoint_every_rounds=1"),
            *("output.plots=false", "output.export=false", "output.tensorboard=false"),
            *settings,
        ],
    )


def journal_of(config: RunConfig) -> list[dict[str, Any]]:
    """The lines of the journal."""
    return [json.loads(line) for line in (config.run_folder / "journal.jsonl").read_text().splitlines()]


def without(lines: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The lines without some of their keys."""
    return [{key: value for key, value in line.items() if key not in keys} for line in lines]


def checkpoint_of(config: RunConfig) -> Checkpoint:
    """The newest checkpoint."""
    return load_checkpoint(config.run_folder / "checkpoints")


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    """Equal names and equal bits."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


class HandClock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now_seconds(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += max(seconds, 0.0)


class FastClock:
    """Real time, 20 times faster: what waits for seconds waits for hundredths."""

    def __init__(self) -> None:
        self._clock = WallClock()

    def now_seconds(self) -> float:
        return 20 * self._clock.now_seconds()

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds / 20)


@dataclass(frozen=True)
class Logged:
    """One message that passed the server's endpoint; None: bytes that are no message."""

    direction: str  # "in" or "out"
    peer: bytes
    message: Message | None
    num_bytes: int
    seconds: float


class LoggedEndpoint:
    """The server's endpoint, with an account of its own of what passed."""

    def __init__(self, inner: ServerEndpoint, clock: HandClock | WallClock) -> None:
        self._inner = inner
        self._clock = clock
        self.log: list[Logged] = []

    @property
    def address(self) -> str:
        return self._inner.address

    def send(self, peer: bytes, frames: Frames) -> None:
        self._inner.send(peer, frames)
        self._note("out", peer, frames)

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        arrived = self._inner.recv(timeout_seconds)
        if arrived is not None:
            self._note("in", *arrived)
        return arrived

    def close(self) -> None:
        self._inner.close()

    def count(self, direction: str, *kinds: type[Message]) -> int:
        """How many messages of these kinds passed."""
        return sum(one.direction == direction and isinstance(one.message, kinds) for one in self.log)

    def _note(self, direction: str, peer: bytes, frames: Frames) -> None:
        try:
            message = decode(frames)
        except RemoteProtocolError:
            message = None
        self.log.append(Logged(direction, peer, message, wire_bytes(frames), self._clock.now_seconds()))


Script = Callable[["ScriptedWorker", Message], "Message | None"]


class ScriptedWorker:
    """A worker without a thread: `act` sends what is due, then reads and answers.

    `script` sees each answer before it is sent and returns what to send instead; None sends nothing (the script may
    have called `say` with a delay, or closed the endpoint).
    """

    def __init__(
        self,
        hub: MemoryHub,
        clock: HandClock,
        worker_id: str,
        label_counts: tuple[int, ...] = (8, 8, 4),
        seconds_per_sample: float = 0.001,
        script: Script = lambda worker, answer: answer,
    ) -> None:
        self.worker_id = worker_id
        self.heard: list[Message] = []
        self.script = script
        self.ended = False
        self.deaf_until_seconds = 0.0  # a worker that computes does not read
        self.dies_at_seconds = float("inf")
        self._clock = clock
        self._seconds_per_sample = seconds_per_sample
        self._outbox: list[tuple[float, Frames]] = []
        self.codecs = PLAIN
        self._assign: Assign | None = None
        self._survey: Survey | None = None
        self.endpoint = hub.worker()
        self.say(registration(worker_id, label_counts))

    def say(self, message: Message | Frames, delay_seconds: float = 0.0) -> None:
        """Sends a message, or any frames, after so much time."""
        frames: Frames = message if isinstance(message, Sequence) else encode(message)
        self._outbox.append((self._clock.seconds + delay_seconds, frames))

    def vanish(self) -> None:
        """The process dies: its end of the connection is gone."""
        self.endpoint.close()
        self.ended = True

    def next_seconds(self) -> float:
        """When it has something to do again."""
        now_seconds = self._clock.seconds
        if self.ended:
            return float("inf")
        later = [self.dies_at_seconds, *([self.deaf_until_seconds] if self.deaf_until_seconds > now_seconds else [])]
        return min([max(due, now_seconds) for due, _ in self._outbox] + later, default=float("inf"))

    def act(self) -> None:
        if self._clock.seconds >= self.dies_at_seconds and not self.ended:
            self.vanish()
        if self.ended:
            return
        due = [entry for entry in self._outbox if entry[0] <= self._clock.seconds]
        self._outbox = [entry for entry in self._outbox if entry not in due]
        for _, frames in due:
            assert self.endpoint.send(frames)
        while not self.ended and self._clock.seconds >= self.deaf_until_seconds:
            frames_in = self.endpoint.recv(0.0)
            if frames_in is None:
                return
            message = decode(frames_in)
            self.heard.append(message)
            self._answer(message)

    def told(self, kind: type[Message]) -> list[Any]:
        """What it was told of one kind."""
        return [message for message in self.heard if isinstance(message, kind)]

    def _answer(self, message: Message) -> None:
        honest: list[Message] = []
        if isinstance(message, Refuse | Reset | Goodbye):
            self.ended = True
        elif isinstance(message, Welcome):
            self.codecs = RunCodecs.of(message)
            honest = [Ready(FEATURE_SHAPE, self.codecs.feature_bytes(FEATURE_SHAPE))]
        elif isinstance(message, Survey):
            self._survey = message
            sizes = part_bytes(message.probe_bytes, message.num_probe_samples, message.parts_per_step)
            honest = [Probe(message.round_num, np.zeros(size, np.uint8), part) for part, size in enumerate(sizes)]
        elif isinstance(message, Echo):
            assert self._survey is not None
            if message.part == len(part_sizes(self._survey.num_probe_samples, self._survey.parts_per_step)) - 1:
                honest = [Report(message.round_num, self._seconds_per_sample, 0.0005)]
        elif isinstance(message, Assign):
            self._assign = message
            honest = self._features(0) if message.num_exchanges else [self._update()]
        elif isinstance(message, Gradient):
            assert self._assign is not None
            step = message.step + 1
            if message.part == len(part_sizes(self._assign.batch_size, self._assign.parts_per_step)) - 1:
                honest = self._features(step) if step < self._assign.num_exchanges else [self._update()]
        for one in honest:
            answer = None if self.ended else self.script(self, one)
            if answer is not None and not self.ended:
                self.say(answer)
                self.act()

    def _features(self, step: int) -> list[Message]:
        """Random, but the same for every attempt at this step of this round: (d, F...) and (d,), in its parts."""
        assign = self._assign
        assert assign is not None
        rng = generator_for(7, self.worker_id, round_of(assign.round_num), step)
        features = rng.standard_normal((assign.batch_size, *FEATURE_SHAPE)).astype(np.float32)
        labels = rng.integers(0, NUM_CLASSES, assign.batch_size)
        ends = np.cumsum(part_sizes(assign.batch_size, assign.parts_per_step))[:-1]
        parts = zip(np.split(features, ends), np.split(labels, ends), strict=True)
        return [
            self.codecs.encode_features(Features(assign.round_num, step, z, y, part=part), self.worker_id)
            for part, (z, y) in enumerate(parts)
        ]

    def _update(self) -> Update:
        """The state it was given, moved a little in a direction of its own."""
        assign = self._assign
        assert assign is not None
        rng = generator_for(7, self.worker_id, round_of(assign.round_num), "update")
        state = {
            name: array + rng.normal(0, 0.01, array.shape).astype(array.dtype) if array.dtype.kind == "f" else array
            for name, array in self.codecs.decode_assign(assign).items()
        }
        num_samples = assign.batch_size * assign.num_steps
        compute_seconds = num_samples * self._seconds_per_sample
        seconds = (compute_seconds, num_samples * 0.0005)
        update = Update(assign.round_num, num_samples, *seconds, state, {"loss_nats": 1.0})
        return self.codecs.encode_update(update, self.worker_id)


def registration(worker_id: str, label_counts: tuple[int, ...] = (8, 8, 4), **changes: Any) -> Register:
    """An honest registration, with changes; the names of the classes are their numbers."""
    names = tuple(str(label) for label in range(len(label_counts)))
    versions = {"mergesfl": "0.1.0"}
    honest = Register(
        worker_id, PROTOCOL_VERSION, "cpu", versions, sum(label_counts), label_counts, names, SAMPLE_SHAPE
    )
    return dataclasses.replace(honest, **changes)


def welcome(seed: int, **changes: Any) -> Welcome:
    """What the server tells the workers of the small run, with changes."""
    scale, codecs = ("float32", 1.0, (), (), False, 0), ("fp32", "fp32", "fp32")
    return dataclasses.replace(Welcome("cnn", "conv2", CLASS_NAMES, SAMPLE_SHAPE, seed, *scale, *codecs), **changes)


class ScriptedCluster:
    """The real server, scripted workers, one hand-moved clock."""

    def __init__(self, config: RunConfig, names: Sequence[str] = NAMES) -> None:
        self.config = config
        self.hub = MemoryHub()
        self.clock = HandClock()
        self.endpoint = LoggedEndpoint(_Driven(self), self.clock)
        self.workers: list[ScriptedWorker] = []
        for index, name in enumerate(names):
            self.add(name, seconds_per_sample=0.001 * (index + 1))

    def add(self, worker_id: str, **details: Any) -> ScriptedWorker:
        """One more worker."""
        self.workers.append(ScriptedWorker(self.hub, self.clock, worker_id, **details))
        return self.workers[-1]

    def __getitem__(self, worker_id: str) -> ScriptedWorker:
        return next(worker for worker in self.workers if worker.worker_id == worker_id)

    def run(self, resume: bool = False, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The whole run; afterwards every worker has read what it was told."""
        prepare_folder(self.config, resume)
        scene = set_scene(self.config, "iid", self.clock, Progress(Console(quiet=True)))
        try:
            return serve(scene, self.endpoint, resume, check, make_evaluator=InlineEvaluator)
        finally:
            for worker in self.workers:
                worker.deaf_until_seconds = 0.0
                worker.act()


class _Driven:
    """The hub's server; while it waits, the workers act and the clock moves."""

    def __init__(self, cluster: ScriptedCluster) -> None:
        self._cluster = cluster
        self._server = cluster.hub.server()
        self.address = self._server.address

    def send(self, peer: bytes, frames: Frames) -> None:
        self._server.send(peer, frames)

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        clock = self._cluster.clock
        end_seconds = clock.seconds + timeout_seconds
        while True:
            for worker in self._cluster.workers:
                worker.act()
            arrived = self._server.recv(0.0)
            next_seconds = min(worker.next_seconds() for worker in self._cluster.workers)
            if arrived is not None or next_seconds > end_seconds:
                clock.seconds = clock.seconds if arrived is not None else end_seconds
                return arrived
            clock.seconds = next_seconds

    def close(self) -> None:
        self._server.close()


def at(round_num: int, step: int | None, act: Script, part: int | None = None) -> Script:
    """A script that acts on the features of one step of one round, or (step None) on its update; honest otherwise.

    part: acts on this part of the step alone.
    """

    def script(worker: ScriptedWorker, answer: Message) -> Message | None:
        if isinstance(answer, Features):
            is_it = round_of(answer.round_num) == round_num and answer.step == step and part in (None, answer.part)
        else:
            is_it = isinstance(answer, Update) and step is None and round_of(answer.round_num) == round_num
        return act(worker, answer) if is_it else answer

    return script


def late(seconds: float) -> Script:
    """Answers so much later, and reads nothing meanwhile."""

    def act(worker: ScriptedWorker, answer: Message) -> None:
        worker.say(answer, seconds)
        worker.deaf_until_seconds = worker._clock.seconds + seconds

    return act


def play_daemons(
    config: RunConfig,
    shares: Sequence[np.ndarray[Any, Any]],
    resume: bool = False,
    check: Callable[[LoggedEndpoint], None] = lambda endpoint: None,
    make_evaluator: type[BackgroundEvaluator] | type[InlineEvaluator] = BackgroundEvaluator,
    sender_thread: bool = False,
) -> LoggedEndpoint:
    """A run of real daemons, one thread each, that hold these rows of the training set; returns the account of it."""
    prepare_folder(config, resume)
    hub, clock, stop = MemoryHub(), WallClock(), threading.Event()
    scene = set_scene(config, "by hand", clock, Progress(Console(quiet=True)))
    endpoint = LoggedEndpoint(hub.server(), clock)
    threads = []
    for index, share in enumerate(shares):
        daemon = Daemon(
            DaemonSettings(f"worker-{index:02d}", once=True, sender_thread=sender_thread),
            hub.worker,
            share_of(scene.dataset, share),
            torch.device("cpu"),
            clock,
            DeclaredPace(0.001 * (index + 1), 0.0005),
            stop.is_set,
        )
        threads.append(threading.Thread(target=daemon.run, daemon=True))
    for thread in threads:
        thread.start()
    try:
        serve(scene, endpoint, resume, lambda: check(endpoint), make_evaluator=make_evaluator)
    finally:
        for thread in threads:
            thread.join(10)  # the goodbye ends them; no daemon needs to be told to stop
        stop.set()
        assert not any(thread.is_alive() for thread in threads)
    return endpoint
