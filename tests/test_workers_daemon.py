"""The daemon in a thread: against a server played by hand, and against the real one with all sorts of local data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.data import load_dataset, parse_partition, save_partition
from mergesfl.data.scale import IDENTITY, PIXELS
from mergesfl.errors import ConfigError, DataError
from mergesfl.methods import find_method
from mergesfl.methods.base import Exchange, WorkResult
from mergesfl.models import build_model
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Assign,
    Echo,
    Features,
    Goodbye,
    Gradient,
    Leave,
    Message,
    Ping,
    Pong,
    Probe,
    Ready,
    Refuse,
    Register,
    Release,
    Report,
    Reset,
    Survey,
    Update,
    Welcome,
    round_of,
)
from mergesfl.runtime.arrays import state_to_arrays
from mergesfl.seeding import generator_for
from mergesfl.transport.memory import MemoryHub, MemoryServer
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    CLASS_NAMES,
    FEATURE_BYTES,
    FEATURE_SHAPE,
    NUM_CLASSES,
    SAMPLE_SHAPE,
    FastClock,
    LoggedEndpoint,
    checkpoint_of,
    journal_of,
    play_daemons,
    same_tensors,
    small_config,
    welcome,
    without,
    write_dataset,
)
from workers import daemon as daemon_module
from workers import sender as sender_module
from workers import timing
from workers.daemon import Daemon, DaemonSettings
from workers.link import RefusedError
from workers.local_data import LocalData, load_local_data, share_of
from workers.models import WorkFailedError, warm_up
from workers.pace import DeclaredPace

torch.set_num_threads(1)

PATIENCE_SECONDS = 20.0  # a bound for a broken test, not a claim about speed
WELCOME = welcome(3)
SPLIT = 2  # exchanges
FEDERATED = 0


def some_data() -> LocalData:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, *SAMPLE_SHAPE)).astype(np.float32)  # (6, 1, 8, 8)
    return LocalData(x, np.array([0, 0, 1, 1, 1, 2]), IDENTITY, SAMPLE_SHAPE, CLASS_NAMES)


class Stage:
    """One daemon in a thread, and the server's end of a hub in the hands of the test."""

    def __init__(self, once: bool = False, data: LocalData | None = None, sender_thread: bool = False) -> None:
        self.hub = MemoryHub()
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.peers: list[bytes] = []  # of the registrations, in order
        self._server: MemoryServer | None = None
        daemon = Daemon(
            DaemonSettings("a", once, sender_thread),
            self.hub.worker,
            data or some_data(),
            torch.device("cpu"),
            FastClock(),
            DeclaredPace(0.01, 0.002),
            self.stop.is_set,
        )
        self._thread = threading.Thread(target=self._run, args=(daemon,), daemon=True)
        self._thread.start()

    def _run(self, daemon: Daemon) -> None:
        try:
            daemon.run()
        except Exception as error:
            self.error = error

    @property
    def server(self) -> MemoryServer:
        if self._server is None:
            self._server = self.hub.server()
        return self._server

    def restart_server(self) -> None:
        self.server.close()
        self._server = None

    def expect(self, kind: type[Message], peer: bytes | None = None) -> Any:
        """The next message that is no ping (unless a ping is expected); it must be of this kind."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            arrived = self.server.recv(0.05)
            if arrived is None:
                continue
            message = decode(arrived[1])
            if isinstance(message, Ping) and kind is not Ping:
                continue
            assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
            if isinstance(message, Register):
                self.peers.append(arrived[0])
            assert arrived[0] == (peer or self.peers[-1])
            return message
        raise AssertionError(f"no {kind.__name__} within {PATIENCE_SECONDS} s")

    def say(self, message: Message) -> None:
        self.server.send(self.peers[-1], encode(message))

    def join(self) -> None:
        self.expect(Register)
        self.say(WELCOME)
        self.expect(Ready)

    def ended(self) -> Exception | None:
        """Waits for the end of the thread; what it raised."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the daemon does not end"
        return self.error

    def close(self) -> None:
        self.stop.set()
        self._thread.join(PATIENCE_SECONDS)


@pytest.fixture
def stages() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(**details: Any) -> Stage:
        made.append(Stage(**details))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
        assert not stage._thread.is_alive()


