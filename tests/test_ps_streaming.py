"""Rounds whose features are processed as they arrive, under every disturbance, on a clock moved by hand.

Legend: d samples of one worker's step, F... shape of one sample at the cut.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesfl.config import RunConfig
from mergesfl.data import load_dataset
from mergesfl.errors import ConfigError, QuorumError
from mergesfl.methods import split_program
from mergesfl.models import build_model, cnn_har
from mergesfl.protocol.messages import Features, Gradient, Leave, Message, Pong, Refuse, Release, Update, wire_round
from mergesfl.runtime.patience import REAL
from ps.run import build_network
from ps.streaming import StreamingExchange
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    NAMES,
    Logged,
    ScriptedCluster,
    ScriptedWorker,
    at,
    checkpoint_of,
    journal_of,
    late,
    play_daemons,
    same_tensors,
    small_config,
)

torch.set_num_threads(1)

ALL = "method.regulation=false"  # all three workers are in every plan, each with batches of 8
FAST, IN_ORDER = "training.merge=streaming", "training.merge=streaming-in-order"


def cluster_of(folder: Path, *settings: str) -> ScriptedCluster:
    return ScriptedCluster(small_config(folder, ALL, *settings))


def every_step(delays_seconds: Sequence[float]) -> Callable[[ScriptedWorker, Message], Message | None]:
    """Step k of every round takes so long; the update comes at once."""

    def script(worker: ScriptedWorker, answer: Message) -> Message | None:
        if isinstance(answer, Features) and delays_seconds[answer.step]:
            return late(delays_seconds[answer.step])(worker, answer)
        return answer

    return script


def passed(cluster: ScriptedCluster) -> list[tuple[str, str, str, int, float]]:
    """(in or out, worker, kind, step, seconds) of features and gradients of round 0."""
    names = {worker.endpoint._peer: worker.worker_id for worker in cluster.workers}
    return [
        (one.direction, names[one.peer], type(one.message).__name__, one.message.step, one.seconds)
        for one in cluster.endpoint.log
        if isinstance(one.message, Features | Gradient) and one.message.round_num == wire_round(0, 1)
    ]


# What it is for.


def test_different_stragglers_in_different_steps_cost_the_largest_sum(tmp_path: Path) -> None:
    """By hand, tau = 2. worker-00 takes 4 s in step 0, worker-01 takes 4 s in step 1, all else takes nothing.

    Barrier: 4 + 4 s. Streaming: worker-01 has its answer to step 0 at once, and its step 1 is there at 4 s, when
    worker-00's step 0 is: 4 s. Waiting at the barrier: worker-00 waits 4 s in step 1, worker-01 in step 0, worker-02 in
    both: 16 / 3. Streaming: worker-00 never waits; worker-01 never; worker-02 sends step 1 at once and has it held for
    4 s: 4 / 3.
    """
    seconds, waits = {}, {}
    for merge in ("barrier", FAST, IN_ORDER):
        cluster = cluster_of(tmp_path, f"name={merge[-5:]}", "training.num_rounds=1")
        if merge != "barrier":
            cluster = cluster_of(tmp_path, f"name={merge[-5:]}", "training.num_rounds=1", merge)
        cluster["worker-00"].script = every_step([4.0, 0.0])
        cluster["worker-01"].script = every_step([0.0, 4.0])
        cluster.run()
        (line,) = journal_of(cluster.config)
        assert line["finished_worker_ids"] == [*NAMES] and line["samples_trained"] == 3 * 2 * 8
        seconds[merge], waits[merge] = line["round_seconds"], line["waiting_seconds"]
    assert seconds == pytest.approx({"barrier": 8.0, FAST: 4.0, IN_ORDER: 4.0})
    assert waits == pytest.approx({"barrier": 16 / 3, FAST: 4 / 3, IN_ORDER: 4 / 3})


def test_one_step_ahead_and_never_more(tmp_path: Path) -> None:
    """worker-02 takes 3 s per step of three. The others are answered at once in step 0, send step 1 at once, and are
    answered when worker-02's step 0 is in, at 3 s: held for 3 s. Step 2 waits from 3 to 6 s, and is answered then."""
    cluster = cluster_of(tmp_path, FAST, "training.num_rounds=1", "training.local_steps=3")
    cluster["worker-02"].script = every_step([3.0, 3.0, 3.0])
    cluster.run()
    told = {name: [(one.step, one.held_seconds) for one in cluster[name].told(Gradient)] for name in NAMES}
    assert told[NAMES[0]] == told[NAMES[1]] == [(0, 0.0), (1, pytest.approx(3.0)), (2, pytest.approx(3.0))]
    assert told[NAMES[2]] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    log = passed(cluster)
    assert [one[4] for one in log if one[:4] == ("in", NAMES[0], "Features", 1)] == [0.0]
    assert [one[4] for one in log if one[:4] == ("out", NAMES[0], "Gradient", 1)] == [pytest.approx(3.0)]
    assert [one[4] for one in log if one[:4] == ("in", NAMES[0], "Features", 2)] == [pytest.approx(3.0)]
    slowest_done = log.index(("out", NAMES[2], "Gradient", 0, pytest.approx(3.0)))
    assert all(log.index(one) > slowest_done for one in log if one[0] == "out" and one[3] == 1)  # not before the step
    assert journal_of(cluster.config)[0]["round_seconds"] == pytest.approx(9.0)


