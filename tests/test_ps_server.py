"""The round loop under every disturbance, on a clock moved by hand: what is known to happen, when, and what is left."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.errors import ConfigError, MergeSFLError, QuorumError
from mergesfl.methods.base import WorkerUpdate
from mergesfl.methods.fedavg import FedAvgProgram
from mergesfl.methods.split_program import SplitProgram
from mergesfl.protocol.messages import (
    Assign,
    Features,
    Goodbye,
    Gradient,
    Leave,
    Message,
    Pong,
    Ready,
    Refuse,
    Release,
    Update,
    Welcome,
    round_of,
    wire_round,
)
from mergesfl.runtime.patience import REAL
from mergesfl.seeding import generator_for
from ps.content import read_update
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    FEATURE_SHAPE,
    NAMES,
    NUM_CLASSES,
    ScriptedCluster,
    ScriptedWorker,
    at,
    checkpoint_of,
    journal_of,
    late,
    same_tensors,
    small_config,
    without,
)

torch.set_num_threads(1)

# Without regulation all three workers are in every plan, each with batches of 8.
ALL = "method.regulation=false"
DISTURBED = (
    "attempt",
    "round_seconds",
    "ingress_bytes",
    "egress_bytes",
    "dropped",
    "predicted_seconds",
    "predicted_idle_seconds",
)  # what a void attempt leaves in a journal line


# Workers that are late.


def test_a_stalled_worker_is_released_not_chosen_while_silent_and_joins_again_when_heard(tmp_path: Path) -> None:
    """By hand: worker-01 answers step 1 of round 1 after 8 s, the deadline is 5 s: round 1 closes at 5 s. In round 2
    worker-00 takes 4 s (5 to 9), so at 8 s worker-01 is heard again: too late for round 2, in time for round 3."""
    config = small_config(
        tmp_path, ALL, "cluster.step_deadline_seconds=5.0", "training.num_rounds=4", "output.checkpoint_every_rounds=2"
    )
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, 1, late(8.0))
    cluster["worker-00"].script = at(2, 0, late(4.0))
    summary = cluster.run()
    lines = journal_of(config)
    reason = "no answer within 5 s (cluster.step_deadline_seconds)"
    assert [line["dropped"] for line in lines] == [[], [{"worker_id": NAMES[1], "step": 1, "reason": reason}], [], []]
    assert [line["worker_ids"] for line in lines] == [[*NAMES], [*NAMES], [NAMES[0], NAMES[2]], [*NAMES]]
    assert [line["finished_worker_ids"] for line in lines] == [[*NAMES], [NAMES[0], NAMES[2]]] + [
        line["worker_ids"] for line in lines[2:]
    ]
    assert lines[1]["observed_seconds"] == pytest.approx([16 * 0.0015, None, 16 * 0.0035])
    assert [line["round_seconds"] for line in lines] == pytest.approx([0.0, 5.0, 4.0, 0.0])
    assert [line["attempt"] for line in lines] == [1, 1, 1, 1]
    assert lines[1]["samples_trained"] == 3 * 8 + 2 * 8  # it was in step 0
    assert cluster["worker-01"].told(Release) == [Release(wire_round(1, 1), reason)]
    assert summary["num_dropped"] == 1
    fleet = checkpoint_of(config).state["fleet"]
    assert fleet["participations"] == {NAMES[0]: 4, NAMES[1]: 2, NAMES[2]: 4}
    # Eq. 5, alpha 0.8: 0.002 s per sample observed, then the lower bound of 5 s for 8 samples, then 0.002 again.
    mu = 0.8 * (0.8 * 0.002 + 0.2 * 5.0 / 8) + 0.2 * 0.002
    beta = 0.8 * (0.8 * 0.0005 + 0.2 * 0.0) + 0.2 * 0.0005
    assert fleet["estimates"]["workers"][NAMES[1]] == pytest.approx([mu, beta], rel=1e-12)
    assert fleet["estimates"]["workers"][NAMES[0]] == pytest.approx([0.001, 0.0005], rel=1e-12)


def test_a_late_update_is_dropped_with_the_number_of_steps_as_its_step(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL, "cluster.step_deadline_seconds=5.0", "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    cluster["worker-02"].script = at(0, None, late(5.5))
    cluster.run()
    (line,) = journal_of(config)
    assert [(lost["worker_id"], lost["step"]) for lost in line["dropped"]] == [(NAMES[2], 2)]
    assert line["samples_trained"] == 2 * 3 * 8  # all its steps had been merged
    assert line["merged_kl_nats"] == 0.0  # of the two that finished, with equal labels


def test_a_federated_worker_has_as_many_deadlines_as_steps(tmp_path: Path) -> None:
    """tau = 2 and 5 s per step: 9.9 s are in time, 10.1 s are not."""
    config = small_config(tmp_path, "method.name=fedavg", "cluster.step_deadline_seconds=5.0", "training.num_rounds=2")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(0, None, late(9.9))
    cluster["worker-02"].script = at(1, None, late(10.1))
    cluster.run()
    lines = journal_of(config)
    assert [len(line["dropped"]) for line in lines] == [0, 1]
    assert lines[1]["dropped"][0]["reason"].startswith("no answer within 10 s")
    assert lines[0]["round_seconds"] == pytest.approx(9.9)
    # The transfer of a federated worker is what the round trip took beyond its computing: 9.9 s in all for worker-01.
    assert lines[0]["observed_seconds"] == pytest.approx([16 * 0.001, 9.9, 16 * 0.003])
    assert lines[0]["idle_seconds"] == pytest.approx(((9.9 - 0.016) + 0.0 + (9.9 - 0.048)) / 3)
    assert lines[0]["train_loss_nats"] == pytest.approx(1.0)  # what the workers report
    assert lines[0]["samples_trained"] == 3 * 16


def test_a_worker_that_computes_for_hours_is_not_drowned_in_probes(tmp_path: Path) -> None:
    """A memory queue holds 64 messages; a probe every second would take a worker for dead that computes for 65 s."""
    config = small_config(
        tmp_path, "method.name=fedavg", "cluster.step_deadline_seconds=10000.0", "training.num_rounds=1"
    )
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(0, None, late(12_000.0))
    cluster.run()
    (line,) = journal_of(config)
    assert line["dropped"] == []
    assert 3 <= len(cluster["worker-01"].told(Pong)) < 64


# Workers that go.


def test_a_worker_that_leaves_is_dropped_at_once(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)
    cluster["worker-02"].script = at(1, 0, lambda worker, answer: Leave("power off"))
    cluster.run()
    lines = journal_of(config)
    assert lines[1]["dropped"] == [{"worker_id": NAMES[2], "step": 0, "reason": "left: power off"}]
    assert lines[1]["finished_worker_ids"] == lines[2]["worker_ids"] == [*NAMES[:2]]
    assert cluster.clock.seconds == 0.0


def vanish(worker: ScriptedWorker, answer: Message) -> None:
    worker.vanish()


@pytest.mark.parametrize("step", [0, 1, None])
def test_an_unreachable_worker_is_dropped_within_the_probe_interval(tmp_path: Path, step: int | None) -> None:
    config = small_config(tmp_path, ALL, "cluster.step_deadline_seconds=3600.0")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, step, vanish)
    cluster.run()
    lines = journal_of(config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 2 if step is None else step)
    assert lost["reason"].startswith("unreachable: ")
    assert 0.0 < lines[1]["round_seconds"] <= REAL.probe_seconds + 0.2  # one poll may be under way
    assert lines[2]["worker_ids"] == [NAMES[0], NAMES[2]]


def answer_and_vanish(worker: ScriptedWorker, answer: Message) -> None:
    worker.say(answer)
    worker.act()
    worker.vanish()


@pytest.mark.parametrize("run", [(ALL,), (ALL, "training.merge=streaming"), ("method.name=fedavg",)])
def test_who_has_finished_counts_even_if_it_dies_before_the_others_have(tmp_path: Path, run: tuple[str, ...]) -> None:
    """worker-01 dies with its update sent, worker-02 sends its own half a minute later: the round is that of all."""
    calm, config = (small_config(tmp_path, *run, f"name={name}", "training.num_rounds=1") for name in ("calm", "hit"))
    ScriptedCluster(calm).run()
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(0, None, answer_and_vanish)
    cluster["worker-02"].script = at(0, None, late(30.0))
    cluster.run()
    (line,) = journal_of(config)
    assert line["finished_worker_ids"] == [*NAMES] and line["dropped"] == []
    assert line["round_seconds"] == pytest.approx(30.0)
    assert checkpoint_of(config).state["fleet"]["participations"] == dict.fromkeys(NAMES, 1)
    assert same_tensors(checkpoint_of(config), checkpoint_of(calm))


@pytest.mark.parametrize("run", [(), ("training.merge=streaming",), ("method.name=fedavg",)])
def test_no_trained_state_is_kept_until_the_last_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[str, ...]
) -> None:
    """Of twelve workers, in a random order of arrival: when one has arrived, the ones before are gone."""
    names = [f"worker-{index:02d}" for index in range(12)]
    config = small_config(
        tmp_path, "training.num_rounds=2", "cluster.num_workers=12", "control.participants_per_round=12", ALL, *run
    )
    cluster = ScriptedCluster(config, names)
    for worker, delay_seconds in zip(cluster.workers, generator_for(0, "delays").permutation(12), strict=True):
        worker.script = lambda worker, answer, seconds=float(delay_seconds): (
            late(seconds)(worker, answer) if isinstance(answer, Update) else answer
        )
    arrays: list[weakref.ref[Any]] = []
    storages: list[weakref.ref[Any]] = []
    numbers_alive: list[int] = []

    def read_and_count(name: str, message: Update, *others: Any) -> Update:
        update = read_update(name, message, *others)
        numbers_alive.append(sum(reference() is not None for reference in arrays + storages))
        arrays.extend(weakref.ref(array) for array in update.state.values())
        return update

    def watched(take: Callable[[Any, WorkerUpdate], None]) -> Callable[[Any, WorkerUpdate], None]:
        def take_and_watch(program: Any, update: WorkerUpdate) -> None:
            storages.extend(weakref.ref(tensor.untyped_storage()) for tensor in update.state.values())
            take(program, update)

        return take_and_watch

    monkeypatch.setattr("ps.exchange.read_update", read_and_count)
    for program in (SplitProgram, FedAvgProgram):
        monkeypatch.setattr(program, "take", watched(program.take))
    cluster.run()
    assert [line["finished_worker_ids"] for line in journal_of(config)] == [names] * 2
    assert numbers_alive == [0] * 24 and len(storages) == len(arrays) > 24


def test_what_the_server_does_with_an_update_does_not_make_the_next_one_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tau = 2, 5 s per step: all updates are sent after 9.9 s, adding one up takes 2 s: the third is read at 13.9"""
    config = small_config(
        tmp_path, ALL, "method.name=fedavg", "cluster.step_deadline_seconds=5.0", "training.num_rounds=1"
    )
    cluster = ScriptedCluster(config)
    for worker in cluster.workers:
        worker.script = at(0, None, late(9.9))
    take = FedAvgProgram.take

    def take_slowly(program: FedAvgProgram, update: WorkerUpdate) -> None:
        take(program, update)
        cluster.clock.sleep(2.0)

    monkeypatch.setattr(FedAvgProgram, "take", take_slowly)
    cluster.run()
    (line,) = journal_of(config)
    assert line["dropped"] == [] and line["finished_worker_ids"] == [*NAMES]