def assign(wire_round: int, num_exchanges: int, num_steps: int = 2, method: str = "") -> Assign:
    model = build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0)
    state = model.bottom.state_dict() if num_exchanges else model.joined_state_dict()
    method = method or ("mergesfl" if num_exchanges else "fedavg")
    return Assign(wire_round, num_steps, num_exchanges, 4, method, {"learning_rate": 0.05}, state_to_arrays(state))


def answer(stage: Stage, features: Features) -> None:
    stage.say(Gradient(features.round_num, features.step, 0.0, np.full_like(features.features, 0.01)))


def test_an_id_that_the_server_would_refuse_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match=r"worker id '\[/x\]', expected a letter or digit"):
        Daemon(
            DaemonSettings("[/x]"),
            MemoryHub().worker,
            some_data(),
            torch.device("cpu"),
            FastClock(),
            DeclaredPace(0.01, 0.002),
            lambda: True,
        )


# One session.


def test_it_says_what_it_holds_builds_the_model_and_is_ready(stages: Callable[..., Stage]) -> None:
    stage = stages()
    register = stage.expect(Register)
    assert (register.worker_id, register.num_samples, register.label_counts) == ("a", 6, (2, 3, 1))
    assert (register.protocol_version, register.sample_shape) == (PROTOCOL_VERSION, SAMPLE_SHAPE)
    assert register.class_names == ("0", "1", "2")
    assert {"mergesfl", "torch", "python"} <= register.versions.keys()
    stage.say(WELCOME)
    assert stage.expect(Ready) == Ready(FEATURE_SHAPE, FEATURE_BYTES)


def test_a_split_round_is_plain_sgd_on_the_bottom_with_the_gradients_it_gets(stages: Callable[..., Stage]) -> None:
    """Against plain torch: the batches of the stream ("batches", id, round), two steps of w <- w - 0.05 * J^T g."""
    stage = stages()
    stage.join()
    stage.say(assign(700, SPLIT))
    bottom = build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0).bottom
    data = some_data()
    order = generator_for(3, "batches", "a", 7)
    rows = np.concatenate([order.permutation(6), order.permutation(6)])  # two batches of 4 from epochs of 6
    for step in range(2):
        features = stage.expect(Features)
        assert (features.round_num, features.step) == (700, step)
        batch = rows[4 * step : 4 * step + 4]
        z = bottom(torch.from_numpy(data.x[batch]))  # (4, 32, 2, 2)
        np.testing.assert_allclose(features.features, z.detach().numpy(), atol=1e-6)
        np.testing.assert_array_equal(features.labels, data.y[batch])
        gradients = torch.autograd.grad(z, list(bottom.parameters()), torch.full_like(z, 0.01))
        with torch.no_grad():
            for parameter, gradient in zip(bottom.parameters(), gradients, strict=True):
                parameter.sub_(0.05 * gradient)
        answer(stage, features)
    update = stage.expect(Update)
    assert (update.round_num, update.num_samples, dict(update.metrics)) == (700, 8, {})
    assert update.compute_seconds == pytest.approx(0.01 * 8)
    assert update.transfer_seconds == pytest.approx(0.002 * 8)
    for name, tensor in bottom.state_dict().items():
        np.testing.assert_allclose(update.state[name], tensor.numpy(), atol=1e-6)