def like_the_barrier(tmp_path: Path, *settings: str) -> tuple[ScriptedCluster, ScriptedCluster]:
    """The same run at the barrier and with these settings and workers that differ, which must have trained the same."""
    calm = cluster_of(tmp_path, "name=calm")
    calm.run()
    other = cluster_of(tmp_path, "name=other", *settings)
    for index, worker in enumerate(other.workers):
        worker.script = every_step([0.3 * (3 - index), 0.2 * (1 + index)])
    other.run()
    for name, tensor in checkpoint_of(calm.config).tensors.items():
        assert torch.allclose(checkpoint_of(other.config).tensors[name], tensor, rtol=0, atol=1e-5), name
    for line, again in zip(journal_of(calm.config), journal_of(other.config), strict=True):
        assert again["train_loss_nats"] == pytest.approx(line["train_loss_nats"], abs=1e-5)
        assert again["samples_trained"] == line["samples_trained"]
    return calm, other


@pytest.mark.parametrize("merge", [FAST, IN_ORDER])
def test_it_trains_what_the_barrier_trains(tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, whose masks differ; the features of a scripted worker do not depend on what it is told."""
    monkeypatch.setattr(cnn_har, "DROPOUT", 0.0)
    calm, other = like_the_barrier(tmp_path, merge)
    told = zip(calm[NAMES[1]].told(Gradient), other[NAMES[1]].told(Gradient), strict=True)
    assert all(np.allclose(one.gradient, again.gradient, rtol=0, atol=1e-5) for one, again in told)


@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1", "smofi"])
def test_in_order_the_order_of_arrival_leaves_no_bit(tmp_path: Path, method: str) -> None:
    """With dropout. The last of the plan first, and the first first: equal parameters, and equal losses."""
    clusters = []
    for name, factor in (("forth", 0.1), ("back", -0.1)):
        cluster = cluster_of(tmp_path, f"name={name}", IN_ORDER, f"method.name={method}")
        for index, worker in enumerate(cluster.workers):
            worker.script = every_step([0.5 + factor * index, 0.5 - factor * index])
        cluster.run()
        clusters.append(cluster)
    one, other = (passed(cluster) for cluster in clusters)
    arrivals = [[entry[1] for entry in log if entry[0] == "in" and entry[3] == 0] for log in (one, other)]
    assert arrivals == [[*NAMES], [*NAMES[::-1]]]
    assert same_tensors(checkpoint_of(clusters[0].config), checkpoint_of(clusters[1].config))
    losses = [[line["train_loss_nats"] for line in journal_of(cluster.config)] for cluster in clusters]
    assert losses[0] == losses[1]


def test_a_top_for_each_worker_streams_to_the_bits_of_the_barrier(tmp_path: Path) -> None:
    runs = []
    for name, *merge in (("calm",), ("streamed", FAST)):
        cluster = cluster_of(tmp_path, f"name={name}", "method.merging=false", *merge)
        cluster["worker-00"].script = every_step([0.4, 0.0])
        cluster.run()
        runs.append(checkpoint_of(cluster.config))
    assert same_tensors(*runs)


# Disturbances, as at the barrier (tests/test_ps_server.py).


def test_a_worker_that_is_too_slow_is_dropped_and_the_step_goes_on_without_it(tmp_path: Path) -> None:
    """Deadline 5 s. worker-01 answers step 1 after 8 s: step 1 closes 5 s after its gradient, that is at 5 s."""
    cluster = cluster_of(tmp_path, FAST, "cluster.step_deadline_seconds=5.0", "training.num_rounds=2")
    cluster["worker-01"].script = at(0, 1, late(8.0))
    cluster.run()
    lines = journal_of(cluster.config)
    reason = "no answer within 5 s (cluster.step_deadline_seconds)"
    assert lines[0]["dropped"] == [{"worker_id": NAMES[1], "step": 1, "reason": reason}]
    assert lines[0]["finished_worker_ids"] == lines[1]["worker_ids"] == [NAMES[0], NAMES[2]]
    assert lines[0]["samples_trained"] == 3 * 8 + 2 * 8
    assert lines[0]["round_seconds"] == pytest.approx(5.0)
    assert cluster["worker-01"].told(Release) == [Release(wire_round(0, 1), reason)]


def test_every_worker_has_the_deadline_from_its_own_last_answer_on(tmp_path: Path) -> None:
    """Deadline 5 s. worker-00 takes 4 s in both steps: each in time, though step 0 of all is not closed before 4 s.
    worker-01 is answered in step 0 at 0 s and takes 4.5 s in step 1: there at 4.5 s, long before it would be late."""
    cluster = cluster_of(tmp_path, FAST, "cluster.step_deadline_seconds=5.0", "training.num_rounds=1")
    cluster["worker-00"].script = every_step([4.0, 4.0])
    cluster["worker-01"].script = every_step([0.0, 4.5])
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert line["dropped"] == [] and line["round_seconds"] == pytest.approx(8.0)


def test_a_late_update_is_dropped_with_the_number_of_steps_as_its_step(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FAST, "cluster.step_deadline_seconds=5.0", "training.num_rounds=1")
    cluster["worker-02"].script = at(0, None, late(5.5))
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert [(lost["worker_id"], lost["step"]) for lost in line["dropped"]] == [(NAMES[2], 2)]
    assert line["samples_trained"] == 2 * 3 * 8


def test_an_update_that_comes_while_the_last_step_is_open_is_kept(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FAST, "training.num_rounds=1")
    cluster["worker-02"].script = every_step([0.0, 3.0])
    cluster.run()
    entries = [one for one in cluster.endpoint.log if isinstance(one.message, Update)]
    assert [one.seconds for one in entries] == [0.0, 0.0, pytest.approx(3.0)]
    assert journal_of(cluster.config)[0]["finished_worker_ids"] == [*NAMES]
    assert journal_of(cluster.config)[0]["waiting_seconds"] == pytest.approx(2.0)  # two waited 3 s for the last update


def vanish(worker: ScriptedWorker, answer: Message) -> None:
    worker.vanish()


@pytest.mark.parametrize("step", [0, 1, None])
def test_an_unreachable_worker_is_dropped_within_the_probe_interval(tmp_path: Path, step: int | None) -> None:
    cluster = cluster_of(tmp_path, FAST, "cluster.step_deadline_seconds=3600.0")
    cluster["worker-01"].script = at(1, step, vanish)
    cluster.run()
    lines = journal_of(cluster.config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 2 if step is None else step)
    assert lost["reason"].startswith("unreachable: ")
    assert 0.0 < lines[1]["round_seconds"] <= REAL.probe_seconds + 0.2
    assert lines[2]["worker_ids"] == [NAMES[0], NAMES[2]]


def test_a_worker_that_goes_while_it_is_ahead_counts_in_the_step_that_it_was_in(tmp_path: Path) -> None:
    """worker-01 leaves instead of sending step 1, while worker-02's step 0 takes 3 s: 3 x 8 samples in step 0."""
    cluster = cluster_of(tmp_path, FAST, "training.num_rounds=1")
    cluster["worker-01"].script = at(0, 1, lambda worker, answer: Leave("power off"))
    cluster["worker-02"].script = every_step([3.0, 0.0])
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert line["dropped"] == [{"worker_id": NAMES[1], "step": 1, "reason": "left: power off"}]
    assert line["samples_trained"] == 3 * 8 + 2 * 8


def test_a_worker_that_computes_for_hours_is_not_drowned_in_probes(tmp_path: Path) -> None:
    """The others keep arriving meanwhile: a wait that begins anew must not begin its probes anew."""
    cluster = cluster_of(
        tmp_path, FAST, "cluster.step_deadline_seconds=10000.0", "training.num_rounds=1", "training.local_steps=1"
    )
    cluster["worker-01"].script = every_step([9000.0])
    cluster["worker-02"].script = every_step([4000.0])
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert line["dropped"] == []
    assert 3 <= len(cluster["worker-01"].told(Pong)) < 64


def spoilt(value: float) -> Callable[[ScriptedWorker, Message], Message]:
    def script(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Features)
        return dataclasses.replace(answer, features=np.full_like(answer.features, value))

    return script


@pytest.mark.parametrize("step", [0, 1])
def test_features_that_are_not_finite_cost_their_worker_the_round(tmp_path: Path, step: int) -> None:
    cluster = cluster_of(tmp_path, FAST)
    cluster["worker-01"].script = at(1, step, spoilt(np.nan))
    cluster["worker-02"].script = at(1, 0, late(2.0))  # so that the step 1 of worker-01 arrives while step 0 is open
    cluster.run()
    lines = journal_of(cluster.config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], step) and "not finite" in lost["reason"]
    assert cluster["worker-01"].told(Release) == [Release(wire_round(1, 1), lost["reason"])]
    assert lines[1]["samples_trained"] == (3 * 8 if step else 2 * 8) + 2 * 8
    assert lines[2]["finished_worker_ids"] == [*NAMES]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(cluster.config).tensors.values())