def test_a_worker_that_vanished_between_two_rounds_is_not_planned_for(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL, "training.num_rounds=2")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(0, None, answer_and_vanish)
    cluster.run()
    lines = journal_of(config)
    assert lines[0]["finished_worker_ids"] == [*NAMES]
    assert lines[1]["worker_ids"] == [NAMES[0], NAMES[2]]
    assert lines[1]["dropped"] == []


def test_all_that_arrived_between_two_rounds_is_taken_in_before_the_next_plan(tmp_path: Path) -> None:
    """A farewell waits behind two pings: the worker is not planned for any more."""
    config = small_config(tmp_path, ALL, "training.num_rounds=2")
    cluster = ScriptedCluster(config)
    crowd = [cluster.hub.worker() for _ in range(2)]

    def answer_and_leave(worker: ScriptedWorker, answer: Message) -> None:
        worker.say(answer)
        worker.act()
        for stranger in crowd:
            stranger.send([b"noise"])
        worker.say(Leave("that was all"))
        worker.act()

    # The last one to answer, so that nobody reads the queue before the round is closed.
    cluster["worker-02"].script = at(0, None, answer_and_leave)
    cluster.run()
    lines = journal_of(config)
    assert lines[0]["finished_worker_ids"] == [*NAMES]
    assert lines[1]["worker_ids"] == [*NAMES[:2]]


