"""The thread that encodes and sends beside computing: order, errors, its end, when it is asked, and equal bits.

Legend: d samples of a part, F = 4 numbers of each at the cut.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import workers.__main__ as worker_command
from mergesfl.errors import ConfigError
from mergesfl.processes import start_worker
from mergesfl.protocol.coding import PLAIN, RunCodecs
from mergesfl.protocol.messages import Features, Gradient, Message, Release
from mergesfl.runtime.process import EXIT_USER_ERROR
from tests.memory_cluster import HandClock, checkpoint_of, play_daemons, same_tensors, small_config
from tests.processes import ROOT
from tests.test_workers_link import ASSIGN, FEATURES, IDLE, Line
from workers import sender as sender_module
from workers import timing
from workers.daemon import DaemonSettings
from workers.exchange import TimedExchange
from workers.link import Link, RoundReleasedError, SessionLostError, StoppedError
from workers.pace import MeasuredPace
from workers.sender import Sender

PATIENCE_SECONDS = 20.0  # a bound for a broken test, not a claim about speed
CHOSEN = sender_module.FEWEST_NUMBERS_BESIDE  # every test but the last makes do with less
INT8 = RunCodecs(0, "int8", "fp32", "fp32")
CPU = torch.device("cpu")
Z = torch.linspace(-1, 1, 24).reshape(6, 4)  # (6, 4): three parts of 2 samples
Y = torch.arange(6) % 3  # (6,)


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "FEWEST_NUMBERS_BESIDE", 0)


def features(part: int) -> Features:
    return Features(100, 0, Z[2 * part : 2 * part + 2].numpy(), Y[2 * part : 2 * part + 2].numpy(), part=part)


def sender_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sender-")]


class GatedLink:
    """Sends when it is let, and notes by which thread; gives the gradients of what was sent when it is asked."""

    def __init__(self, clock: HandClock) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.sent: list[tuple[int, int, str]] = []  # (step, part, thread)
        self.messages: list[Features] = []
        self.failures: dict[int, Callable[[], Exception]] = {}  # by part
        self.is_abandoned = False
        self.answer_seconds = self.held_seconds = 0.0
        self._clock = clock
        self._num_answered = 0

    def send(self, message: Features) -> None:
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.is_abandoned:
            raise SessionLostError("given up")
        if message.part in self.failures:
            raise self.failures[message.part]()
        self.sent.append((message.step, message.part, threading.current_thread().name))
        self.messages.append(message)

    def receive(self) -> Message:
        self._clock.seconds += self.answer_seconds
        asked = self.messages[self._num_answered]
        self._num_answered += 1
        return Gradient(
            asked.round_num, asked.step, self.held_seconds, np.ones((len(asked.labels), 4), np.float32), part=asked.part
        )

    def abandon(self) -> None:
        self.is_abandoned = True
        self.gate.set()


def sender_over(link: GatedLink, codecs: RunCodecs = INT8, has_thread: bool = True) -> Sender:
    return Sender(cast(Link, link), codecs, "w", has_thread)


@contextlib.contextmanager
def exchange_over(link: GatedLink, clock: HandClock, num_samples: int = 6) -> Iterator[TimedExchange]:
    """Of steps of so many samples, with a thread."""
    with sender_over(link) as sender:
        yield TimedExchange(cast(Link, link), 100, num_samples, clock, MeasuredPace(clock), CPU, INT8, sender)


def test_who_hands_over_goes_on_while_it_is_encoded_and_sent_and_the_order_stays() -> None:
    link = GatedLink(HandClock())
    with sender_over(link) as sender:
        link.gate.clear()
        for part in range(2):
            assert sender.may_send_beside(features(part))
            sender.send_beside(features(part))
        assert link.sent == []  # and we are here
        threading.Timer(0.05, link.gate.set).start()
        sender.send(sender.encode(features(2)))  # waits for the two before
    assert link.sent == [(0, 0, "sender-w_0"), (0, 1, "sender-w_0"), (0, 2, threading.current_thread().name)]
    for part, message in enumerate(link.messages):
        expected = INT8.encode_features(features(part), "w")
        assert message.features.dtype == np.uint8 and np.array_equal(message.features, expected.features)
        assert all(np.array_equal(message.parts[name], expected.parts[name]) for name in expected.parts)
    assert sender_threads() == []


def test_without_a_thread_or_a_codec_or_enough_to_do_nothing_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 2 samples has 8 numbers. The thread begins with the first message only."""
    link = GatedLink(HandClock())
    for codecs, has_thread in ((INT8, False), (PLAIN, True), (PLAIN, False)):
        with sender_over(link, codecs, has_thread) as sender:
            assert not sender.may_send_beside(features(0))
    for fewest, may in ((8, True), (9, False)):
        monkeypatch.setattr(sender_module, "FEWEST_NUMBERS_BESIDE", fewest)
        with sender_over(link) as sender:
            assert sender.may_send_beside(features(0)) is may
            assert sender_threads() == []