@pytest.mark.parametrize("merge", [FAST, IN_ORDER])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("magnitude", [3e38, 1e30])
def test_only_the_worker_with_features_out_of_all_proportion_is_put_out(
    tmp_path: Path, magnitude: float, first: bool, merge: str
) -> None:
    """Also when it is the first to answer, and there is nobody yet to compare it with."""
    cluster = cluster_of(tmp_path, merge, "training.local_steps=3", "training.learning_rate=0.1")
    cluster["worker-01"].script = at(1, 1, spoilt(magnitude))
    for name in (NAMES[0], NAMES[2]) if first else ():
        cluster[name].script = at(1, 1, late(1.0))
    cluster.run()
    lines = journal_of(cluster.config)
    assert [line["attempt"] for line in lines] == [1, 2, 1]
    (refusal,) = cluster["worker-01"].told(Refuse)
    assert f"sent features up to {magnitude:.3g}, the limit is 1e+06" in refusal.reason
    assert lines[1]["finished_worker_ids"] == lines[2]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    assert cluster["worker-00"].told(Refuse) == cluster["worker-02"].told(Refuse) == []


def test_a_void_round_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    """worker-01 is 30 s late in step 1 of round 1, all must answer: void, while the others are one step ahead."""
    calm = cluster_of(tmp_path, "name=calm", IN_ORDER, "training.local_steps=3")
    calm.run()
    void = cluster_of(
        tmp_path,
        *("name=void", IN_ORDER, "training.local_steps=3"),
        *("cluster.quorum_fraction=1.0", "cluster.step_deadline_seconds=5.0"),
    )
    times: list[int] = []

    def late_once(worker: ScriptedWorker, answer: Message) -> Message | None:
        times.append(1)
        return late(30.0)(worker, answer) if len(times) == 1 else answer

    void["worker-01"].script = at(1, 1, late_once)
    void.run()
    assert [line["attempt"] for line in journal_of(void.config)] == [1, 2, 1]
    assert same_tensors(checkpoint_of(calm.config), checkpoint_of(void.config))
    # Answered in step 1, ahead in step 2 when it ends: released while their features wait on the server.
    assert void["worker-00"].told(Release) == [Release(wire_round(1, 1), "2 of 3 workers are left, 3 are needed")]
    told = [one.step for one in void["worker-00"].told(Gradient) if one.round_num == wire_round(1, 1)]
    assert told == [0, 1]