def test_the_newer_of_two_processes_with_one_id_wins_and_the_older_is_told(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)
    older = cluster["worker-01"]
    newer: list[ScriptedWorker] = []

    def replace_me(worker: ScriptedWorker, answer: Message) -> None:
        newer.append(cluster.add("worker-01", label_counts=(20, 0, 0)))

    older.script = at(1, 1, replace_me)
    cluster.run()
    (refusal,) = older.told(Refuse)
    assert refusal.reason == "another process registered as 'worker-01': give each worker an --id of its own"
    lines = journal_of(config)
    assert lines[1]["dropped"] == [{"worker_id": NAMES[1], "step": 1, "reason": refusal.reason}]
    assert lines[2]["finished_worker_ids"] == [*NAMES]
    assert [message.round_num for message in newer[0].told(Assign)] == [wire_round(2, 1)]
    assert [message.round_num for message in older.told(Assign)] == [wire_round(0, 1), wire_round(1, 1)]
    assert newer[0].told(Goodbye) == [Goodbye("the run is complete")]
    assert cluster.clock.seconds == 0.0


# Messages that would poison the run.


def features_with(change: Callable[[Features], dict[str, Any]]) -> Callable[[Message], Message]:
    def apply(answer: Message) -> Message:
        assert isinstance(answer, Features)
        return dataclasses.replace(answer, **change(answer))

    return apply