@pytest.mark.parametrize(
    "error", [RoundReleasedError("void"), SessionLostError("who?"), StoppedError("asked"), RuntimeError("no memory")]
)
def test_an_error_of_the_thread_reaches_the_caller_and_nothing_goes_out_after_it(error: Exception) -> None:
    link = GatedLink(HandClock())
    link.failures[0] = lambda: error
    link.gate.clear()
    with pytest.raises(type(error), match=str(error)), sender_over(link) as sender:
        sender.send_beside(features(0))
        sender.send_beside(features(1))
        link.gate.set()
        sender.send(sender.encode(features(2)))
    assert link.sent == [] and sender_threads() == []
    assert not link.is_abandoned  # a released round is not the end of the session


def test_an_error_is_told_when_the_next_message_is_handed_over() -> None:
    link = GatedLink(HandClock())
    link.failures[0] = lambda: RoundReleasedError("void")
    with sender_over(link) as sender:
        sender.send_beside(features(0))
        assert sender._last is not None and sender._last.exception(PATIENCE_SECONDS) is not None
        with pytest.raises(RoundReleasedError, match="void"):
            sender.send_beside(features(1))
    assert link.sent == [] and sender_threads() == []


def test_what_cannot_be_encoded_is_an_error_of_the_caller() -> None:
    link = GatedLink(HandClock())
    wrong = Features(100, 0, np.array(["text"]), np.zeros(1, np.int64))
    with sender_over(link) as sender:
        sender.send_beside(wrong)
        with pytest.raises(ValueError, match="text"):
            sender.settle()
    assert link.sent == []


def test_computing_that_fails_leaves_no_thread_behind_though_it_cannot_send() -> None:
    """The connection is away, and the thread waits for it: the link is given up, and what was queued is not sent."""
    link = GatedLink(HandClock())
    with pytest.raises(RuntimeError, match="no memory"), sender_over(link) as sender:
        link.gate.clear()
        sender.send_beside(features(0))
        sender.send_beside(features(1))
        raise RuntimeError("no memory")
    assert link.is_abandoned and link.sent == [] and sender_threads() == []


def test_without_a_thread_to_be_had_the_computing_thread_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    link = GatedLink(HandClock())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with sender_over(link) as sender:
        sender.send_beside(features(0))
        assert not sender.may_send_beside(features(1))
        sender.send(sender.encode(features(1)))
    assert [part for _, part, _ in link.sent] == [0, 1]


@pytest.mark.parametrize("num_handed_over", [1, 2, 3])
@pytest.mark.parametrize(("is_known", "settles"), [(False, True), (True, True), (False, False)])
def test_an_error_of_the_thread_keeps_nothing_of_the_round_alive(
    num_handed_over: int, is_known: bool, settles: bool
) -> None:
    """Not even until the cycle collector comes: features may be memory of a GPU, and the worker goes on."""
    link = GatedLink(HandClock())
    link.failures[0] = lambda: RoundReleasedError("void")

    def failing_round() -> weakref.ref[Sender]:
        z = Z.clone()
        with contextlib.suppress(RoundReleasedError), sender_over(link) as sender:
            link.gate.clear()
            for part in range(num_handed_over):
                sender.send_beside(replace(features(part), features=z.numpy()))
            link.gate.set()
            if is_known:  # before the next is handed over
                assert sender._last is not None and sender._last.exception(PATIENCE_SECONDS) is not None
                sender.send_beside(features(num_handed_over))
            if settles:
                sender.settle()
        return weakref.ref(sender)

    gc.disable()
    try:
        assert failing_round()() is None
    finally:
        gc.enable()


