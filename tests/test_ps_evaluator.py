"""Evaluation beside the next round: it stalls nobody, changes nothing, and can be interrupted at any moment.

Legend: tau = 2 steps per round, three daemons in threads; "held": an evaluation that goes on when an event says so.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.config import RunConfig
from mergesfl.errors import CheckpointError, DataError, MergeSFLError
from mergesfl.models import build_model
from mergesfl.protocol.messages import Features, round_of
from mergesfl.runtime.clock import Clock, WallClock
from mergesfl.training.evaluation import Evaluation, evaluate
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from ps.evaluator import BackgroundEvaluator, Evaluate, InlineEvaluator, Keep
from ps.recorder import Recorder
from ps.run import Scene
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    MEASURED,
    NUM_CLASSES,
    SAMPLE_SHAPE,
    LoggedEndpoint,
    checkpoint_of,
    journal_of,
    play_daemons,
    same_tensors,
    small_config,
    without,
)

torch.set_num_threads(1)

CPU = torch.device("cpu")
SHARES = [np.arange(index, 60, 3) for index in range(3)]
PATIENCE_SECONDS = 60.0
NAMES_OF_KINDS = ("inline", "beside", "late")
FOUR = ("training.num_rounds=4", "control.estimate_memory=0.5")  # plans depend on what was learnt


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    return without(journal_of(config), *MEASURED)


def rounds_of(config: RunConfig) -> list[int]:
    return [line["round_num"] for line in journal_of(config)]


class AtTheLastMoment(BackgroundEvaluator):
    """Does not begin before somebody waits for it: as slow as an evaluation can be."""

    def __init__(self, evaluate: Evaluate, clock: Clock) -> None:
        self._is_waited_for = threading.Event()

        def slow(network: SplitModel) -> Evaluation:
            assert self._is_waited_for.wait(PATIENCE_SECONDS)
            return evaluate(network)

        super().__init__(slow, clock)

    def begin(self, network: SplitModel | None, keep: Keep) -> None:
        self._is_waited_for.clear()
        super().begin(network, keep)

    def wait(self) -> None:
        self._is_waited_for.set()
        super().wait()


def whole_run(tmp_path: Path) -> RunConfig:
    """The run that nobody disturbs, evaluated in line."""
    config = small_config(tmp_path, "name=whole", *FOUR)
    play_daemons(config, SHARES, make_evaluator=InlineEvaluator)
    return config


def assert_same_run(config: RunConfig, whole: RunConfig) -> None:
    """The journal but for its real seconds, and all bits of the last state."""
    assert lines_of(config) == lines_of(whole)
    assert same_tensors(checkpoint_of(config), checkpoint_of(whole))
    assert checkpoint_of(config).state["fleet"] == checkpoint_of(whole).state["fleet"]


def exchanged(endpoint: LoggedEndpoint, round_num: int) -> bool:
    """Whether step 1 of this round has begun: then a gradient of its step 0 has come to a worker."""
    return any(
        isinstance(one.message, Features) and round_of(one.message.round_num) == round_num and one.message.step == 1
        for one in endpoint.log
    )


def plant(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Calls `before` with 0, 1, ... in the thread that evaluates, and then evaluates."""
    calls = iter(range(1000))

    def planted(scene: Scene, network: SplitModel) -> Evaluation:
        before(next(calls))
        return evaluate_really(scene, network)

    evaluate_really = Scene.evaluate
    monkeypatch.setattr(Scene, "evaluate", planted)