def test_too_many_void_rounds_end_the_run(tmp_path: Path) -> None:
    settings = ("cluster.quorum_fraction=0.7", "cluster.step_deadline_seconds=5.0", "cluster.max_void_rounds=2")
    cluster = cluster_of(tmp_path, FAST, *settings)
    cluster["worker-01"].script = at(1, 1, late(6.0))
    with pytest.raises(QuorumError, match="round 1 was void 2 times in a row"):
        cluster.run()
    assert checkpoint_of(cluster.config).round_num == 1


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = cluster_of(tmp_path, "name=whole", IN_ORDER)
    whole.run()
    stopped = cluster_of(tmp_path, "name=stopped", IN_ORDER)

    def check() -> None:
        if any(_is_step_1_of_round_1(one) for one in stopped.endpoint.log):
            raise InterruptedRunError("asked to stop")

    stopped["worker-02"].script = every_step([0.5, 0.0])  # the others are ahead
    with pytest.raises(InterruptedRunError):
        stopped.run(check=check)
    assert checkpoint_of(stopped.config).round_num == 1
    resumed = ScriptedCluster(stopped.config)
    resumed.run(resume=True)
    assert same_tensors(checkpoint_of(whole.config), checkpoint_of(resumed.config))


def _is_step_1_of_round_1(entry: Logged) -> bool:
    message = entry.message
    return isinstance(message, Features) and (message.round_num, message.step) == (wire_round(1, 1), 1)


