"""The survey of the fleet on a clock moved by hand: what is asked, what is learnt, and what becomes of the others.

Scripted worker i reports 0.001 * (i + 1) seconds of computing and 0.0005 of transfer per sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.config import RunConfig
from mergesfl.methods import METHODS
from mergesfl.models import build_model
from mergesfl.protocol.messages import (
    Assign,
    Echo,
    Message,
    Probe,
    Refuse,
    Release,
    Report,
    Survey,
    round_of,
    wire_round,
)
from mergesfl.training.split import SplitModel
from ps.fleet import Fleet
from ps.outcome import MIN_COMPUTE_SECONDS_PER_SAMPLE
from ps.run import method_settings, run_codecs
from ps.survey import Questions
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    FEATURE_SHAPE,
    SAMPLE_SHAPE,
    Script,
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

ALL = "method.name=adasfl"  # all three workers in every plan, batches of at most 8 by speed
KEY = "control.survey_every_rounds"
EVERY = f"{KEY}=2"
NUM_PARAMETERS = (9 + 1) * 12 + (12 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (256 + 1) * 1024 + (1024 + 1) * 3  # of the cnn


def on(kind: type[Message], act: Script, round_num: int = 0) -> Script:
    """A script that acts on the worker's Probe or Report of one round's survey; honest otherwise."""

    def script(worker: ScriptedWorker, answer: Message) -> Message | None:
        is_it = isinstance(answer, kind) and round_of(getattr(answer, "round_num", -1)) == round_num
        return act(worker, answer) if is_it else answer

    return script


def estimates_of(config: RunConfig) -> dict[str, list[float]]:
    """worker_id -> (mu_i, beta_i) of the newest checkpoint."""
    estimates: dict[str, list[float]] = checkpoint_of(config).state["fleet"]["estimates"]["workers"]
    return estimates


# What is asked.


def questions_of(tmp_path: Path, method: str, *settings: str) -> Questions:
    config = small_config(tmp_path, *settings)
    splits, settings_of = METHODS[method].splits, method_settings(config, SAMPLE_SHAPE)
    parts_per_step = config.training.parts_per_step
    return Questions.of(network(), settings_of, FEATURE_SHAPE, splits, run_codecs(config), parts_per_step)


def network() -> SplitModel:
    return build_model("cnn", None, SAMPLE_SHAPE, 3, 0)


def test_a_split_probe_is_as_large_as_the_features_of_the_batch(tmp_path: Path) -> None:
    """8 samples, or the whole batch where that is less, at 512 bytes each."""
    assert questions_of(tmp_path, "mergesfl", "training.batch_size=64") == Questions(8, False, 8, 8 * 512, 8 * 512)
    assert questions_of(tmp_path, "mergesfl", "training.batch_size=3") == Questions(3, False, 3, 3 * 512, 3 * 512)


def test_with_codecs_a_probe_is_as_large_as_the_encoded_features_and_its_echo_as_the_encoded_gradient(
    tmp_path: Path,
) -> None:
    """128 numbers per sample: 1 byte each up, 2 down. Of a model 288,347 numbers: 2 bytes for each but the biases."""
    coded = questions_of(tmp_path, "mergesfl", "codec.features=int8", "codec.gradients=fp16")
    assert coded == Questions(8, False, 8, 8 * 128, 8 * 256)
    num_biases = 12 + 32 + 64 + 1024 + 3
    model_bytes = 2 * (NUM_PARAMETERS - num_biases) + 4 * num_biases
    coded = questions_of(tmp_path, "fedavg", "codec.weights=fp16")
    assert coded == Questions(8, True, 2, *[round(2 * model_bytes / 16)] * 2)


STREAMED = ("method.name=mergesfl", "method.regulation=true", "training.merge=streaming")


def test_in_parts_there_are_as_many_samples_in_each_and_no_more_than_a_batch(tmp_path: Path) -> None:
    """8 samples in each of 3 parts at 512 bytes, or the whole batch where that is less."""
    parts = ("training.merge=streaming", "training.parts_per_step=3")
    large = questions_of(tmp_path, "mergesfl", *parts, "training.batch_size=64")
    assert large == Questions(24, False, 24, 24 * 512, 24 * 512, 3)
    small = questions_of(tmp_path, "mergesfl", *parts, "training.batch_size=10")
    assert small == Questions(10, False, 10, 10 * 512, 10 * 512, 3)


def test_in_parts_every_probe_has_an_echo_of_its_own_size(tmp_path: Path) -> None:
    """Batches of 8 in 3 parts of 3, 3 and 2 samples; up 128 bytes each, down 256. Then the round is planned."""
    coded = ("codec.features=int8", "codec.gradients=fp16")
    config = small_config(tmp_path, *STREAMED, *coded, "training.parts_per_step=3", EVERY, "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    cluster.run()
    passed = [
        (one.direction, one.message.part, len(one.message.payload))
        for one in cluster.endpoint.log
        if isinstance(one.message, Probe | Echo) and one.peer == cluster["worker-01"].endpoint._peer
    ]
    assert sorted(passed) == [
        *[("in", 0, 3 * 128), ("in", 1, 3 * 128), ("in", 2, 2 * 128)],
        *[("out", 0, 3 * 256), ("out", 1, 3 * 256), ("out", 2, 2 * 256)],
    ]
    assert estimates_of(config)["worker-01"] == pytest.approx([0.002, 0.0005])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"part": 2}, "Probe carries part 2; expected 1"),
        ({"payload": np.zeros(5, np.uint8)}, "sent a probe of 5 bytes, expected 2048"),
    ],
)
def test_a_wrong_part_of_a_probe_closes_its_sender(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    config = small_config(tmp_path, *STREAMED, "training.parts_per_step=2", EVERY, "training.num_rounds=1")
    cluster = ScriptedCluster(config)

    def spoil(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Probe)
        return dataclasses.replace(answer, **changes) if answer.part else answer

    cluster["worker-02"].script = on(Probe, spoil)
    cluster.run()
    (refusal,) = cluster["worker-02"].told(Refuse)
    assert reason in refusal.reason
    assert set(estimates_of(config)) == {"worker-00", "worker-01"}


def test_a_federated_probe_stands_for_a_share_of_the_model(tmp_path: Path) -> None:
    """4 * 288,347 bytes are carried for tau * d samples. tau * d = 42 * 64: 429.09 bytes per sample, 65,536 of them are
    152.7 samples. tau * d = 2 * 8: 72,086.75 bytes, more than a probe should have, are one sample."""
    model_bytes = 4 * NUM_PARAMETERS
    large = questions_of(tmp_path, "fedavg", "training.local_steps=42", "training.batch_size=64")
    assert large == Questions(8, True, 153, *[round(153 * model_bytes / (42 * 64))] * 2)
    assert questions_of(tmp_path, "fedavg") == Questions(8, True, 1, *[round(model_bytes / 16)] * 2)


def test_only_a_method_that_plans_by_speed_asks_and_it_asks_for_what_its_workers_train(tmp_path: Path) -> None:
    """Held against the plans: a method whose plan has no exchanges is the one whose workers train the whole network."""
    asked = {}
    for name in METHODS:
        cluster = ScriptedCluster(small_config(tmp_path, f"name={name}", f"method.name={name}", EVERY))
        cluster.run()
        surveys, (assign, *_) = cluster["worker-00"].told(Survey), cluster["worker-00"].told(Assign)
        assert METHODS[name].splits is (assign.num_exchanges > 0), name
        if surveys:
            asked[name] = surveys[0].whole_network
    assert asked == {"mergesfl": False, "mergesfl+": False, "adasfl": False, "pyramidfl": True}


# What is learnt.


def test_all_workers_are_asked_before_the_plan_and_again_when_it_is_time(tmp_path: Path) -> None:
    """Rounds 0 and 2 of four; the first plan knows all speeds, 1.5, 2.5 and 3.5 ms: of 8 samples 8, 4 and 3. Without a
    survey it takes all for equal. Equal observations leave every estimate where it is."""
    configs = [
        small_config(tmp_path, f"name=every-{every}", ALL, f"{KEY}={every}", "training.num_rounds=4")
        for every in (0, 2)
    ]
    plain, surveyed = ScriptedCluster(configs[0]), ScriptedCluster(configs[1])
    plain.run()
    surveyed.run()
    for worker in surveyed.workers:
        assert [ask.round_num for ask in worker.told(Survey)] == [wire_round(0, 0), wire_round(2, 0)]
        assert len(worker.told(Echo)) == 2
    assert plain.endpoint.count("out", Survey) == 0
    assert [line["batch_sizes"] for line in journal_of(plain.config)] == [[8, 8, 8]] + [[8, 4, 3]] * 3
    assert [line["batch_sizes"] for line in journal_of(surveyed.config)] == [[8, 4, 3]] * 4
    # t_i = tau * d_i * (mu_i + beta_i)
    assert journal_of(surveyed.config)[0]["predicted_seconds"] == pytest.approx([0.024, 0.020, 0.021])
    expected = {f"worker-{i:02d}": pytest.approx([0.001 * (i + 1), 0.0005]) for i in range(3)}
    assert estimates_of(surveyed.config) == expected


def test_its_bytes_are_in_the_journal(tmp_path: Path) -> None:
    """Of round 0: all that passed the endpoint from the survey to the assignments of round 1, by an account of its own.

    The three pongs before the survey belong to it, too, and those before round 1 do not: as many, of equal size."""
    config = small_config(tmp_path, ALL, EVERY)
    cluster = ScriptedCluster(config)
    cluster.run()
    log = cluster.endpoint.log
    begin = next(i for i, one in enumerate(log) if isinstance(one.message, Survey))
    end = next(i for i, one in enumerate(log) if isinstance(one.message, Assign) and one.message.round_num > 100)
    line = journal_of(config)[0]
    for key, direction, kind in (("ingress_bytes", "in", Probe), ("egress_bytes", "out", Echo)):
        passed = [one for one in log[begin:end] if one.direction == direction]
        assert line[key] == sum(one.num_bytes for one in passed)
        assert sum(one.num_bytes for one in passed if isinstance(one.message, kind)) > 3 * 4096


def test_reports_are_learnt_in_the_order_of_the_ids_whenever_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """worker-00 reports last, after 3 s: the survey takes them, and the round with it."""
    learnt: list[tuple[str, int]] = []
    observe = Fleet.observe

    def noting(fleet: Fleet, name: str, batch_size: int, *seconds: float) -> None:
        learnt.append((name, batch_size))
        observe(fleet, name, batch_size, *seconds)

    monkeypatch.setattr(Fleet, "observe", noting)
    config = small_config(tmp_path, ALL, EVERY)
    cluster = ScriptedCluster(config)
    cluster["worker-00"].script = on(Report, late(3.0))
    cluster.run()
    assert learnt[:3] == [("worker-00", 8), ("worker-01", 8), ("worker-02", 8)]
    first, second, third = journal_of(config)
    assert first["survey_seconds"] == pytest.approx(3.0)
    assert first["round_seconds"] == pytest.approx(3.0)  # nothing else takes time on this clock
    assert (second["survey_seconds"], second["round_seconds"]) == (0.0, pytest.approx(0.0))
    assert third["survey_seconds"] == pytest.approx(0.0)


def test_who_claims_to_take_no_time_is_not_believed(tmp_path: Path) -> None:
    def boast(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Report)
        return dataclasses.replace(answer, compute_seconds_per_sample=0.0, transfer_seconds_per_sample=0.0)

    config = small_config(tmp_path, ALL, EVERY, "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    cluster["worker-02"].script = on(Report, boast)
    cluster.run()
    # t_i = 16 * mu_i, the least that is believed
    assert journal_of(config)[0]["predicted_seconds"][2] == pytest.approx(16 * MIN_COMPUTE_SECONDS_PER_SAMPLE)


def test_who_has_no_samples_is_not_asked(tmp_path: Path) -> None:
    cluster = ScriptedCluster(small_config(tmp_path, ALL, EVERY, "cluster.num_workers=4"))
    cluster.add("worker-03", label_counts=(0, 0, 0))
    cluster.run()
    assert cluster["worker-03"].told(Survey) == []
    assert len(cluster["worker-02"].told(Survey)) == 2


def test_a_round_that_is_repeated_is_not_surveyed_again(tmp_path: Path) -> None:
    settings = ("cluster.quorum_fraction=0.7", "cluster.step_deadline_seconds=5.0", "training.num_rounds=1")
    config = small_config(tmp_path, ALL, EVERY, *settings)
    cluster = ScriptedCluster(config)
    failed: list[int] = []

    def fail_once(worker: ScriptedWorker, answer: Message) -> Message | None:
        if failed:
            return answer
        failed.append(1)
        return late(6.0)(worker, answer)

    cluster["worker-01"].script = at(0, 1, fail_once)
    cluster.run()
    assert [message.round_num for message in cluster["worker-00"].told(Assign)] == [wire_round(0, 1), wire_round(0, 2)]
    assert [message.round_num for message in cluster["worker-00"].told(Survey)] == [wire_round(0, 0)]
    assert journal_of(config)[0]["attempt"] == 2


# What becomes of the others.


@pytest.mark.parametrize("kind", [Probe, Report])
def test_who_is_late_is_released_left_out_of_the_round_and_back_in_the_next(
    tmp_path: Path, kind: type[Message]
) -> None:
    """The deadline is 4 s, worker-01 answers after 6 s: round 0 goes without it. worker-00 takes 3 s over round 0, so
    that worker-01 is heard, too late to be learnt of, before round 1."""
    for num_rounds, known in ((1, {"worker-00", "worker-02"}), (2, {"worker-00", "worker-01", "worker-02"})):
        settings = (f"name={num_rounds}-rounds", f"{KEY}=9", "control.survey_deadline_seconds=4.0")
        config = small_config(tmp_path, ALL, *settings, f"training.num_rounds={num_rounds}")
        cluster = ScriptedCluster(config)
        cluster["worker-00"].script = at(0, None, late(3.0))
        cluster["worker-01"].script = on(kind, late(6.0))
        cluster.run()
        assert estimates_of(config).keys() == known
    reason = "no report within 4 s (control.survey_deadline_seconds)"
    assert cluster["worker-01"].told(Release) == [Release(wire_round(0, 0), reason)]
    assert cluster["worker-01"].told(Refuse) == []  # what it said too late is no mistake
    lines = journal_of(config)
    assert [line["survey_seconds"] for line in lines] == [pytest.approx(4.0), 0.0]
    assert [line["worker_ids"] for line in lines] == [
        ["worker-00", "worker-02"],
        ["worker-00", "worker-01", "worker-02"],
    ]
    assert lines[1]["dropped"] == []


def test_when_all_are_late_the_round_waits_until_a_quorum_is_heard(tmp_path: Path) -> None:
    config = small_config(tmp_path, ALL, EVERY, "control.survey_deadline_seconds=4.0", "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    for index, worker in enumerate(cluster.workers):
        worker.script = on(Probe, late(6.0 + index))
    cluster.run()
    (line,) = journal_of(config)
    assert line["survey_seconds"] == pytest.approx(4.0)
    assert line["worker_ids"] == ["worker-00", "worker-01"]  # two of three are a quorum, at 7 s
    assert line["round_seconds"] == pytest.approx(7.0)


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.survey.MAX_BYTES_AT_ONCE", 1)
    monkeypatch.setattr("ps.survey.MIN_WORKERS_AT_ONCE", 1)


def test_of_a_large_fleet_the_next_is_asked_when_a_report_is_in_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One at a time, 4 s in all: worker-00 takes 3 s, worker-01 is asked then, takes 2 s and is late, worker-02 is not
    asked. It is in the round, and takes its time over it, so that worker-01 is heard; the next survey begins there."""
    one_at_a_time(monkeypatch)
    config = small_config(tmp_path, ALL, f"{KEY}=1", "control.survey_deadline_seconds=4.0", "training.num_rounds=2")
    cluster = ScriptedCluster(config)
    cluster["worker-00"].script = on(Report, late(3.0))
    cluster["worker-01"].script = on(Report, late(2.0))
    cluster["worker-02"].script = at(0, None, late(3.0))
    cluster.run()
    names = {worker.endpoint._peer: worker.worker_id for worker in cluster.workers}
    asked = [names[one.peer] for one in cluster.endpoint.log if isinstance(one.message, Survey)]
    assert asked == ["worker-00", "worker-01", "worker-01", "worker-02", "worker-00"]
    first, _ = journal_of(config)
    assert (first["survey_seconds"], first["worker_ids"]) == (pytest.approx(4.0), ["worker-00", "worker-02"])
    assert "1 of 3 workers were not asked within 4 s (control.survey_deadline_seconds)" in caplog.text
    assert cluster["worker-02"].told(Release) == []