def hold(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> Mapping[int, threading.Event]:
    """These evaluations do not begin before their event is set."""
    events = {number: threading.Event() for number in numbers}

    def wait(number: int) -> None:
        assert number not in events or events[number].wait(PATIENCE_SECONDS), "evaluated in line"

    plant(monkeypatch, wait)
    return events


Saved = list[tuple[int, dict[str, torch.Tensor], Any]]  # (next round, tensors, state of the fleet)


def watch_checkpoints(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Saved]:
    """All that are saved, by the name of the run; each comes after the lines of all rounds before it."""
    saved: dict[str, Saved] = {}
    checkpoint = Recorder.checkpoint

    def watched(recorder: Recorder, next_round: int, tensors: Mapping[str, torch.Tensor], state: Any) -> None:
        assert rounds_of(recorder._config) == list(range(next_round))
        saved.setdefault(recorder._config.name, []).append((next_round, dict(tensors), state["fleet"]))
        checkpoint(recorder, next_round, tensors, state)

    monkeypatch.setattr(Recorder, "checkpoint", watched)
    return saved


# The next round goes on meanwhile.


def test_the_next_round_is_trained_while_the_last_one_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation r begins only when gradients of round r + 1 have been sent; so it also shows that what it judges does
    not train on. In line this would wait for ever."""
    whole = whole_run(tmp_path)
    config = small_config(tmp_path, "name=beside", *FOUR)
    held = hold(monkeypatch, 0, 1, 2)
    written: dict[int, list[int]] = {}

    def check(endpoint: LoggedEndpoint) -> None:
        for number, event in held.items():
            if not event.is_set() and exchanged(endpoint, number + 1):
                written[number] = rounds_of(config)
                event.set()

    play_daemons(config, SHARES, check=check)
    assert written == {0: [], 1: [0], 2: [0, 1]}  # no line before its evaluation, and those before it are there
    assert rounds_of(config) == [0, 1, 2, 3]
    assert_same_run(config, whole)


@pytest.mark.parametrize(
    "settings",
    [
        ("method.name=mergesfl",),
        ("method.name=mergesfl+", "method.model_averaging=0.5", "control.survey_every_rounds=0"),
        ("method.name=splitfed-v1",),
        ("method.name=mergesfl", "training.evaluate_every_rounds=3", "output.checkpoint_every_rounds=2"),
    ],
)
def test_in_line_and_beside_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """Down to each checkpoint, whenever it is written."""
    saved = watch_checkpoints(monkeypatch)
    inline, beside, late = (small_config(tmp_path, f"name={name}", *FOUR, *settings) for name in NAMES_OF_KINDS)
    play_daemons(inline, SHARES, make_evaluator=InlineEvaluator)
    play_daemons(beside, SHARES, make_evaluator=BackgroundEvaluator)
    play_daemons(late, SHARES, make_evaluator=AtTheLastMoment)
    for other in (beside, late):
        assert_same_run(other, inline)
        for (number, tensors, fleet), (expected_number, expected, expected_fleet) in zip(
            saved[other.name], saved[inline.name], strict=True
        ):
            assert number == expected_number and fleet == expected_fleet
            assert all(torch.equal(tensors[name], expected[name]) for name in tensors | expected)
    is_sparse = "training.evaluate_every_rounds=3" in settings
    evaluated = [line["accuracy"] is not None for line in journal_of(beside)]
    assert evaluated == ([False, False, True, True] if is_sparse else [True] * 4)
    assert [line["evaluation_seconds"] > 0.0 for line in journal_of(beside)] == evaluated


# Whatever happens meanwhile.


@pytest.mark.parametrize("every", [1, 100])
def test_a_stop_while_an_evaluation_is_pending_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    whole = whole_run(tmp_path)
    config = small_config(tmp_path, "name=stopped", *FOUR, f"output.checkpoint_every_rounds={every}")

    def stop(endpoint: LoggedEndpoint) -> None:
        if exchanged(endpoint, 2):
            assert rounds_of(config) == [0]
            raise InterruptedRunError("asked to stop")

    watch_checkpoints(monkeypatch)
    with pytest.raises(InterruptedRunError):
        play_daemons(config, SHARES, check=stop, make_evaluator=AtTheLastMoment)
    assert rounds_of(config) == [0, 1]
    assert checkpoint_of(config).round_num == 2
    play_daemons(config, SHARES, resume=True)
    assert_same_run(config, whole)


@pytest.mark.parametrize("moment", ["evaluating", "line written"])
def test_a_server_that_is_killed_while_an_evaluation_is_pending_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What a kill leaves is what is on the disk: a copy of the folder at that moment, in the middle of round 2."""
    whole = whole_run(tmp_path)
    config = small_config(tmp_path, "name=run", *FOUR)
    killed = small_config(tmp_path, "name=killed", *FOUR)
    held = hold(monkeypatch, 1)
    checkpoint = Recorder.checkpoint

    def copy_folder() -> None:
        shutil.copytree(config.run_folder, killed.run_folder)

    def check(endpoint: LoggedEndpoint) -> None:
        if not held[1].is_set() and exchanged(endpoint, 2):
            if moment == "evaluating":
                copy_folder()
            held[1].set()

    def watched(recorder: Recorder, next_round: int, *details: Any) -> None:
        if moment == "line written" and next_round == 2 and not killed.run_folder.exists():
            copy_folder()
        checkpoint(recorder, next_round, *details)

    monkeypatch.setattr(Recorder, "checkpoint", watched)
    play_daemons(config, SHARES, check=check)
    assert rounds_of(killed) == ([0] if moment == "evaluating" else [0, 1])
    assert checkpoint_of(killed).round_num == 1
    play_daemons(killed, SHARES, resume=True)
    assert_same_run(killed, whole)
    assert_same_run(config, whole)


@pytest.mark.parametrize("stops", [False, True])
def test_an_evaluation_that_fails_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Also when somebody asks to stop meanwhile: what was not evaluated has no line and no checkpoint."""
    whole = whole_run(tmp_path)
    config = small_config(tmp_path, "name=failed", *FOUR)

    def fail(number: int) -> None:
        if number == 1:
            raise DataError("planted")

    def stop(endpoint: LoggedEndpoint) -> None:
        if stops and exchanged(endpoint, 2):
            raise InterruptedRunError("asked to stop")

    with monkeypatch.context() as planted:
        plant(planted, fail)
        with pytest.raises(DataError, match="planted"):
            play_daemons(config, SHARES, check=stop)
    assert rounds_of(config) == [0]
    assert checkpoint_of(config).round_num == 1
    play_daemons(config, SHARES, resume=True)
    assert_same_run(config, whole)


def test_the_last_evaluation_is_waited_for_and_its_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, "training.num_rounds=2")

    def fail(number: int) -> None:
        if number == 1:
            raise DataError("planted")

    plant(monkeypatch, fail)
    with pytest.raises(DataError, match="planted"):
        play_daemons(config, SHARES)
    assert rounds_of(config) == [0]
    assert not (config.run_folder / "summary.json").exists()


def test_a_disk_that_is_full_ends_the_run_before_the_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, "training.num_rounds=4")
    checkpoint = Recorder.checkpoint

    def full(recorder: Recorder, next_round: int, *details: Any) -> None:
        if next_round == 2:
            raise CheckpointError("no space left")
        checkpoint(recorder, next_round, *details)

    monkeypatch.setattr(Recorder, "checkpoint", full)
    with pytest.raises(MergeSFLError, match="no space left"):
        play_daemons(config, SHARES)
    assert rounds_of(config) == [0, 1]
    assert checkpoint_of(config).round_num == 1


# The evaluator by itself.


def network_of(seed: int) -> SplitModel:
    return place(build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, seed), CPU)


def judge(network: SplitModel) -> Evaluation:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, *SAMPLE_SHAPE, generator=generator)
    y = torch.arange(96) % NUM_CLASSES
    return evaluate(network, [(x[:64], y[:64]), (x[64:], y[64:])], NUM_CLASSES, CPU)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_thread_computes_with_as_many_threads_and_to_the_same_bits(two_threads: None) -> None:
    """The networks are trained on (here: set to zero) as soon as `begin` returns; the copy is made once."""
    expected = [judge(network_of(seed)) for seed in range(3)]
    seen: list[tuple[int, int]] = []  # (identity of what was judged, torch's threads)
    found: list[Evaluation | None] = []
    go = threading.Event()

    def judge_held(network: SplitModel) -> Evaluation:
        assert go.wait(PATIENCE_SECONDS)
        seen.append((id(network), torch.get_num_threads()))
        return judge(network)

    evaluator = BackgroundEvaluator(judge_held, WallClock())
    live = network_of(0)
    for seed in range(3):
        go.clear()
        live.load_joined_state_dict(network_of(seed).joined_state_dict())
        live.train()
        evaluator.begin(live, lambda evaluation, seconds: found.append(evaluation))
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.zero_()
        assert len(found) == seed
        go.set()
        evaluator.wait()
    evaluator.close()
    assert found == expected
    assert {threads for _, threads in seen} == {2}
    assert len({identity for identity, _ in seen}) == 1 and seen[0][0] != id(live)
    assert all(module.training for module in live.modules())


def test_an_error_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def keep(evaluation: Evaluation | None, seconds: float) -> None:
        raise CheckpointError("no space left")

    evaluator = BackgroundEvaluator(judge, WallClock())
    evaluator.begin(None, keep)
    evaluator.close()
    assert "could not be evaluated and saved: CheckpointError: no space left" in caplog.text


def test_a_round_that_is_not_evaluated_is_kept_all_the_same() -> None:
    for kind in (InlineEvaluator, BackgroundEvaluator):
        kept: list[tuple[Evaluation | None, float]] = []
        evaluator = kind(judge, WallClock())
        evaluator.begin(None, lambda evaluation, seconds, kept=kept: kept.append((evaluation, seconds)))
        evaluator.wait()
        evaluator.close()
        assert kept == [(None, 0.0)]