# At the door.


def run_of(config: RunConfig) -> None:
    ScriptedCluster(config, names=()).run()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("method.name=splitfed-v2",), "'splitfed-v2' needs all features"),
        (("method.name=fedavg",), "'fedavg' needs all features of a step at once, or none"),
        (("method.name=mergesfl+", "method.logit_adjustment=true"), "method.logit_adjustment = true"),
    ],
)
def test_what_cannot_stream_is_refused_before_anything_starts(
    tmp_path: Path, settings: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        run_of(small_config(tmp_path, FAST, *settings))


def test_the_policies_are_named_when_one_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.merge.*'barrier', 'streaming' or 'streaming-in-order'"):
        small_config(tmp_path, "training.merge=stream")


# Steps in parts: batches of 8 in parts of 4, or of 3, 3 and 2.

TWO, THREE = "training.parts_per_step=2", "training.parts_per_step=3"


def test_a_part_is_answered_while_the_next_is_under_way(tmp_path: Path) -> None:
    """By hand: part 1 comes 3 s after part 0, and every gradient is sent when its part is there; so in both steps."""
    cluster = cluster_of(tmp_path, FAST, TWO, "training.num_rounds=1")
    for worker in cluster.workers:
        worker.script = lambda worker, answer: (
            late(3.0)(worker, answer) if isinstance(answer, Features) and answer.part else answer
        )
    cluster.run()
    passed_parts = [
        (one.direction, one.message.step, one.message.part, one.seconds)
        for one in cluster.endpoint.log
        if isinstance(one.message, Features | Gradient) and one.peer == cluster["worker-01"].endpoint._peer
    ]
    assert passed_parts == [
        (direction, step, part, pytest.approx(3.0 * (step + part)))
        for step in range(2)
        for part in range(2)
        for direction in ("in", "out")
    ]
    told = cluster["worker-01"].told(Gradient)
    assert [one.gradient.shape[0] for one in told] == [4] * 4 and {one.held_seconds for one in told} == {0.0}
    (line,) = journal_of(cluster.config)
    assert line["samples_trained"] == 3 * 2 * 8 and line["round_seconds"] == pytest.approx(6.0)


def test_parts_that_wait_together_wait_once(tmp_path: Path) -> None:
    """worker-02's step 0 takes 3 s; both parts of the others' step 1 are there at once and are held for 3 s."""
    cluster = cluster_of(tmp_path, FAST, TWO, "training.num_rounds=1")
    cluster["worker-02"].script = every_step([3.0, 0.0])
    cluster.run()
    held = [(one.step, one.part, one.held_seconds) for one in cluster["worker-00"].told(Gradient)]
    assert held == [(0, 0, 0.0), (0, 1, 0.0), (1, 0, pytest.approx(3.0)), (1, 1, pytest.approx(3.0))]
    assert journal_of(cluster.config)[0]["waiting_seconds"] == pytest.approx((3.0 + 3.0 + 0.0) / 3)


@pytest.mark.parametrize("merge", [FAST, IN_ORDER])
@pytest.mark.parametrize("parts", [TWO, THREE, "training.parts_per_step=8"])
def test_in_parts_it_trains_what_the_barrier_trains(
    tmp_path: Path, merge: str, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features are the rows of the unsplit ones, so the gradients must be the rows of the unsplit ones, too."""
    monkeypatch.setattr(cnn_har, "DROPOUT", 0.0)
    calm, other = like_the_barrier(tmp_path, merge, parts)
    whole = np.concatenate([one.gradient for one in calm[NAMES[1]].told(Gradient)])
    split = np.concatenate([one.gradient for one in other[NAMES[1]].told(Gradient)])
    assert np.allclose(whole, split, rtol=0, atol=1e-5) and np.abs(whole).max() > 1e-3


@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1"])
def test_real_daemons_train_in_parts_what_they_train_unsplit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Bottoms and tops after two rounds of three steps, unequal batches (declared speeds); a part more or less is seen:
    a bottom that stepped with one part of two would be far off."""
    monkeypatch.setattr(cnn_har, "DROPOUT", 0.0)
    shares = [np.arange(index, 60, 3) for index in range(3)]
    runs = {}
    for name, *settings in (("unsplit",), ("two", FAST, TWO), ("three", IN_ORDER, THREE), ("again", IN_ORDER, THREE)):
        every = ("training.num_rounds=2", "training.local_steps=3", "training.learning_rate=0.2")
        config = small_config(tmp_path, f"name={name}", f"method.name={method}", *every, *settings)
        play_daemons(config, shares)
        runs[name] = checkpoint_of(config)
    begin = build_network(small_config(tmp_path), load_dataset(small_config(tmp_path).data.dataset)).joined_state_dict()
    for name, tensor in runs["unsplit"].tensors.items():
        for other in ("two", "three"):
            assert torch.allclose(runs[other].tensors[name], tensor, rtol=0, atol=1e-5), name
        assert (tensor - begin[name]).abs().max() > 1e-3, name
    assert same_tensors(runs["three"], runs["again"])


@pytest.mark.parametrize("method", ["mergesfl", "splitfed-v1", "smofi"])
def test_in_parts_and_in_order_the_order_of_arrival_leaves_no_bit(tmp_path: Path, method: str) -> None:
    """With dropout. Parts of the first and the last of the plan, one worker before the other, and mixed."""
    clusters = []
    for name, factor in (("forth", 0.1), ("back", -0.1), ("mixed", 0.0)):
        cluster = cluster_of(tmp_path, f"name={name}", IN_ORDER, THREE, f"method.name={method}")
        for index, worker in enumerate(cluster.workers):
            worker.script = every_step([0.5 + factor * index, 0.5 - factor * index])
            if name == "mixed":
                worker.script = lambda worker, answer, index=index: (  # type: ignore[misc]
                    late(0.2 + 0.1 * index * (-1) ** answer.part)(worker, answer)
                    if isinstance(answer, Features) and answer.part
                    else answer
                )
        cluster.run()
        clusters.append(cluster)
    checkpoints = [checkpoint_of(cluster.config) for cluster in clusters]
    assert same_tensors(checkpoints[0], checkpoints[1]) and same_tensors(checkpoints[0], checkpoints[2])
    losses = [[line["train_loss_nats"] for line in journal_of(cluster.config)] for cluster in clusters]
    assert losses[0] == losses[1] == losses[2]


def vanish_soon(worker: ScriptedWorker, answer: Message) -> None:
    """In half a second, so that what was sent before arrives; nothing more is."""
    worker.dies_at_seconds = worker._clock.seconds + 0.5
    worker.deaf_until_seconds = worker.dies_at_seconds
    worker.script = lambda worker, answer: None


@pytest.mark.parametrize("part", [0, 1, 2])
def test_of_a_worker_that_dies_between_two_parts_counts_what_it_has_sent(tmp_path: Path, part: int) -> None:
    """worker-01 vanishes in place of part 0, 1 or 2 of step 0: nothing, 3, or 3 + 3 of its samples are in the step."""
    cluster = cluster_of(tmp_path, FAST, THREE, "cluster.step_deadline_seconds=3600.0")
    cluster["worker-01"].script = at(1, 0, vanish_soon, part)
    cluster.run()
    lines = journal_of(cluster.config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 0) and lost["reason"].startswith("unreachable: ")
    assert lines[1]["samples_trained"] == 2 * 2 * 8 + 3 * part
    assert lines[1]["finished_worker_ids"] == lines[2]["worker_ids"] == [NAMES[0], NAMES[2]]
    assert 0.0 < lines[1]["round_seconds"] <= REAL.probe_seconds + 0.2


def test_a_step_that_lost_a_worker_between_two_parts_is_the_mean_over_what_was_fed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 1 of worker-02 never comes. The top must step as a barrier's top on 8 + 8 + 4 samples, written out here."""
    monkeypatch.setattr(cnn_har, "DROPOUT", 0.0)
    settings = ("training.num_rounds=1", "training.local_steps=1")
    cluster = cluster_of(tmp_path, FAST, TWO, *settings)
    cluster["worker-02"].script = at(0, 0, vanish_soon, part=1)
    still = ("training.learning_rate=1e-30", "training.learning_rate_min=1e-30")
    before = cluster_of(tmp_path, "name=before", *settings, *still)
    before.run()  # a top that has not moved
    cluster.run()
    features = [
        one.message
        for one in cluster.endpoint.log
        if isinstance(one.message, Features) and one.message.round_num == wire_round(0, 1)
    ]
    assert sorted(len(one.labels) for one in features) == [4] * 5
    top = build_model("cnn", None, (1, 8, 8), 3, 0).top
    top.load_state_dict({name: checkpoint_of(before.config).tensors[name] for name in top.state_dict()})
    z = torch.from_numpy(np.concatenate([np.array(one.features) for one in features]))  # (20, F...)
    y = torch.from_numpy(np.concatenate([np.array(one.labels) for one in features]))  # (20,)
    torch.nn.functional.cross_entropy(top(z), y).backward()  # type: ignore[no-untyped-call]
    found = checkpoint_of(cluster.config).tensors
    for name, parameter in top.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - cluster.config.training.learning_rate * parameter.grad
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-5), name


def test_a_worker_that_is_too_slow_for_its_second_part_is_released_and_its_part_is_stale(tmp_path: Path) -> None:
    """Deadline 5 s. Part 1 of step 1 comes 8 s after part 0, which is answered at once: step 1 closes at 5 s. worker-00
    takes 9 s for the update, so that the part arrives while the server listens, and is no mistake."""
    cluster = cluster_of(tmp_path, FAST, TWO, "cluster.step_deadline_seconds=5.0", "training.num_rounds=2")
    cluster["worker-01"].script = at(0, 1, late(8.0), part=1)
    cluster["worker-00"].script = at(0, None, late(9.0))
    cluster.run()
    lines = journal_of(cluster.config)
    reason = "no answer within 5 s (cluster.step_deadline_seconds)"
    assert lines[0]["dropped"] == [{"worker_id": NAMES[1], "step": 1, "reason": reason}]
    assert lines[0]["samples_trained"] == 3 * 8 + 2 * 8 + 4
    assert lines[0]["round_seconds"] == pytest.approx(9.0)
    assert cluster["worker-01"].told(Release) == [Release(wire_round(0, 1), reason)]
    assert cluster["worker-01"].told(Refuse) == []
    assert lines[1]["finished_worker_ids"] == [*NAMES]


def test_every_part_has_the_deadline_from_the_answer_before_it_on(tmp_path: Path) -> None:
    """Deadline 5 s, each of four parts takes 4 s: nobody is late, though a step takes 8 s."""
    cluster = cluster_of(tmp_path, FAST, TWO, "cluster.step_deadline_seconds=5.0", "training.num_rounds=1")
    cluster["worker-01"].script = lambda worker, answer: (
        late(4.0 * (1 + answer.part))(worker, answer) if isinstance(answer, Features) else answer
    )
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert line["dropped"] == [] and line["round_seconds"] == pytest.approx(16.0)


def renumbered(part: int) -> Callable[[ScriptedWorker, Message], Message]:
    def script(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Features)
        return dataclasses.replace(answer, part=part)

    return script


def shortened(worker: ScriptedWorker, answer: Message) -> Message:
    assert isinstance(answer, Features)
    return dataclasses.replace(answer, features=answer.features[1:], labels=answer.labels[1:])


def repeated(worker: ScriptedWorker, answer: Message) -> Message:
    worker.say(answer)
    return answer


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (renumbered(0), "Features carries part 0; expected 1"),
        (renumbered(7), "Features carries part 7; expected 1"),
        (repeated, "the worker cannot say Features; legal: Ping, Leave"),
        (shortened, r"expected float32\(4, 32, 2, 2\)"),
    ],
)
def test_a_wrong_part_closes_its_sender_only(
    tmp_path: Path, act: Callable[[ScriptedWorker, Message], Message], expected: str
) -> None:
    cluster = cluster_of(tmp_path, FAST, TWO)
    cluster["worker-01"].script = at(1, 0, act, part=1)
    cluster.run()
    (refusal,) = cluster["worker-01"].told(Refuse)
    assert re.search(expected, refusal.reason)
    lines = journal_of(cluster.config)
    assert [lost["worker_id"] for lost in lines[1]["dropped"]] == [NAMES[1]]
    assert lines[1]["finished_worker_ids"] == lines[2]["finished_worker_ids"] == [NAMES[0], NAMES[2]]