def state_with(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Callable[[Message], Message]:
    def apply(answer: Message) -> Message:
        assert isinstance(answer, Update)
        return dataclasses.replace(answer, state=change(dict(answer.state)))

    return apply


def samples_off_by_one(answer: Message) -> Message:
    assert isinstance(answer, Update)
    return dataclasses.replace(answer, num_samples=answer.num_samples - 1)


def one_spoilt(array: Any, value: float) -> Any:
    spoilt = array.copy()
    spoilt.reshape(-1)[-1] = value
    return spoilt


def first(state: dict[str, Any]) -> str:
    return next(iter(state))


POISON: dict[str, tuple[int | None, Callable[[Message], Message], str]] = {
    "one sample too many": (
        0,
        features_with(lambda f: {"features": np.zeros((9, *FEATURE_SHAPE), np.float32), "labels": np.zeros(9, int)}),
        "sent features float32(9, 32, 2, 2), expected float32(8, 32, 2, 2)",
    ),
    "another cut": (
        1,
        features_with(lambda f: {"features": np.zeros((8, 16, 4, 4), np.float32)}),
        "sent features float32(8, 16, 4, 4), expected float32(8, 32, 2, 2)",
    ),
    "another dtype": (
        1,
        features_with(lambda f: {"features": f.features.astype(np.float64)}),
        "sent features float64(8, 32, 2, 2), expected float32(8, 32, 2, 2)",
    ),
    "a label too large": (
        0,
        features_with(lambda f: {"labels": np.arange(8) % (NUM_CLASSES + 1)}),
        "sent labels from 0 to 3, expected 0 to 2",
    ),
    "a negative label": (
        0,
        features_with(lambda f: {"labels": np.arange(8) % 2 - 1}),
        "sent labels from -1 to 0, expected 0 to 2",
    ),
    "the step before": (1, features_with(lambda f: {"step": 0}), "Features carries step 0; expected 1"),
    "another round": (1, features_with(lambda f: {"round_num": 0}), "Features carries round 0; expected 101"),
    "a state without a tensor": (
        None,
        state_with(lambda state: {key: state[key] for key in list(state)[1:]}),
        "sent a state of other tensors than it was given: ['",
    ),
    "a state with one more": (
        None,
        state_with(lambda state: {**state, "extra": np.zeros(2, np.float32)}),
        "sent a state of other tensors than it was given: ['extra']",
    ),
    "a state of another shape": (
        None,
        state_with(lambda state: {**state, first(state): np.zeros((7,), np.float32)}),
        "as float32(7,), expected float32(",
    ),
    "a state of another dtype": (
        None,
        state_with(lambda state: {**state, first(state): state[first(state)].astype(np.float16)}),
        "as float16(",
    ),
    "too few samples": (None, samples_off_by_one, "trained 15 samples, not 16"),
}


@pytest.mark.parametrize("case", POISON)
def test_only_the_worker_that_sends_poison_is_closed(tmp_path: Path, case: str) -> None:
    step, change, expected = POISON[case]
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, step, lambda worker, answer: change(answer))
    cluster.run()
    lines = journal_of(config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 2 if step is None else step)
    assert expected in lost["reason"]
    assert cluster["worker-01"].told(Refuse) == [Refuse(lost["reason"])]
    assert lines[1]["finished_worker_ids"] == lines[2]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(config).tensors.values())
    assert cluster.clock.seconds == 0.0
    for name in (NAMES[0], NAMES[2]):
        assert cluster[name].told(Refuse) == cluster[name].told(Release) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [0, 1, None])
def test_a_worker_whose_arithmetic_broke_down_is_out_of_the_round_and_in_the_next(
    tmp_path: Path, step: int | None, value: float
) -> None:
    spoil = {
        True: state_with(lambda state: {**state, first(state): one_spoilt(state[first(state)], value)}),
        False: features_with(lambda f: {"features": one_spoilt(f.features, value)}),
    }[step is None]
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, step, lambda worker, answer: spoil(answer))
    cluster.run()
    lines = journal_of(config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 2 if step is None else step)
    assert "not finite" in lost["reason"]
    assert cluster["worker-01"].told(Release) == ([] if step is None else [Release(wire_round(1, 1), lost["reason"])])
    assert all(worker.told(Refuse) == [] for worker in cluster.workers)
    assert lines[1]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    assert lines[2]["finished_worker_ids"] == [*NAMES]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(config).tensors.values())