def test_a_link_that_is_given_up_ends_whoever_waits_on_it_for_a_connection() -> None:
    line = Line(*IDLE, ASSIGN)
    line.endpoint.online_at_seconds = 1e12
    errors: list[Exception] = []

    def send() -> None:
        try:
            line.link.send(FEATURES)
        except SessionLostError as error:
            errors.append(error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    line.link.abandon()
    thread.join(PATIENCE_SECONDS)
    assert [str(error) for error in errors] == ["given up on this device"]
    line.link.leave("cannot take part")  # without a connection: silent


def test_a_release_that_is_heard_while_the_thread_waits_for_a_connection_ends_the_round_only() -> None:
    line = Line(*IDLE, ASSIGN)
    line.endpoint.online_at_seconds = 1e12
    line.endpoint.inbox.append(Release(100, "void"))
    with pytest.raises(RoundReleasedError, match="void"), Sender(line.link, INT8, "w", has_thread=True) as sender:
        sender.send_beside(FEATURES)
        sender.settle()
    line.endpoint.online_at_seconds = 0.0
    line.endpoint.inbox.append(Release(100, "again"))  # stale by now: the link is as good as before
    assert line.link._next() is None


def played_step(exchange: TimedExchange, link: GatedLink, clock: HandClock, step: int, wait_seconds: float) -> None:
    """Three parts: 1 s forward and 1 s backward each; every gradient is waited for."""
    link.answer_seconds = wait_seconds
    waits = []
    for part in range(3):
        clock.seconds += 1.0
        waits.append(exchange(step, Z[2 * part : 2 * part + 2], Y[2 * part : 2 * part + 2]))
    for wait in waits:
        wait()
        clock.seconds += 1.0


def test_all_parts_but_the_last_go_beside_unless_gradients_were_waited_for_in_the_step_before() -> None:
    """By hand: while parts are out 2 forwards and 2 backwards, 4 s; 0.4 s of waiting are a tenth, and 3 gradients."""
    clock = HandClock()
    link = GatedLink(clock)
    here = threading.current_thread().name
    waits_seconds = [0.13, 0.14, 0.13, 0.0]
    with exchange_over(link, clock) as exchange:
        for step, seconds in enumerate(waits_seconds):
            played_step(exchange, link, clock, step, seconds)
        exchange.finish(4)
    beside, inline = ["sender-w_0", "sender-w_0", here], [here] * 3
    told = [[name for at, _, name in link.sent if at == step] for step in range(4)]
    assert told == [inline, beside, inline, beside]  # of the step before the first nobody knows
    assert [part for _, part, _ in link.sent] == [0, 1, 2] * 4
    assert exchange.compute_seconds + exchange.transfer_seconds == pytest.approx(clock.seconds)
    assert exchange.compute_seconds == pytest.approx(4 * 6.0)


def test_a_gradient_is_not_waited_for_while_the_thread_has_the_connection() -> None:
    """A step that ends with fewer samples than were planned: its last part is not known to be the last."""
    clock = HandClock()
    link = GatedLink(clock)
    with exchange_over(link, clock, num_samples=99) as exchange:
        for step in range(2):
            clock.seconds += 1.0
            link.gate.clear()
            threading.Timer(0.05, link.gate.set).start()
            waits = [exchange(step, Z[:2], Y[:2]), exchange(step, Z[2:], Y[2:])]
            clock.seconds += 1.0
            assert [wait().shape for wait in waits] == [(2, 4), (4, 4)]
    assert [(step, part) for step, part, _ in link.sent] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("held_seconds", [0.0, 1e6])
def test_waiting_for_the_thread_is_transfer_and_not_computing(held_seconds: float) -> None:
    """By hand: each step 1 s per forward and backward of its two parts, and gradients that are there at once. In the
    second step part 0 is handed over, but the connection is away until 7 s after the second forward. A server that says
    to have held for ever changes nothing: what counts is when the last part was out."""
    clock = HandClock()
    link = GatedLink(clock)
    link.held_seconds = held_seconds

    def come_back() -> None:
        clock.seconds += 7.0
        link.gate.set()

    with exchange_over(link, clock) as exchange:
        for step in range(2):
            if step == 1:
                link.gate.clear()
            waits = []
            for rows in (slice(0, 3), slice(3, 6)):
                clock.seconds += 1.0
                if len(waits) == step == 1:
                    threading.Timer(0.05, come_back).start()
                waits.append(exchange(step, Z[rows], Y[rows]))
            for wait in waits:
                wait()
                clock.seconds += 1.0
        exchange.finish(2)
    assert clock.seconds == pytest.approx(15.0)
    assert exchange.compute_seconds == pytest.approx(8.0)
    assert exchange.transfer_seconds == pytest.approx(7.0)


def test_a_step_in_one_part_is_sent_by_the_computing_thread() -> None:
    clock = HandClock()
    link = GatedLink(clock)
    with exchange_over(link, clock) as exchange:
        for step in range(3):
            clock.seconds += 1.0
            exchange(step, Z, Y)()
    assert [name for *_, name in link.sent] == [threading.current_thread().name] * 3


@pytest.mark.parametrize("codec", ["int8", "topk(0.5)"])
@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1"])
def test_real_daemons_train_to_the_same_bits_with_and_without_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, method: str
) -> None:
    monkeypatch.setattr(timing, "HELD_UP_SHARE", float("inf"))  # who waits is asked, too, but for the first step
    handed_over: list[Features] = []
    hand_over = Sender.send_beside

    def noted(sender: Sender, message: Features) -> None:
        handed_over.append(message)
        hand_over(sender, message)

    monkeypatch.setattr(Sender, "send_beside", noted)
    shares = [np.arange(index, 60, 3) for index in range(3)]
    runs, counts = [], []
    for has_thread in (False, True):
        settings = [f"name={has_thread}", f"method.name={method}", f"codec.features={codec}", "training.num_rounds=2"]
        settings += ["training.merge=streaming-in-order", "training.parts_per_step=3", "training.local_steps=3"]
        config = small_config(tmp_path, *settings)
        play_daemons(config, shares, sender_thread=has_thread)
        runs.append(checkpoint_of(config))
        counts.append(len(handed_over))
    assert same_tensors(*runs)
    assert counts[0] == 0
    assert counts[1] == 2 * 3 * (3 - 1) * (3 - 1)  # rounds, workers, steps but the first, parts but the last
    assert sender_threads() == []