def test_a_part_that_is_not_finite_costs_its_worker_the_round_and_the_part_before_counts(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FAST, TWO)
    cluster["worker-01"].script = at(1, 0, spoilt(np.nan), part=1)
    cluster["worker-02"].script = at(1, 0, late(2.0), part=1)
    cluster.run()
    lines = journal_of(cluster.config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 0) and "not finite" in lost["reason"]
    assert lines[1]["samples_trained"] in (2 * 2 * 8, 2 * 2 * 8 + 4)  # whether or not both parts were read together
    assert lines[2]["finished_worker_ids"] == [*NAMES]


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_out_of_all_proportion_puts_its_worker_out(tmp_path: Path, part: int) -> None:
    """The other part of the same step is as it should be."""
    cluster = cluster_of(tmp_path, FAST, TWO, "training.local_steps=3", "training.learning_rate=0.1")
    cluster["worker-01"].script = at(1, 1, spoilt(3e38), part)
    cluster.run()
    lines = journal_of(cluster.config)
    assert [line["attempt"] for line in lines] == [1, 2, 1]
    (refusal,) = cluster["worker-01"].told(Refuse)
    assert "sent features up to 3e+38, the limit is 1e+06" in refusal.reason
    assert cluster["worker-00"].told(Refuse) == cluster["worker-02"].told(Refuse) == []