@pytest.mark.parametrize("method", ["mergesfl", "without merging", "splitfed-v1", "splitfed-v2"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("magnitude", [3e38, 1e30])
def test_only_the_worker_with_features_out_of_all_proportion_is_put_out(
    tmp_path: Path, magnitude: float, step: int, method: str
) -> None:
    config = small_config(tmp_path, *METHODS[method], "training.local_steps=3", "training.learning_rate=0.1")
    cluster = ScriptedCluster(config)
    huge = features_with(lambda f: {"features": np.full_like(f.features, magnitude)})
    cluster["worker-01"].script = at(1, step, lambda worker, answer: huge(answer))
    cluster.run()
    lines = journal_of(config)
    assert [line["attempt"] for line in lines] == [1, 2, 1]
    assert [lost["worker_id"] for lost in lines[1]["dropped"]] == [NAMES[1]]
    (refusal,) = cluster["worker-01"].told(Refuse)
    assert f"sent features up to {magnitude:.3g}, the limit is 1e+06" in refusal.reason
    assert lines[1]["finished_worker_ids"] == lines[2]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    assert cluster["worker-00"].told(Refuse) == cluster["worker-02"].told(Refuse) == []
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(config).tensors.values())


@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1"])
def test_a_training_that_becomes_infinite_ends_with_the_name_of_the_setting_and_closes_nobody(
    tmp_path: Path, method: str
) -> None:
    """All workers' numbers grow together, as with a learning rate that is too high."""

    def grow(worker: ScriptedWorker, answer: Message) -> Message:
        return features_with(lambda f: {"features": f.features * np.float32(1e30)})(answer)

    settings = ("cluster.max_void_rounds=3", "training.num_rounds=1", "training.learning_rate=0.5")
    config = small_config(tmp_path, *METHODS[method], *settings)
    cluster = ScriptedCluster(config)
    for worker in cluster.workers:
        worker.script = at(0, 0, grow)
    expected = r"round 0 was void 3 times in a row .* start a new run with training.learning_rate below 0.5"
    with pytest.raises(QuorumError, match=expected):
        cluster.run()
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(config).tensors.values())
    assert all(worker.told(Refuse) == [] for worker in cluster.workers)


def test_garbage_in_the_middle_of_a_round_closes_its_sender_only(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)

    def babble(worker: ScriptedWorker, answer: Message) -> None:
        worker.say([b"\xc1 not msgpack", b"x"])

    cluster["worker-00"].script = at(1, 0, babble)
    cluster.run()
    lines = journal_of(config)
    assert "no msgpack" in lines[1]["dropped"][0]["reason"]
    assert lines[2]["worker_ids"] == [*NAMES[1:]]


# The quorum.

METHODS = {
    "mergesfl": ("method.name=mergesfl", ALL),
    "without merging": ("method.name=mergesfl", "method.merging=false", ALL),
    "splitfed-v1": ("method.name=splitfed-v1",),
    "splitfed-v2": ("method.name=splitfed-v2",),
    "fedavg": ("method.name=fedavg",),
}


def play_void(tmp_path: Path, name: str, settings: tuple[str, ...]) -> ScriptedCluster:
    """All three must answer; in round 1 worker-01 is 30 s late the first time: void. 30 s later it is repeated."""
    config = small_config(
        tmp_path, f"name={name}", *settings, "cluster.quorum_fraction=1.0", "cluster.step_deadline_seconds=5.0"
    )
    cluster = ScriptedCluster(config)
    times: list[int] = []

    def late_once(worker: ScriptedWorker, answer: Message) -> Message | None:
        times.append(1)
        return late(30.0)(worker, answer) if len(times) == 1 else answer

    cluster["worker-01"].script = at(1, None if "fedavg" in settings[0] else 1, late_once)
    cluster.run()
    return cluster