def test_a_worker_has_the_thread_where_a_core_is_left_or_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    decide: Callable[..., bool] = worker_command.has_sender_thread
    for num_threads, cores, expected in ((1, 2, True), (2, 2, False), (6, 6, False), (5, 6, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda num=num_threads: num)
        monkeypatch.setattr(worker_command, "usable_cores", lambda num=cores: num)
        assert decide(None, CPU, is_slowed=False) is expected
        assert decide(None, cuda, is_slowed=False) is True  # one core gives the GPU its work
        assert decide(None, cuda, is_slowed=True) is False
        assert decide(True, CPU, is_slowed=False) is True
        assert decide(False, cuda, is_slowed=False) is False
    monkeypatch.setattr(worker_command, "usable_cores", lambda: 1)
    assert decide(None, cuda, is_slowed=False) is False
    with pytest.raises(ConfigError, match="leave out --sender-thread"):
        decide(True, CPU, is_slowed=True)


def test_a_worker_that_plays_a_slower_device_may_not_ask_for_it() -> None:
    command = [sys.executable, "-m", "workers", "--connect", "tcp://127.0.0.1:9", "--sender-thread", "--slowdown", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert ended.returncode == EXIT_USER_ERROR
    assert ended.stderr.splitlines()[-1].startswith("error: a worker with --slowdown or --profile encodes where it")


def test_the_workers_of_a_local_cluster_share_the_cores_and_have_no_thread_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    start_worker(small_config(tmp_path), "tcp://127.0.0.1:9", tmp_path, 0, 1)
    assert "--no-sender-thread" in commands[0]


@pytest.mark.parametrize(("wanted", "has_thread"), [("--sender-thread", True), ("--no-sender-thread", False)])
def test_the_command_line_decides(monkeypatch: pytest.MonkeyPatch, wanted: str, has_thread: bool) -> None:
    made: list[DaemonSettings] = []

    class NotedDaemon:
        def __init__(self, settings: DaemonSettings, *others: object) -> None:
            made.append(settings)

        def run(self) -> None:
            pass

    monkeypatch.setattr(worker_command, "Daemon", NotedDaemon)
    app = typer.Typer()
    app.command()(worker_command.worker)
    ended = CliRunner().invoke(app, ["--connect", "tcp://127.0.0.1:9", "--id", "a", "--threads", "1", wanted])
    assert ended.exit_code == 0, ended.output
    assert made == [DaemonSettings("a", sender_thread=has_thread)]


def test_a_part_of_four_samples_of_har_is_enough_and_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = 32 * 32 * 2  # of a sample, at conv2
    with sender_over(GatedLink(HandClock())) as sender:
        few, many = (replace(features(0), features=np.zeros((num, numbers), np.float32)) for num in (1, 4))
        monkeypatch.setattr(sender_module, "FEWEST_NUMBERS_BESIDE", CHOSEN)
        assert not sender.may_send_beside(few) and sender.may_send_beside(many)
