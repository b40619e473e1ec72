"""What a run leaves behind, and which folder it may use: new runs, continuations, and all methods end to end."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import RunConfig, config_values, load_config
from mergesfl.data import load_dataset, load_partition, parse_partition, save_partition
from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.models import build_model
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.journal import SUMMARY_KEYS, RoundRecord
from mergesfl.runtime.process import StopFlag
from ps.central import train_centrally
from ps.progress import Progress
from ps.recorder import Recorder, check_folder, method_label, prepare_folder
from ps.run import set_scene
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import (
    MEASURED,
    NUM_CLASSES,
    SAMPLE_SHAPE,
    checkpoint_of,
    journal_of,
    same_tensors,
    small_config,
    without,
    write_dataset,
)
from tests.test_ps_progress import RECORD

torch.set_num_threads(1)

DECLARED = (
    "cluster.declared_compute_seconds_per_sample=[0.001,0.002,0.004]",
    "cluster.declared_transfer_seconds_per_sample=[0.0005,0.0005,0.0005]",
)


def play(config: RunConfig, resume: bool = False, overwrite: bool = False) -> dict[str, object]:
    return run_cluster(config, resume, overwrite, Console(quiet=True), StopFlag())


# The folder.


def used_folder(tmp_path: Path, *settings: str) -> RunConfig:
    """The configuration of a run that has left one line in its journal."""
    config = small_config(tmp_path, *settings)
    folder = prepare_folder(config, False)
    (folder / "journal.jsonl").write_text('{"round_num": 0}\n')
    return config


def test_a_new_folder_holds_the_effective_configuration(tmp_path: Path) -> None:
    config = small_config(tmp_path, "name=new", "seed=3")
    check_folder(config, False, False)
    assert prepare_folder(config, False) == tmp_path / "new"
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config_values(config)
    assert load_config(tmp_path / "new" / "config.json") == config


def test_a_folder_that_holds_a_run_is_not_taken_unasked(tmp_path: Path) -> None:
    config = used_folder(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume, replace it with --overw"):
        check_folder(config, False, False)
    assert (config.run_folder / "journal.jsonl").exists()
    check_folder(config, False, True)
    assert (config.run_folder / "journal.jsonl").exists()  # a check changes nothing
    prepare_folder(config, False)
    assert not (config.run_folder / "journal.jsonl").exists()


def test_a_folder_whose_run_never_closed_a_round_is_free(tmp_path: Path) -> None:
    config = used_folder(tmp_path)
    (config.run_folder / "journal.jsonl").write_text("")
    check_folder(config, False, False)


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.run_folder.mkdir()
    (config.run_folder / "thesis.tex").write_text("years")
    check_folder(config, False, True)
    prepare_folder(config, False)
    assert (config.run_folder / "thesis.tex").read_text() == "years"


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*: expected config.json there"):
        check_folder(small_config(tmp_path), True, False)


@pytest.mark.parametrize("damage", ["{", "[]", "\x00"])
def test_a_damaged_configuration_is_named_at_a_resume(tmp_path: Path, damage: str) -> None:
    used_folder(tmp_path)
    config = small_config(tmp_path)
    (config.run_folder / "config.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        check_folder(config, True, False)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("training.batch_size=4", "training.batch_size was 8 and is 4 now"),
        ("seed=1", "seed was 0 and is 1 now"),
        ("method.name=fedavg", "method.name was 'mergesfl' and is 'fedavg' now"),
        ("data.partition=iid()", "data.partition was 'iid' and is 'iid()' now"),
        ("control.ingress_budget_bytes=9000", "control.ingress_budget_bytes was None and is 9000 now"),
    ],
)
def test_what_is_computed_may_not_change_at_a_resume(tmp_path: Path, setting: str, name: str) -> None:
    used_folder(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_folder(small_config(tmp_path, setting), True, False)
    assert name in str(caught.value)
    assert "set it back, or start a new run under another name" in str(caught.value)


@pytest.mark.parametrize("setting", ["training.num_rounds=9", "cluster.step_deadline_seconds=3.0", "output.plots=true"])
def test_how_long_and_how_watched_may_change_at_a_resume(tmp_path: Path, setting: str) -> None:
    used_folder(tmp_path)
    config = small_config(tmp_path, setting)
    check_folder(config, True, False)
    prepare_folder(config, True)
    assert (config.run_folder / "journal.jsonl").exists()
    assert load_config(config.run_folder / "config.json") == config


def test_a_configuration_from_before_a_key_existed_can_be_resumed(tmp_path: Path) -> None:
    config = used_folder(tmp_path)
    values = config_values(config)
    del values["control"]["fill_budget"]
    (config.run_folder / "config.json").write_text(json.dumps(values))
    check_folder(config, True, False)


# The recorder.


def recorder_of(config: RunConfig) -> Recorder:
    prepare_folder(config, True)
    return Recorder(config, load_dataset(config.data.dataset), "by hand", Progress(Console(quiet=True)))


def record_of(round_num: int) -> RoundRecord:
    return replace(RECORD, round_num=round_num)


def test_checkpoints_are_due_after_every_k_rounds_and_after_the_last(tmp_path: Path) -> None:
    recorder = recorder_of(small_config(tmp_path, "training.num_rounds=7", "output.checkpoint_every_rounds=3"))
    assert [next_round for next_round in range(1, 8) if recorder.is_checkpoint_due(next_round)] == [3, 6, 7]


def test_lines_of_rounds_that_are_run_again_are_cut_off(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    for first_round, rounds in ((0, [0, 1, 2]), (1, [1])):
        recorder = recorder_of(config)
        recorder.open(first_round)
        for round_num in rounds:
            recorder.record(record_of(round_num))
        recorder.close()
    assert [line["round_num"] for line in journal_of(config)] == [0, 1]


def test_a_checkpoint_comes_back_and_a_missing_one_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = recorder_of(small_config(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert recorder.load() is None
    assert "has no checkpoint yet: starting from round 0" in caplog.text
    recorder.checkpoint(2, {"w": torch.arange(3.0)}, {"wall_seconds": 1.5})
    loaded = recorder.load()
    assert loaded is not None and loaded.round_num == 2 and loaded.state == {"wall_seconds": 1.5}
    assert torch.equal(loaded.tensors["w"], torch.arange(3.0))


def test_a_damaged_checkpoint_is_not_silently_a_new_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(tmp_path)
    recorder = recorder_of(config)
    recorder.checkpoint(1, {"w": torch.zeros(1)}, {})
    recorder.checkpoint(2, {"w": torch.ones(1)}, {})
    files = sorted((config.run_folder / "checkpoints").glob("*.safetensors"))
    files[1].write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        loaded = recorder.load()
    assert loaded is not None and loaded.round_num == 1
    assert loaded.warning is not None and loaded.warning in caplog.text
    files[0].write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        recorder.load()


def test_the_end_leaves_summary_pictures_events_and_model(tmp_path: Path) -> None:
    settings = ("output.plots=true", "output.export=true", "output.tensorboard=true", "training.num_rounds=2")
    config = small_config(tmp_path, *settings)
    recorder = recorder_of(config)
    recorder.wall_seconds_before = 10.0
    recorder.open(0)
    for round_num in range(2):
        recorder.record(record_of(round_num))
    held = {"a": (3,) * NUM_CLASSES, "b": (0,) * NUM_CLASSES, "c": (1,) * NUM_CLASSES}
    summary = recorder.finish(build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0), held, 2.5)
    recorder.close()
    assert summary == json.loads((config.run_folder / "summary.json").read_text())
    assert set(SUMMARY_KEYS) <= summary.keys()
    # By hand from two equal records.
    expected = {"wall_seconds": 12.5, "final_accuracy": 0.8125, "ingress_bytes": 2, "egress_bytes": 4}
    expected |= {"samples_trained": 26, "round_seconds_mean": 2.25, "idle_seconds_mean": 0.5}
    expected |= {"merged_kl_nats_mean": 0.0625, "num_rounds": 2, "num_workers": 3}
    assert {key: summary[key] for key in expected} == expected
    assert (summary["method"], summary["dataset"], summary["partition"]) == ("mergesfl", "npz", "by hand")
    for name in ("accuracy.png", "batch_sizes.png", "partition.png"):
        assert (config.run_folder / name).read_bytes().startswith(b"\x89PNG")
    assert any((config.run_folder / "tensorboard").iterdir())
    assert any((config.run_folder / "model").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ((), "mergesfl"),
        (("method.merging=false",), "mergesfl without merging"),
        (("method.regulation=false",), "mergesfl without regulation"),
        (("method.merging=false", "method.regulation=false"), "mergesfl without merging and regulation"),
        (("method.name=fedavg", "method.merging=false"), "fedavg"),
    ],
)
def test_an_ablation_is_named(settings: tuple[str, ...], label: str) -> None:
    assert method_label(load_config(None, settings)) == label


# Whole runs in one process: real daemons in threads.

METHODS = {
    "mergesfl": (),
    "mergesfl without merging": ("method.merging=false",),
    "mergesfl without regulation": ("method.regulation=false",),
    "splitfed-v1": ("method.name=splitfed-v1",),
    "splitfed-v2": ("method.name=splitfed-v2",),
    "fedavg": ("method.name=fedavg",),
    "central": ("method.name=central",),
}


@pytest.mark.parametrize("label", METHODS)
def test_every_method_runs_end_to_end_and_leaves_its_record(tmp_path: Path, label: str) -> None:
    config = small_config(tmp_path, *DECLARED, *METHODS[label], "training.num_rounds=2")
    summary = play(config)
    folder = config.run_folder
    assert summary == json.loads((folder / "summary.json").read_text())
    assert set(SUMMARY_KEYS) <= summary.keys()
    assert (summary["method"], summary["num_rounds"]) == (label, 2)
    lines = journal_of(config)
    assert [line["round_num"] for line in lines] == [0, 1]
    # Two steps a round; in all methods the three batches make up 24 samples.
    assert [line["samples_trained"] for line in lines] == [48, 48]
    assert load_config(folder / "config.json") == config
    checkpoint = checkpoint_of(config)
    assert checkpoint.round_num == 2
    initial = build_model("cnn", None, SAMPLE_SHAPE, NUM_CLASSES, 0).joined_state_dict()
    assert checkpoint.tensors.keys() == initial.keys()
    if label == "central":
        assert not (folder / "partition.npz").exists()
        assert summary["ingress_bytes"] == 0
    else:
        assert (folder / "partition.npz").exists()
        assert all(line["finished_worker_ids"] == line["worker_ids"] for line in lines)
        assert all(line["ingress_bytes"] > 0 < line["egress_bytes"] for line in lines)


@pytest.mark.parametrize("label", ["mergesfl", "fedavg", "central"])
def test_two_runs_with_declared_paces_are_equal_to_the_bit(tmp_path: Path, label: str) -> None:
    one, two, other = (
        small_config(tmp_path, *DECLARED, *METHODS[label], f"name={name}", f"seed={seed}")
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    for config in (one, two, other):
        play(config)
    assert same_tensors(checkpoint_of(one), checkpoint_of(two))
    assert not same_tensors(checkpoint_of(one), checkpoint_of(other))
    # A federated worker's transfer and a central round are measured; so are the predictions that they lead to.
    seconds = ("observed_seconds", "predicted_seconds", "idle_seconds", "predicted_idle_seconds")
    exact = label == "mergesfl"
    loose = (*MEASURED, *(() if exact else seconds), "ingress_bytes", "egress_bytes")  # pings come as time goes by
    assert without(journal_of(one), *loose) == without(journal_of(two), *loose)
    assert without(journal_of(one), *loose) != without(journal_of(other), *loose)


def test_a_run_learns(tmp_path: Path) -> None:
    config = small_config(tmp_path, *DECLARED, "training.num_rounds=12", "training.local_steps=4")
    summary = play(config)
    assert float(str(summary["final_accuracy"])) > 0.9  # three well separated classes; chance is 1/3


def test_another_run_in_the_same_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = small_config(tmp_path, *DECLARED, "training.num_rounds=1")
    play(config)
    before = journal_of(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        play(config)
    assert journal_of(config) == before
    play(small_config(tmp_path, *DECLARED, "training.num_rounds=2"), overwrite=True)
    assert len(journal_of(config)) == 2


def test_a_stop_wish_ends_a_cluster_of_threads(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.set()
    with pytest.raises(InterruptedRunError, match="go on with --resume"):
        run_cluster(small_config(tmp_path, *DECLARED), False, False, Console(quiet=True), stop)


def test_the_console_shows_each_round_and_the_summary(tmp_path: Path) -> None:
    out = io.StringIO()
    config = small_config(tmp_path, *DECLARED, "training.num_rounds=2")
    run_cluster(config, False, False, Console(file=out, width=200), StopFlag())
    assert "round    1  accuracy" in out.getvalue() and "round    2  accuracy" in out.getvalue()
    assert "final_accuracy" in out.getvalue() and str(config.run_folder) in out.getvalue()


def test_a_resumed_run_keeps_its_partition(tmp_path: Path) -> None:
    config = small_config(tmp_path, *DECLARED, "training.num_rounds=1")
    play(config)
    saved = config.run_folder / "partition.npz"
    labels = load_dataset(config.data.dataset).train.y
    planted = parse_partition("shards(1)").split(labels, 3, np.random.default_rng(5))
    save_partition(saved, planted, labels, 10)
    before = (saved.read_bytes(), saved.stat().st_mtime_ns)
    play(small_config(tmp_path, *DECLARED, "training.num_rounds=2"), resume=True)
    assert (saved.read_bytes(), saved.stat().st_mtime_ns) == before  # not even written again
    assert load_partition(saved).text == "shards(1)"
    more = small_config(tmp_path, "training.num_rounds=2", "cluster.num_workers=4")
    with pytest.raises(CheckpointError, match=r"cluster\.num_workers was 3 and is 4 now"):
        play(more, resume=True)


def test_a_saved_partition_is_used_and_checked(tmp_path: Path) -> None:
    first = small_config(tmp_path, *DECLARED, "name=first", "training.num_rounds=1")
    play(first)
    saved = f"data.partition_file={first.run_folder / 'partition.npz'}"
    again = small_config(tmp_path, *DECLARED, "name=again", "training.num_rounds=1", saved, "data.partition=shards(1)")
    play(again)
    assert same_tensors(checkpoint_of(first), checkpoint_of(again))
    four = small_config(tmp_path, "name=four", saved, "cluster.num_workers=4")
    with pytest.raises(ConfigError, match="is for 3 workers, this run has 4"):
        play(four)
    assert not four.run_folder.exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("cluster.slowdowns=[1.0, 2.0]", "cluster.slowdowns has 2 entries for 3 workers"),
        ("cluster.declared_compute_seconds_per_sample=[0.1,0.1,0.1]", "declare both"),
    ],
)
def test_paces_fit_the_number_of_workers(tmp_path: Path, setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        play(small_config(tmp_path, setting))


def test_measured_and_slowed_paces_run_too(tmp_path: Path) -> None:
    config = small_config(tmp_path, "cluster.slowdowns=[1.0, 1.0, 3.0]", "training.num_rounds=1")
    play(config)
    (line,) = journal_of(config)
    assert all(seconds > 0 for seconds in line["observed_seconds"])


# Central training.


def central_scene(tmp_path: Path, name: str, num_rounds: int) -> RunConfig:
    return small_config(
        tmp_path, "method.name=central", f"name={name}", f"training.num_rounds={num_rounds}",
        "output.checkpoint_every_rounds=100",
    )  # fmt: skip


def test_an_interrupted_central_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = central_scene(tmp_path, "whole", 4)
    play(whole)
    stopped = central_scene(tmp_path, "stopped", 4)
    prepare_folder(stopped, False)
    scene = set_scene(stopped, "none", WallClock(), Progress(Console(quiet=True)))
    rounds_left = iter(range(2))

    def check() -> None:
        if next(rounds_left, None) is None:
            raise InterruptedRunError("asked to stop")

    with pytest.raises(InterruptedRunError):
        train_centrally(scene, False, check)
    assert checkpoint_of(stopped).round_num == 2
    assert len(journal_of(stopped)) == 2
    play(stopped, resume=True)
    assert same_tensors(checkpoint_of(whole), checkpoint_of(stopped))
    assert len(journal_of(stopped)) == 4


def test_central_training_takes_no_more_than_there_is(tmp_path: Path) -> None:
    """Three workers' batches of 30 would be 90 samples; there are 60."""
    config = small_config(tmp_path, "method.name=central", "training.batch_size=30", "training.num_rounds=1")
    write_dataset(tmp_path, 60)
    play(config)
    (line,) = journal_of(config)
    assert (line["batch_sizes"], line["samples_trained"]) == ([60], 120)