def test_of_a_large_fleet_another_is_asked_in_place_of_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time(monkeypatch)
    config = small_config(tmp_path, ALL, EVERY, "control.survey_deadline_seconds=60.0", "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    cluster["worker-00"].script = on(Probe, lambda worker, answer: worker.vanish())
    cluster.run()
    (line,) = journal_of(config)
    assert 0.0 < line["survey_seconds"] <= 2.0
    assert estimates_of(config).keys() == {"worker-01", "worker-02"}


def test_who_dies_in_the_survey_is_noticed_long_before_the_deadline(tmp_path: Path) -> None:
    def vanish(worker: ScriptedWorker, answer: Message) -> None:
        worker.vanish()

    config = small_config(tmp_path, ALL, EVERY, "control.survey_deadline_seconds=60.0", "training.num_rounds=2")
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = on(Probe, vanish)
    cluster.run()
    lines = journal_of(config)
    assert 0.0 < lines[0]["survey_seconds"] <= 2.0  # the first probe of the switchboard
    assert [line["worker_ids"] for line in lines] == [["worker-00", "worker-02"]] * 2


def test_a_probe_of_another_size_closes_its_sender(tmp_path: Path) -> None:
    def shorten(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Probe)
        return dataclasses.replace(answer, payload=answer.payload[:-1])

    config = small_config(tmp_path, ALL, EVERY, "training.num_rounds=1")
    cluster = ScriptedCluster(config)
    cluster["worker-02"].script = on(Probe, shorten)
    cluster.run()
    reason = "worker 'worker-02' sent a probe of 4095 bytes, expected 4096"
    assert cluster["worker-02"].told(Refuse) == [Refuse(reason)]
    assert journal_of(config)[0]["worker_ids"] == ["worker-00", "worker-01"]


def test_a_worker_that_restarts_in_the_survey_does_not_disturb_it(tmp_path: Path) -> None:
    """Its new session is not asked, and takes part in the round."""
    config = small_config(tmp_path, ALL, EVERY, "training.num_rounds=1")
    cluster = ScriptedCluster(config)

    def restart(worker: ScriptedWorker, answer: Message) -> None:
        worker.vanish()
        cluster.add("worker-01", seconds_per_sample=0.002)

    old = cluster["worker-01"]
    old.script = on(Probe, restart)
    cluster["worker-02"].script = on(Report, late(3.0))  # meanwhile the new one gets ready
    cluster.run()
    (line,) = journal_of(config)
    assert line["worker_ids"] == ["worker-00", "worker-01", "worker-02"]
    assert line["finished_worker_ids"] == line["worker_ids"] and line["dropped"] == []
    assert [worker.told(Survey) for worker in cluster.workers[3:]] == [[]]


def test_a_run_that_is_stopped_in_a_survey_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def config_of(name: str) -> RunConfig:
        return small_config(tmp_path, f"name={name}", EVERY, "output.checkpoint_every_rounds=100")

    whole, stopped = ScriptedCluster(config_of("whole")), ScriptedCluster(config_of("stopped"))
    whole.run()

    def check_in(cluster: ScriptedCluster) -> Callable[[], None]:
        def check() -> None:
            if any(round_of(ask.round_num) == 2 for ask in cluster["worker-00"].told(Survey)):
                raise InterruptedRunError("asked to stop")

        return check

    for worker in stopped.workers:
        worker.script = on(Probe, lambda worker, answer: None, round_num=2)  # still computing
    with pytest.raises(InterruptedRunError):
        stopped.run(check=check_in(stopped))
    assert checkpoint_of(stopped.config).round_num == 2
    resumed = ScriptedCluster(stopped.config)
    resumed.run(resume=True)
    assert same_tensors(checkpoint_of(whole.config), checkpoint_of(resumed.config))
    assert without(journal_of(whole.config), "ingress_bytes", "egress_bytes") == without(
        journal_of(resumed.config), "ingress_bytes", "egress_bytes"
    )