def test_a_void_round_in_parts_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    """Released while all parts of the others' next step wait on the server, and worker-01 has one part under way."""
    calm = cluster_of(tmp_path, "name=calm", IN_ORDER, THREE, "training.local_steps=3")
    calm.run()
    quorum = ("cluster.quorum_fraction=1.0", "cluster.step_deadline_seconds=5.0")
    void = cluster_of(tmp_path, "name=void", IN_ORDER, THREE, "training.local_steps=3", *quorum)
    times: list[int] = []

    def late_once(worker: ScriptedWorker, answer: Message) -> Message | None:
        times.append(1)
        return late(30.0)(worker, answer) if len(times) == 1 else answer

    void["worker-01"].script = at(1, 1, late_once, part=2)
    void.run()
    assert [line["attempt"] for line in journal_of(void.config)] == [1, 2, 1]
    assert same_tensors(checkpoint_of(calm.config), checkpoint_of(void.config))
    assert all(worker.told(Refuse) == [] for worker in void.workers)


def test_with_codecs_every_part_is_a_message_of_its_own(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FAST, THREE, "codec.features=int8", "codec.gradients=fp8", "training.num_rounds=1")
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert line["dropped"] == [] and line["finished_worker_ids"] == [*NAMES]
    assert cluster.endpoint.count("in", Features) == cluster.endpoint.count("out", Gradient) == 3 * 2 * 3
    assert {one.gradient.dtype.name for one in cluster["worker-00"].told(Gradient)} == {"uint8"}