def test_a_repeated_round_draws_the_same_batches_and_another_round_others(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    seen = []
    for wire_round in (700, 701, 800):  # round 7 twice, then round 8
        stage.say(assign(wire_round, SPLIT))
        features = stage.expect(Features)
        seen.append(features.features)
        stage.say(Release(wire_round, "void"))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


def test_a_federated_round_reports_its_mean_loss(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(assign(100, FEDERATED))
    update = stage.expect(Update)
    assert update.num_samples == 8
    assert update.transfer_seconds == 0.0
    assert 0.1 < update.metrics["loss_nats"] < 3.0  # near ln 3 = 1.1 before any training
    assert update.state.keys() == build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0).joined_state_dict().keys()


def survey(wire_round: int, whole_network: bool = False) -> Survey:
    return Survey(wire_round, 8, whole_network, 8, 5000, 5000)


@pytest.mark.parametrize("whole_network", [False, True])
def test_a_survey_is_answered_and_the_round_that_follows_is_the_same(
    stages: Callable[..., Stage], whole_network: bool
) -> None:
    """8 of its 6 samples; then the features of the round, to the bit those of a worker that was not surveyed."""
    features = []
    for is_surveyed in (False, True):
        stage = stages()
        stage.join()
        if is_surveyed:
            stage.say(survey(700, whole_network))
            probe = stage.expect(Probe)
            assert (probe.round_num, probe.payload.shape, probe.payload.any()) == (700, (5000,), False)
            stage.say(Echo(700, 0.0, probe.payload))
            assert stage.expect(Report) == Report(700, pytest.approx(0.01), pytest.approx(0.002))
        stage.say(assign(701, SPLIT))
        features.append(stage.expect(Features).features)
        stage.close()
    np.testing.assert_array_equal(*features)


def test_a_worker_that_is_released_from_a_survey_takes_the_assignment(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(survey(700))
    stage.expect(Probe)
    stage.say(Release(700, "too late"))
    stage.say(assign(701, SPLIT))
    assert stage.expect(Features).round_num == 701
    assert len(stage.peers) == 1  # the same session


def test_a_released_worker_takes_the_next_assignment(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(assign(100, SPLIT))
    stage.expect(Features)
    stage.say(Release(100, "too late"))
    stage.say(assign(200, SPLIT, num_steps=1))
    features = stage.expect(Features)
    assert features.round_num == 200
    assert len(stage.peers) == 1  # the same session


def test_labels_are_matched_by_name_and_all_workers_share_the_scale_of_the_run(stages: Callable[..., Stage]) -> None:
    """The run: 0 = bed, 1 = cat, 2 = zero, stored as 0..16. This worker calls cat 0 and zero 1, and stores 16 only."""
    x = np.full((4, *SAMPLE_SHAPE), 16, np.uint8)
    data = LocalData(x, np.array([0, 1, 0, 0]), PIXELS, SAMPLE_SHAPE, ("cat", "zero"))
    stage = stages(data=data)
    assert stage.expect(Register).class_names == ("cat", "zero")
    facts: dict[str, Any] = {"stored_type": "uint8", "divisor": 16.0, "mean": (0.5,), "std": (0.25,)}
    stage.say(replace(WELCOME, class_names=("bed", "cat", "zero"), **facts))
    stage.expect(Ready)
    stage.say(assign(100, SPLIT))
    features = stage.expect(Features)
    assert sorted(features.labels) == [1, 1, 1, 2]
    bottom = build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0).bottom
    z = bottom(torch.full((4, *SAMPLE_SHAPE), 2.0))  # (16 / 16 - 0.5) / 0.25
    np.testing.assert_allclose(features.features, z.detach().numpy(), atol=1e-6)
    stage.say(Reset("who are you?"))
    assert stage.expect(Register).class_names == ("cat", "zero")  # the next run may be another one


def test_a_worker_without_samples_takes_part_however_they_would_be_stored(stages: Callable[..., Stage]) -> None:
    nothing = LocalData(np.zeros((0, *SAMPLE_SHAPE), np.float32), np.zeros(0, np.int64), IDENTITY, SAMPLE_SHAPE, ())
    stage = stages(data=nothing)
    assert stage.expect(Register).label_counts == ()
    stage.say(replace(WELCOME, stored_type="uint8"))
    stage.expect(Ready)


def test_only_the_part_that_is_trained_goes_to_the_device(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    move = torch.nn.Module.to

    def to(module: torch.nn.Module, *where: Any, **how: Any) -> torch.nn.Module:
        moved.append(type(module).__name__)
        return move(module, *where, **how)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    stage = stages()
    stage.join()
    stage.say(assign(100, SPLIT))
    for _ in range(2):
        answer(stage, stage.expect(Features))
    stage.expect(Update)
    assert set(moved) == {"Half"}
    stage.say(assign(200, FEDERATED, num_steps=1))
    stage.expect(Update)
    assert moved[-1] == "SplitModel"


def test_the_warm_up_changes_nothing() -> None:
    """M5 has batch-norm, whose statistics a pass in training mode would change."""
    shape = (1, 8000)
    bottom = build_model("m5", "block3", shape, NUM_CLASSES, 0).bottom
    before = {name: tensor.clone() for name, tensor in bottom.state_dict().items()}
    passes = []
    bottom.register_forward_hook(lambda module, x, z: passes.append((tuple(x[0].shape), z.requires_grad)))
    random_state = torch.get_rng_state()
    warm_up(bottom, shape, torch.device("cpu"))
    assert passes == [((2, *shape), True)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bottom.state_dict().items())
    assert all(parameter.grad is None for parameter in bottom.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in bottom.modules())


def test_a_device_that_cannot_run_the_bottom_is_named(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("workers.models.warm_up", fail)
    stage = stages()
    stage.expect(Register)
    stage.say(WELCOME)
    assert "the bottom of cnn cut at conv2 does not run on cpu: out of memory" in stage.expect(Leave).reason
    assert isinstance(stage.ended(), WorkFailedError)


# Many sessions.


def test_it_waits_for_a_server_that_is_not_there_yet(stages: Callable[..., Stage]) -> None:
    stage = stages()
    time.sleep(0.3)
    assert stage.error is None
    stage.join()  # the server is made here


@pytest.mark.parametrize("is_working", [False, True])
def test_after_a_reset_it_registers_again_over_a_new_connection(stages: Callable[..., Stage], is_working: bool) -> None:
    stage = stages()
    stage.join()
    if is_working:
        stage.say(assign(100, SPLIT))
        stage.expect(Features)
    stage.say(Reset("who are you?"))
    stage.join()
    assert len(set(stage.peers)) == 2
    stage.say(assign(100, SPLIT))
    assert stage.expect(Features).round_num == 100  # a new session may use the number again


def test_a_restarted_server_is_noticed_by_the_pings(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(assign(100, SPLIT))
    stage.expect(Features)
    stage.restart_server()
    old = stage.peers[-1]
    stage.expect(Ping, old)
    stage.say(Reset("who are you?"))
    stage.join()
    assert stage.peers[-1] != old


@pytest.mark.parametrize("message", [Pong(), Goodbye("done")])
def test_without_once_a_finished_run_is_followed_by_the_next(stages: Callable[..., Stage], message: Message) -> None:
    stage = stages()
    stage.join()
    stage.say(message)
    if isinstance(message, Pong):
        stage.say(Goodbye("done"))
    stage.join()
    assert len(set(stage.peers)) == 2


def test_once_ends_after_the_goodbye_but_not_after_a_reset(stages: Callable[..., Stage]) -> None:
    stage = stages(once=True)
    stage.join()
    stage.say(Reset("who are you?"))
    stage.join()
    stage.say(Goodbye("done"))
    assert stage.ended() is None


@pytest.mark.parametrize(
    "message", [assign(100, SPLIT), Gradient(100, 0, 0.0, np.zeros(1, np.float32)), Ready((1,), 4)]
)
def test_a_server_that_talks_nonsense_is_registered_with_anew(stages: Callable[..., Stage], message: Message) -> None:
    stage = stages()
    stage.expect(Register)
    stage.say(message)
    stage.join()
    assert len(set(stage.peers)) == 2


def test_a_gradient_of_another_shape_ends_the_session(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(assign(100, SPLIT))
    stage.expect(Features)
    stage.say(Gradient(100, 0, 0.0, np.zeros((4, 7), np.float32)))
    stage.join()


def test_what_is_not_of_the_runs_codec_ends_the_session(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    asked = assign(100, SPLIT)
    stage.say(replace(asked, parts={"x:values": np.zeros((1, 2, 2), np.uint8)}))
    stage.join()
    stage.say(asked)
    features = stage.expect(Features).features
    stage.say(Gradient(100, 0, 0.0, features, {"scale": np.ones(32, np.float32)}))
    stage.join()
    assert len(set(stage.peers)) == 3


def test_features_and_update_are_of_the_codecs_that_the_server_names(stages: Callable[..., Stage]) -> None:
    """512 bytes per sample in fp32, 128 in int8; the gradient is answered in fp16."""
    codecs = {"feature_codec": "int8", "gradient_codec": "fp16", "weight_codec": "bf16"}
    told = replace(WELCOME, **codecs)
    run = RunCodecs.of(told)
    stage = stages()
    stage.expect(Register)
    stage.say(told)
    assert stage.expect(Ready) == Ready(FEATURE_SHAPE, FEATURE_BYTES // 4)
    asked = assign(100, SPLIT)
    state, parts = run.encode_assigned(asked.state, "a", 100)
    stage.say(replace(asked, state=state, parts=parts))
    for step in range(SPLIT):
        features = stage.expect(Features)
        assert (features.features.dtype, sorted(features.parts)) == (np.uint8, ["scale", "zero"])
        x = np.empty(features.features.shape, np.float32)
        run.decode_features(features, x)
        stage.say(Gradient(100, step, 0.0, *run.encode_gradient(x, "a", 100, step)))
    update = stage.expect(Update)
    assert run.decode_update(update).state.keys() == asked.state.keys()
    assert {array.dtype.name for array in update.parts.values()} == {"int16"}


def test_a_codec_that_this_worker_does_not_know_ends_it_with_the_name(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.expect(Register)
    stage.say(replace(WELCOME, feature_codec="int7"))
    assert "unknown codec 'int7'" in stage.expect(Leave).reason
    assert isinstance(stage.ended(), ConfigError)


# Ends.


def test_a_refused_worker_ends_with_the_reason(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.expect(Register)
    stage.say(Refuse("another process registered as 'a'"))
    error = stage.ended()
    assert isinstance(error, RefusedError) and "another process registered as 'a'" in str(error)


@pytest.mark.parametrize(
    ("welcome", "expected"),
    [
        (replace(WELCOME, model="cnm"), "unknown model 'cnm': did you mean 'cnn'?"),
        (replace(WELCOME, cut="conv9"), "conv9"),
        (
            replace(WELCOME, sample_shape=(3, 8, 8)),
            "the run is for samples of shape (3, 8, 8), this worker holds (1, 8, 8): name the data set of the run",
        ),
        (
            replace(WELCOME, stored_type="uint8"),
            "is for samples stored as uint8, this worker's are float32: store them",
        ),
        (
            replace(WELCOME, class_names=("0", "2", "bed")),
            "this worker holds 3 samples of class '1', the run knows 0, 2, bed: name the data set of the run",
        ),
    ],
)
def test_a_run_that_it_cannot_take_part_in_is_left_with_the_reason(
    stages: Callable[..., Stage], welcome: Welcome, expected: str
) -> None:
    stage = stages()
    stage.expect(Register)
    stage.say(welcome)
    leave = stage.expect(Leave)
    error = stage.ended()
    assert isinstance(error, ConfigError) and expected in str(error)
    assert leave.reason == f"cannot take part: {error}"


def test_an_unknown_method_is_left_with_the_reason(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.say(assign(100, SPLIT, method="mergefsl"))
    assert "unknown method 'mergefsl'" in stage.expect(Leave).reason
    assert isinstance(stage.ended(), ConfigError)


def test_a_round_that_cannot_be_computed_is_left_with_the_reason(stages: Callable[..., Stage]) -> None:
    """A state of another model than the one that was agreed on (or no memory left): no traceback, no silence."""
    stage = stages()
    stage.join()
    stage.say(replace(assign(100, SPLIT), state={"other.weight": np.zeros(3, np.float32)}))
    assert "round 2 failed on this worker: " in stage.expect(Leave).reason
    assert isinstance(stage.ended(), WorkFailedError)


def test_computing_that_fails_while_a_part_waits_for_a_connection_ends_the_worker_and_its_thread(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step goes well; in the second the server goes, the first part is handed over, and no memory is left."""
    monkeypatch.setattr(sender_module, "FEWEST_NUMBERS_BESIDE", 0)
    monkeypatch.setattr(timing, "HELD_UP_SHARE", float("inf"))
    z, y = torch.zeros(2, *FEATURE_SHAPE), torch.zeros(2, dtype=torch.int64)  # a part: half of the batch
    is_gone, names = threading.Event(), []

    def work(model: object, assignment: object, batches: object, exchange: Exchange) -> WorkResult:
        for wait in [exchange(0, z, y) for _ in range(2)]:
            wait()
        assert is_gone.wait(PATIENCE_SECONDS)
        exchange(1, z, y)
        names.extend(thread.name for thread in threading.enumerate())
        raise RuntimeError("no memory")

    monkeypatch.setattr(daemon_module, "find_method", lambda name: replace(find_method(name), work=work))
    stage = stages(sender_thread=True)
    stage.expect(Register)
    stage.say(replace(WELCOME, feature_codec="int8"))
    stage.expect(Ready)
    stage.say(replace(assign(100, SPLIT), parts_per_step=2))
    for part in range(2):
        features = stage.expect(Features)
        stage.say(Gradient(100, 0, 0.0, np.zeros((2, *FEATURE_SHAPE), np.float32), part=features.part))
        assert features.part == part
    stage.server.close()
    is_gone.set()
    error = stage.ended()
    assert isinstance(error, WorkFailedError) and "no memory" in str(error)
    assert "sender-a_0" in names
    assert not any(thread.name.startswith("sender-") for thread in threading.enumerate())


def registering(stage: Stage) -> None:
    stage.expect(Register)


def idle(stage: Stage) -> None:
    stage.join()


def waiting_for_a_gradient(stage: Stage) -> None:
    stage.join()
    stage.say(assign(100, SPLIT))
    stage.expect(Features)


def in_a_federated_round_of_a_million_steps(stage: Stage) -> None:
    stage.join()
    stage.say(assign(100, FEDERATED, num_steps=10**6))
    time.sleep(0.2)


@pytest.mark.parametrize("state", [registering, idle, waiting_for_a_gradient, in_a_federated_round_of_a_million_steps])
def test_asked_to_stop_it_takes_its_leave_in_every_state(
    stages: Callable[..., Stage], state: Callable[[Stage], None]
) -> None:
    stage = stages()
    state(stage)
    stage.stop.set()
    assert stage.expect(Leave) == Leave("stopped on this device")
    assert stage.ended() is None


def test_asked_to_stop_it_ends_while_there_is_no_server(stages: Callable[..., Stage]) -> None:
    stage = stages()
    time.sleep(0.1)
    stage.stop.set()
    assert stage.ended() is None


def test_asked_to_stop_it_ends_between_two_sessions(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.join()
    stage.stop.set()  # seen in the pause after the goodbye, or before: it ends either way
    stage.say(Goodbye("done"))
    assert stage.ended() is None


# With the real server.


def test_a_worker_with_one_sample_with_one_class_and_with_none(tmp_path: Path) -> None:
    """Labels are 0, 1, 2, 0, 1, 2, ...: shares of 1 row, of 20 rows of class 1, of none, and of the other 39."""
    config = small_config(tmp_path, "cluster.num_workers=4", "training.num_rounds=4", "control.kl_epsilon_nats=0.5")
    one, ones = np.array([0]), np.arange(1, 60, 3)
    rest = np.setdiff1d(np.arange(60), np.concatenate([one, ones]))
    endpoint = play_daemons(config, [one, ones, np.array([], np.int64), rest])
    registered = [entry.message for entry in endpoint.log if isinstance(entry.message, Register)]
    counts = {message.worker_id: message.label_counts for message in registered}
    assert counts == {
        "worker-00": (1, 0, 0),
        "worker-01": (0, 20, 0),
        "worker-02": (0, 0, 0),
        "worker-03": (19, 0, 20),
    }
    lines = journal_of(config)
    chosen = {name for line in lines for name in line["worker_ids"]}
    assert chosen == {"worker-00", "worker-01", "worker-03"}
    assert all(line["finished_worker_ids"] == line["worker_ids"] and not line["dropped"] for line in lines)
    for line in lines:
        sizes = dict(zip(line["worker_ids"], line["batch_sizes"], strict=True))
        assert sizes.get("worker-00", 1) == 1  # never more than it has


def test_bytes_of_the_journal_with_real_daemons(tmp_path: Path) -> None:
    config = small_config(tmp_path, "method.regulation=false")
    endpoint = play_daemons(config, [np.arange(i, 60, 3) for i in range(3)])
    begin = 1 + max(index for index, entry in enumerate(endpoint.log) if isinstance(entry.message, Ready))
    rounds = [entry for entry in endpoint.log[begin:] if not isinstance(entry.message, Goodbye)]
    for direction, key in (("in", "ingress_bytes"), ("out", "egress_bytes")):
        assert sum(line[key] for line in journal_of(config)) == sum(
            entry.num_bytes for entry in rounds if entry.direction == direction
        )
    kinds: dict[type[Message], int] = {Assign: 9, Features: 18, Gradient: 18, Update: 9}
    for kind, number in kinds.items():
        assert endpoint.count("out" if kind in (Assign, Gradient) else "in", kind) == number


@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1", "fedavg"])
def test_a_run_of_daemons_that_is_interrupted_goes_on_to_the_same_parameters(tmp_path: Path, method: str) -> None:
    shares = [np.arange(i, 60, 3) for i in range(3)]
    settings = (f"method.name={method}", "training.num_rounds=5")
    whole = small_config(tmp_path, "name=whole", *settings)
    play_daemons(whole, shares)
    stopped = small_config(tmp_path, "name=stopped", *settings, "output.checkpoint_every_rounds=100")
    kind = Update if method == "fedavg" else Features

    def check(endpoint: LoggedEndpoint) -> None:
        """Once the first message of round 2 has come: in the middle of the round."""
        if any(isinstance(e.message, kind) and round_of(e.message.round_num) == 2 for e in endpoint.log):
            raise InterruptedRunError("asked to stop")

    with pytest.raises(InterruptedRunError):
        play_daemons(stopped, shares, check=check)
    assert checkpoint_of(stopped).round_num == 2
    assert len(journal_of(stopped)) == 2
    play_daemons(stopped, shares, resume=True)
    assert same_tensors(checkpoint_of(whole), checkpoint_of(stopped))
    keys = ("round_num", "worker_ids", "batch_sizes", "finished_worker_ids", "accuracy", "train_loss_nats")
    drop = set(journal_of(whole)[0]) - set(keys)
    assert without(journal_of(whole), *drop) == without(journal_of(stopped), *drop)


# Local data.


def test_a_share_holds_its_rows_only(tmp_path: Path) -> None:
    dataset = load_dataset(f"npz:{write_dataset(tmp_path)}")
    share = share_of(dataset, np.array([0, 3, 4]))
    np.testing.assert_array_equal(share.x, dataset.train.x[[0, 3, 4]])
    assert share.label_counts == (2, 1, 0)
    assert len(share_of(dataset, None).y) == 60
    assert share_of(dataset, np.array([], np.int64)).label_counts == (0, 0, 0)


def test_local_data_is_a_data_set_of_its_own_or_a_share_of_a_partition(tmp_path: Path) -> None:
    text = f"npz:{write_dataset(tmp_path)}"
    labels = load_dataset(text).train.y
    partition = parse_partition("dirichlet(0.5)").split(labels, 3, np.random.default_rng(0))
    path = tmp_path / "partition.npz"
    save_partition(path, partition, labels, NUM_CLASSES)
    assert len(load_local_data(text, None, None, 144).y) == 60
    for index in range(3):
        local = load_local_data(text, path, index, 144)
        np.testing.assert_array_equal(local.y, labels[partition.assignments[index]])
    for wrong in (None, -1, 3):
        with pytest.raises(ConfigError, match=f"--index {wrong}: .* has the shares 0 to 2"):
            load_local_data(text, path, wrong, 144)
    with pytest.raises(ConfigError, match="--index 0 names a share of a partition: name the file too, with"):
        load_local_data(text, None, 0, 144)
    other = f"npz:{write_dataset(tmp_path / 'other', 30)}"
    with pytest.raises(DataError, match="was drawn for other labels"):
        load_local_data(other, path, 0, 144)


def test_a_worker_decodes_its_share_of_a_folder_of_images_only(tmp_path: Path) -> None:
    """Ten images of two classes; the worker's share leaves out a file that cannot be decoded."""
    image_module = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(5):
            grey = np.full((4, 4), 100 * label + index, np.uint8)
            image_module.fromarray(grey).save(tmp_path / "train" / name / f"{index}.png")
    (tmp_path / "train" / "cat" / "3.png").write_bytes(b"damaged")
    labels = np.repeat([0, 1], 5)
    partition = parse_partition("dominant(1)").split(labels, 2, np.random.default_rng(0))  # all dogs are worker 1's
    save_partition(tmp_path / "partition.npz", partition, labels, 2)
    local = load_local_data(f"folder:{tmp_path}", tmp_path / "partition.npz", 1, 4)
    assert local.x[:, 0, 0, 0].tolist() == [100, 101, 102, 103, 104] and local.label_counts == (0, 5)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_local_data(f"folder:{tmp_path}", tmp_path / "partition.npz", 0, 4)
