"""The floor computes what the run computes, to the bit: that is what makes it a floor."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.micro.against_floor import compare, run_settings, same_bits
from benchmarks.micro.cpu import UNCOUNTED_ROUNDS, Mark, RoundMarks, counted, mark
from benchmarks.micro.floor import METHOD, played_rounds, run_floor
from benchmarks.micro.samples import find_workload
from benchmarks.micro.simulation import measure_overhead
from mergesfl.cluster import run_cluster
from mergesfl.data import load_dataset
from mergesfl.errors import ConfigError
from mergesfl.runtime.process import StopFlag
from tests.memory_cluster import checkpoint_of, small_config

torch.set_num_threads(1)


@pytest.mark.parametrize("participants", [3, 2])
def test_the_floor_ends_with_the_parameters_of_the_memory_run(tmp_path: Path, participants: int) -> None:
    config = small_config(
        tmp_path,
        f"method.name={METHOD}",
        "training.num_rounds=3",
        f"control.participants_per_round={participants}",
    )
    run_cluster(config, False, False, Console(quiet=True), StopFlag())
    calls: list[int] = []
    rounds = played_rounds(config.run_folder)
    floor = run_floor(config, load_dataset(config.data.dataset), rounds, lambda: calls.append(1))
    assert [len(played.worker_ids) for played in rounds] == [participants] * 3
    assert len(calls) == 3
    assert same_bits(floor, checkpoint_of(config).tensors)
    name = "conv1.0.bias"
    assert not same_bits(floor | {name: floor[name] + 1e-6}, checkpoint_of(config).tensors)


def test_the_benchmark_measures_a_network_with_batch_norm_and_sees_that_the_bits_are_the_same(tmp_path: Path) -> None:
    settings = run_settings("m5", None, tmp_path, num_workers=2, batch_size=2)
    settings += ["training.local_steps=2", f"training.num_rounds={1 + UNCOUNTED_ROUNDS}"]
    rows = [[cell.strip() for cell in row.split("|")] for row in compare(settings, ["memory", "ipc"], 1)]
    assert [(row[0], row[-1]) for row in rows] == [("memory", "yes"), ("ipc", "yes"), ("ipc, bare", "yes")]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)


def test_rounds_are_counted_from_the_end_of_the_first_to_the_end_of_the_last_but_one() -> None:
    marks = [Mark(10.0, 1.0), Mark(12.0, 1.5), Mark(15.0, 2.5), Mark(99.0, 99.0)]
    assert counted(marks, 4) == counted(marks[:3], 4) == Mark(5.0, 1.5)


def test_cpu_seconds_of_this_process_are_counted_once_per_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 5.0)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: {(~7 << 3) | 2: 0.5, (~8 << 3) | 2: 0.25}[clock])
    assert mark([7, 8]).cpu_seconds == 5.75


def test_a_mark_is_made_once_per_line_of_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    marks = RoundMarks(journal, list)
    assert not marks.is_set() and marks.marks == []
    for num_lines in (1, 2):
        with journal.open("a") as file:
            file.write("{}\n")
        assert not marks.is_set() and not marks.is_set()
        assert len(marks.marks) == num_lines


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown workload 'm6'.*m5"):
        find_workload("m6")


def test_a_simulated_run_is_measured_against_the_same_floor(capsys: pytest.CaptureFixture[str]) -> None:
    measure_overhead("digits", num_rounds=1, num_repeats=1)
    assert "simulated / floor, median of 1: " in capsys.readouterr().out