@pytest.mark.parametrize("method", METHODS)
def test_a_void_round_leaves_no_trace_in_the_model(tmp_path: Path, method: str) -> None:
    undisturbed = ScriptedCluster(small_config(tmp_path, "name=calm", *METHODS[method]))
    undisturbed.run()
    disturbed = play_void(tmp_path, "void", METHODS[method])
    assert same_tensors(checkpoint_of(undisturbed.config), checkpoint_of(disturbed.config))
    calm, void = journal_of(undisturbed.config), journal_of(disturbed.config)
    assert [line["attempt"] for line in void] == [1, 2, 1]
    extra = () if method == "mergesfl" else ("observed_seconds", "idle_seconds")
    assert without(calm, *DISTURBED, *extra) == without(void, *DISTURBED, *extra)
    assert void[1]["ingress_bytes"] > calm[1]["ingress_bytes"]  # what the void attempt cost is counted
    assert void[1]["round_seconds"] == pytest.approx(30.0, abs=0.3)
    assert [lost["worker_id"] for lost in void[1]["dropped"]] == [NAMES[1]]
    mu, beta = checkpoint_of(disturbed.config).state["fleet"]["estimates"]["workers"][NAMES[1]]
    calm_mu, calm_beta = checkpoint_of(undisturbed.config).state["fleet"]["estimates"]["workers"][NAMES[1]]
    assert mu > calm_mu + 0.05  # that it missed a deadline of 5 s (per 8 samples, alpha 0.8) is known
    assert method == "fedavg" or beta < calm_beta
    # A split worker is released while it waits for its gradient; a federated one has finished and has nothing to drop.
    expected = [] if method == "fedavg" else [Release(wire_round(1, 1), "2 of 3 workers are left, 3 are needed")]
    assert disturbed["worker-00"].told(Release) == expected
    assert disturbed.clock.seconds == pytest.approx(30.0, abs=0.3)  # repeated as soon as worker-01 was heard


def test_the_test_above_sees_a_state_that_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = ScriptedCluster(small_config(tmp_path, "name=calm", ALL))
    undisturbed.run()
    monkeypatch.setattr(SplitProgram, "load_state_dict", lambda self, state: None)
    disturbed = play_void(tmp_path, "void", (ALL,))
    assert not same_tensors(checkpoint_of(undisturbed.config), checkpoint_of(disturbed.config))


def test_too_many_void_rounds_end_the_run_with_the_last_closed_round_saved(tmp_path: Path) -> None:
    settings = ("cluster.quorum_fraction=0.7", "cluster.step_deadline_seconds=5.0", "cluster.max_void_rounds=2")
    config = small_config(tmp_path, ALL, *settings, "output.checkpoint_every_rounds=100")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, 1, late(6.0))
    with pytest.raises(QuorumError, match=r"round 1 was void 2 times in a row \(cluster.max_void_rounds\)"):
        cluster.run()
    assert [message.round_num for message in cluster["worker-01"].told(Assign)] == [1, 101, 102]
    assert len(journal_of(config)) == 1
    one_round = ScriptedCluster(small_config(tmp_path, "name=one", ALL, "training.num_rounds=1"))
    one_round.run()
    assert checkpoint_of(config).round_num == 1
    assert same_tensors(checkpoint_of(config), checkpoint_of(one_round.config))
    assert cluster["worker-00"].told(Goodbye) == [Goodbye("the parameter server stopped")]


def test_a_fleet_that_stays_below_the_quorum_ends_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL, "cluster.quorum_fraction=0.7", "cluster.start_deadline_seconds=40.0")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, 1, vanish)
    expected = r"2 of 3 workers are left, 3 are needed \(cluster.quorum_fraction\)"
    with pytest.raises(QuorumError, match=expected):
        cluster.run()
    assert checkpoint_of(config).round_num == 1
    assert 40.0 <= cluster.clock.seconds <= 42.0  # at most a probe and a poll on top


def test_a_round_begins_with_a_quorum_of_the_fleet_only(tmp_path: Path) -> None:
    """worker-01 and worker-02 leave after round 0; 7 s later worker-01 is back, and 2 of 3 are enough."""
    config = small_config(tmp_path, ALL, "training.num_rounds=2")
    cluster = ScriptedCluster(config)

    def answer_and_leave(worker: ScriptedWorker, answer: Message) -> None:
        worker.say(answer)
        worker.say(Leave("lunch"))
        if worker.worker_id == NAMES[1]:
            cluster.add(NAMES[1])
            (late_message,) = cluster.workers[-1]._outbox
            cluster.workers[-1]._outbox = [(cluster.clock.seconds + 7.0, late_message[1])]

    for name in NAMES[1:]:
        cluster[name].script = at(0, None, answer_and_leave)
    cluster.run()
    assert [line["worker_ids"] for line in journal_of(config)] == [[*NAMES], [*NAMES[:2]]]
    assert cluster.clock.seconds == pytest.approx(7.0)


def test_a_start_without_a_quorum_names_the_numbers(tmp_path: Path) -> None:
    config = small_config(tmp_path, "cluster.start_deadline_seconds=30.0", "cluster.quorum_fraction=0.5")
    cluster = ScriptedCluster(config, names=NAMES[:1])
    expected = (
        r"1 of 3 workers registered within 30 s \(cluster.start_deadline_seconds\), 2 are needed: start the others"
    )
    with pytest.raises(QuorumError, match=expected):
        cluster.run()
    assert cluster.clock.seconds == pytest.approx(30.0)
    assert cluster["worker-00"].told(Goodbye) == [Goodbye("the parameter server stopped")]