def test_what_parts_would_change_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"training.parts_per_step = 2 is for .* training.merge = 'streaming'"):
        small_config(tmp_path, TWO)
    with pytest.raises(ConfigError, match="'splitfed-v2' needs all features"):
        run_of(small_config(tmp_path, FAST, TWO, "method.name=splitfed-v2"))
    monkeypatch.setattr(split_program, "layer_with_batch_statistics", lambda module: ("norm", "BatchNorm2d"))
    with pytest.raises(ConfigError, match=r"training.parts_per_step = 2, but the bottom .* holds the layer 'norm'"):
        run_of(small_config(tmp_path, FAST, TWO))


# However many workers there are.


def test_a_message_costs_the_same_however_many_workers_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are the looks at workers while features arrive one by one: of N workers about as many as messages, where
    to look at all of them after each would be N * N / 2."""
    looks = 0

    class Counted(dict[str, object]):
        def __iter__(self) -> Iterator[str]:
            nonlocal looks
            for name in super().__iter__():
                looks += 1
                yield name

    names = [f"worker-{index:03d}" for index in range(60)]
    settings = ("cluster.num_workers=60", "training.num_rounds=1", "training.local_steps=1", "training.batch_size=1")
    cluster = ScriptedCluster(small_config(tmp_path, ALL, FAST, *settings), names)
    for index, worker in enumerate(cluster.workers):
        worker.script = every_step([0.01 * (60 - index)])
    begin_step = StreamingExchange.begin_step

    def counting(exchange: StreamingExchange, step: int) -> None:
        nonlocal looks
        begin_step(exchange, step)
        exchange._active, exchange._num_open, exchange._awaited = (  # type: ignore[assignment]
            Counted(one) for one in (exchange._active, exchange._num_open, exchange._awaited)
        )
        looks = 0

    monkeypatch.setattr(StreamingExchange, "begin_step", counting)
    cluster.run()
    (line,) = journal_of(cluster.config)
    assert len(line["finished_worker_ids"]) == 60
    assert looks < 10 * 60