def test_a_start_with_a_quorum_begins_at_the_deadline_and_takes_in_the_last_worker_later(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, ALL, "cluster.start_deadline_seconds=30.0", "cluster.quorum_fraction=0.5", "training.num_rounds=2"
    )
    cluster = ScriptedCluster(config, names=NAMES[:2])

    def bring_a_friend(worker: ScriptedWorker, answer: Message) -> Message:
        cluster.add(NAMES[2])
        return answer

    cluster["worker-00"].script = at(0, 0, bring_a_friend)
    cluster.run()
    assert cluster.clock.seconds == pytest.approx(30.0)
    assert [line["worker_ids"] for line in journal_of(config)] == [[*NAMES[:2]], [*NAMES]]


def test_when_the_last_worker_with_samples_is_gone_the_run_is_saved(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL, "cluster.num_workers=2", "cluster.start_deadline_seconds=20.0")
    cluster = ScriptedCluster(config, names=NAMES[:1])
    cluster.add("without", label_counts=(0, 0, 0))

    def answer_and_leave(worker: ScriptedWorker, answer: Message) -> None:
        worker.say(answer)
        worker.say(Leave("done"))

    cluster["worker-00"].script = at(0, None, answer_and_leave)
    with pytest.raises(QuorumError, match="none of the 1 workers that are here has samples"):
        cluster.run()
    assert checkpoint_of(config).round_num == 1
    assert cluster["without"].told(Assign) == []
    assert cluster.clock.seconds == pytest.approx(20.0)


def test_a_fleet_without_any_sample_is_told_so(tmp_path: Path) -> None:
    config = small_config(tmp_path, "cluster.num_workers=1")
    cluster = ScriptedCluster(config, names=())
    cluster.add("without", label_counts=())
    with pytest.raises(QuorumError, match="none of the 1 workers that are here has samples"):
        cluster.run()


# Stopping and going on. With regulation, so that plans depend on what was learnt before.

FIVE = ("training.num_rounds=5", "control.estimate_memory=0.5")


def stop_in(cluster: ScriptedCluster, round_num: int) -> Callable[[], None]:
    """Asks to stop when the first features of this round have come."""

    def check() -> None:
        if any(isinstance(e.message, Features) and round_of(e.message.round_num) == round_num
               for e in cluster.endpoint.log):  # fmt: skip
            raise InterruptedRunError("asked to stop")

    return check


def interrupted(tmp_path: Path, round_num: int, *settings: str) -> ScriptedCluster:
    cluster = ScriptedCluster(small_config(tmp_path, "name=stopped", *FIVE, *settings))
    with pytest.raises(InterruptedRunError):
        cluster.run(check=stop_in(cluster, round_num))
    return cluster


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = ScriptedCluster(small_config(tmp_path, "name=whole", *FIVE))
    whole_summary = whole.run()
    sizes = [line["batch_sizes"] for line in journal_of(whole.config)]
    assert sizes[0] != sizes[1]  # the plans do depend on what was learnt
    stopped = interrupted(tmp_path, 2, "output.checkpoint_every_rounds=100")
    assert checkpoint_of(stopped.config).round_num == 2
    assert len(journal_of(stopped.config)) == 2
    assert not (stopped.config.run_folder / "summary.json").exists()
    for worker in stopped.workers:
        assert worker.told(Release) == [Release(wire_round(2, 1), "asked to stop")]
        assert worker.told(Goodbye) == [Goodbye("the parameter server stopped")]
    assert not same_tensors(checkpoint_of(whole.config), checkpoint_of(stopped.config))
    resumed = ScriptedCluster(stopped.config)
    summary = resumed.run(resume=True)
    assert same_tensors(checkpoint_of(whole.config), checkpoint_of(resumed.config))
    assert checkpoint_of(whole.config).state["fleet"] == checkpoint_of(resumed.config).state["fleet"]
    assert journal_of(whole.config) == journal_of(resumed.config)
    assert without([summary], "wall_seconds") == without([whole_summary], "wall_seconds")


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path: Path) -> None:
    whole = ScriptedCluster(small_config(tmp_path, "name=whole", *FIVE))
    whole.run()
    short = ScriptedCluster(small_config(tmp_path, "name=short", *FIVE, "training.num_rounds=2"))
    assert short.run()["num_rounds"] == 2
    longer = ScriptedCluster(small_config(tmp_path, "name=short", *FIVE))
    assert longer.run(resume=True)["num_rounds"] == 5
    assert same_tensors(checkpoint_of(whole.config), checkpoint_of(longer.config))
    assert [message.round_num for message in longer["worker-00"].told(Assign)] == [201, 301, 401]


def test_a_run_that_is_complete_is_resumed_without_workers(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    summary = ScriptedCluster(config).run()
    (config.run_folder / "summary.json").unlink()
    again = ScriptedCluster(config, names=())
    assert without([again.run(resume=True)], "wall_seconds") == without([summary], "wall_seconds")
    assert again.clock.seconds == 0.0
    assert (config.run_folder / "summary.json").exists()


def test_a_worker_that_reports_no_time_is_not_taken_for_infinitely_fast(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    cluster = ScriptedCluster(config, names=NAMES[:2])
    cluster.add(NAMES[2], seconds_per_sample=0.0)
    cluster.run()
    estimates = checkpoint_of(config).state["fleet"]["estimates"]["workers"]
    assert estimates[NAMES[2]] == pytest.approx([1e-6, 0.0005])
    assert estimates[NAMES[0]] == pytest.approx([0.001, 0.0005])


def test_wall_seconds_count_both_parts_of_a_run(tmp_path: Path) -> None:
    def play(num_rounds: int, resume: bool) -> float:
        cluster = ScriptedCluster(small_config(tmp_path, ALL, f"training.num_rounds={num_rounds}"))
        cluster["worker-01"].script = at(num_rounds - 1, 0, late(3.0))
        return float(cluster.run(resume)["wall_seconds"])

    assert play(1, False) == pytest.approx(3.0)
    assert play(2, True) == pytest.approx(6.0)


def test_resuming_before_the_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    whole = ScriptedCluster(small_config(tmp_path, "name=whole", *FIVE))
    whole.run()
    stopped = interrupted(tmp_path, 1)
    shutil.rmtree(stopped.config.run_folder / "checkpoints")
    resumed = ScriptedCluster(stopped.config)
    resumed.run(resume=True)
    assert same_tensors(checkpoint_of(whole.config), checkpoint_of(resumed.config))
    assert [line["round_num"] for line in journal_of(resumed.config)] == [0, 1, 2, 3, 4]


def test_a_wish_to_stop_while_waiting_for_workers_ends_the_run(tmp_path: Path) -> None:
    cluster = ScriptedCluster(small_config(tmp_path), names=NAMES[:2])

    def check() -> None:
        if cluster.clock.seconds >= 1.0:
            raise InterruptedRunError("asked to stop")

    with pytest.raises(InterruptedRunError) as caught:
        cluster.run(check=check)
    assert caught.value.exit_code == 130
    assert isinstance(caught.value, MergeSFLError) and not isinstance(caught.value, ConfigError)
    assert cluster.clock.seconds <= 1.2


# Bytes and order.


def test_the_bytes_of_the_journal_are_those_of_the_messages(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL)
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, 1, late(3.0))  # some probes, too
    summary = cluster.run()
    log = cluster.endpoint.log
    begin = 1 + max(index for index, one in enumerate(log) if isinstance(one.message, Ready))
    rounds = [one for one in log[begin:] if not isinstance(one.message, Goodbye)]
    assert not any(isinstance(one.message, Welcome) for one in rounds)
    for direction, key in (("in", "ingress_bytes"), ("out", "egress_bytes")):
        expected = sum(one.num_bytes for one in rounds if one.direction == direction)
        assert summary[key] == expected == sum(line[key] for line in journal_of(config))
    # By hand: 3 rounds x 3 workers x 2 steps of 8 samples x 512 bytes at the cut, each way; the rest is small.
    features = sum(one.num_bytes for one in log if isinstance(one.message, Features))
    gradients = sum(one.num_bytes for one in log if isinstance(one.message, Gradient))
    assert 0 < features - 18 * 8 * (512 + 8) < 18 * 300  # labels of 8 bytes; headers
    assert 0 < gradients - 18 * 8 * 512 < 18 * 300


def test_the_merged_sequence_is_in_plan_order_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    calm = ScriptedCluster(small_config(tmp_path, "name=calm", ALL))
    calm.run()
    turned = ScriptedCluster(small_config(tmp_path, "name=turned", ALL))
    for index, worker in enumerate(turned.workers):
        delay = 0.5 - 0.1 * index  # the last of the plan is the first to answer

        def slow(worker: ScriptedWorker, answer: Message, delay: float = delay) -> Message | None:
            if isinstance(answer, Ready):
                return answer
            return late(delay)(worker, answer)

        worker.script = slow
    turned.run()
    arrivals = [entry.peer for entry in turned.endpoint.log if isinstance(entry.message, Features)]
    assert arrivals[:3] == [worker.endpoint._peer for worker in turned.workers][::-1]
    assert same_tensors(checkpoint_of(calm.config), checkpoint_of(turned.config))
    held = [message.held_seconds for message in turned[NAMES[2]].told(Gradient)]
    assert held == pytest.approx([0.2] * len(held))  # it waited for the slowest, 0.5 - 0.3 s
