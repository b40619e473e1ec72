"""The journal: what is written can be read, after crashes too, and the summary says what the lines say."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.runtime.journal import (
    SUMMARY_KEYS,
    DroppedWorker,
    Journal,
    RoundRecord,
    read_journal,
    summarise,
    write_summary,
)
from mergesfl.runtime.record import last_attempts, plain_json

RECORD = RoundRecord(
    round_num=0,
    accuracy=0.5,
    loss_nats=1.5,
    train_loss_nats=1.25,
    worker_ids=("a", "b"),
    batch_sizes=(8, 4),
    finished_worker_ids=("a",),
    dropped=(DroppedWorker("b", 3, "deadline of 2 s missed"),),
    kl_before_nats=0.2,
    kl_after_nats=0.1,
    merged_kl_nats=0.3,
    predicted_seconds=(1.0, 2.0),
    observed_seconds=(1.5, None),
    predicted_idle_seconds=0.5,
    idle_seconds=0.0,
    ingress_bytes=1000,
    egress_bytes=900,
    samples_trained=120,
    planning_seconds=0.01,
    round_seconds=2.0,
    evaluation_seconds=0.25,
    learning_rate=0.1,
    attempt=1,
)
CONFIG = {"method": "mergesfl", "dataset": "digits", "partition": "iid", "num_workers": 2, "seed": 7, "num_rounds": 9}


def rounds(*numbers: int) -> list[RoundRecord]:
    return [replace(RECORD, round_num=number) for number in numbers]


def numbers_in(path: Path) -> list[int]:
    return [row["round_num"] for row in read_journal(path)]


def test_a_line_reads_back_as_the_same_record(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"  # the folder is made
    with Journal(path) as journal:
        journal.append(RECORD)
        row = read_journal(path)[0]  # on the disk before close
    assert row["dropped"] == [{"worker_id": "b", "step": 3, "reason": "deadline of 2 s missed"}]
    assert row["observed_seconds"] == [1.5, None]
    assert RoundRecord.from_json(row) == RECORD
    assert RoundRecord.from_json({**row, "of_a_later_version": 1}) == RECORD


def test_a_record_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    row = RECORD.to_json()
    del row["idle_seconds"], row["attempt"]  # attempt has a default, idle_seconds has none
    with pytest.raises(CheckpointError, match="round 0 lacks idle_seconds;"):
        RoundRecord.from_json(row)


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append(
            replace(RECORD, train_loss_nats=math.nan, idle_seconds=math.inf, predicted_seconds=(math.nan, 1.0))
        )
        journal.append(
            {"round_num": np.int64(1), "x": np.float32(0.5), "y": np.array([1, 2]), "z": {"k": (True, -math.inf)}}
        )
    # A strict reader: NaN and Infinity are no JSON.
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (rows[0]["train_loss_nats"], rows[0]["idle_seconds"], rows[0]["predicted_seconds"]) == (
        None,
        None,
        [None, 1.0],
    )
    assert rows[1] == {"round_num": 1, "x": 0.5, "y": [1, 2], "z": {"k": [True, None]}}


def test_plain_json_takes_records_and_refuses_the_rest() -> None:
    assert plain_json(RECORD.dropped[0]) == {"worker_id": "b", "step": 3, "reason": "deadline of 2 s missed"}
    with pytest.raises(TypeError, match="JSON has no form for set"):
        plain_json({"a": {1, 2}})


def test_fields_per_worker_must_have_one_length() -> None:
    with pytest.raises(AssertionError, match="round 0 differ in length"):
        replace(RECORD, batch_sizes=(8,))


def test_opening_at_a_round_cuts_that_round_and_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for record in rounds(0, 1, 2, 3):
            journal.append(record)
    before = path.read_bytes().splitlines()
    with Journal(path, first_round=2) as journal:
        assert numbers_in(path) == [0, 1]
        journal.append(rounds(2)[0])
    assert numbers_in(path) == [0, 1, 2]
    assert path.read_bytes().splitlines()[:2] == before[:2]  # kept lines are not rewritten in another form
    Journal(path).close()
    assert path.read_bytes() == b""  # from round 0: a new run


@pytest.mark.parametrize("num_bytes", [1, 2, 30, 200])
def test_a_line_torn_by_a_kill_is_skipped_and_cut_off(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for record in rounds(0, 1, 2):
            journal.append(record)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1  # where the third line begins
    path.write_bytes(whole[: last + num_bytes])
    assert numbers_in(path) == [0, 1]
    with Journal(path, first_round=9) as journal:  # keeps every intact round
        journal.append(rounds(2)[0])
    assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"round_num": 0}\n{"round_num": 1}')
    with Journal(path, first_round=9) as journal:
        journal.append({"round_num": 2})
    assert numbers_in(path) == [0, 1, 2]


def test_zeros_after_a_power_failure_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"round_num": 0}\n' + b"\0" * 100)
    assert numbers_in(path) == [0]


@pytest.mark.parametrize("damaged", [b'{"round_num": 1', b"[1]", b'{"round": 1}', b"", b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"round_num": 0}\n' + damaged + b'\n{"round_num": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 of 3 is damaged"):
        read_journal(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="line 2 of 3"):
        Journal(path, first_round=1)
    assert path.read_bytes() == before  # nothing was lost by trying


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.jsonl cannot be read \(No such file"):
        read_journal(tmp_path / "none.jsonl")


def test_a_crash_while_cutting_off_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for record in rounds(0, 1, 2):
            journal.append(record)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        Journal(path, first_round=1)
    assert numbers_in(path) == [0, 1, 2]


def test_a_full_disk_leaves_the_lines_before_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    real_write = os.write
    with Journal(path) as journal:
        journal.append(rounds(0)[0])
        left = [50, 0]  # bytes that the disk takes of each write: a part, then nothing

        def full(handle: int, data: memoryview) -> int:
            if not left or left[0] == 0:
                raise OSError(28, "No space left on device")
            return real_write(handle, data[: left.pop(0)])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"journal\.jsonl cannot be written \(No space left"):
            journal.append(rounds(1)[0])
        monkeypatch.setattr(os, "write", real_write)
        assert numbers_in(path) == [0]
        journal.append(rounds(1)[0])
    assert numbers_in(path) == [0, 1]


def test_writes_in_pieces_make_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real_write(handle, data[:7]))
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append(RECORD)
    assert RoundRecord.from_json(read_journal(tmp_path / "journal.jsonl")[0]) == RECORD


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_summary(tmp_path / "file" / "summary.json", {})


def test_last_attempts_keeps_one_line_per_round_in_order() -> None:
    void = replace(RECORD, round_num=1, ingress_bytes=1)
    again = replace(RECORD, round_num=1, ingress_bytes=2, attempt=2)
    rows = last_attempts([void, again, RECORD])
    assert [(row["round_num"], row["ingress_bytes"]) for row in rows] == [(0, 1000), (1, 2)]


def test_summary_by_hand() -> None:
    records = [
        replace(RECORD, round_num=0, accuracy=0.25, round_seconds=2.0, idle_seconds=1.0, merged_kl_nats=0.5),
        # Round 1, void: crossed the network, trained, but its time and divergence are not a round's.
        replace(RECORD, round_num=1, accuracy=None, round_seconds=100.0, idle_seconds=9.0, merged_kl_nats=9.0),
        replace(
            RECORD, round_num=1, accuracy=0.75, round_seconds=4.0, idle_seconds=2.0, merged_kl_nats=None, attempt=2
        ),
        replace(RECORD, round_num=2, accuracy=0.5, round_seconds=6.0, idle_seconds=math.nan, merged_kl_nats=0.25),
        replace(
            RECORD, round_num=3, accuracy=None, round_seconds=8.0, idle_seconds=None, merged_kl_nats=0.0, loss_nats=None
        ),
    ]
    summary = summarise(CONFIG, records, wall_seconds=33.5)
    assert tuple(summary)[: len(SUMMARY_KEYS)] == SUMMARY_KEYS
    expected = {
        "method": "mergesfl",
        "dataset": "digits",
        "partition": "iid",
        "num_workers": 2,
        "seed": 7,
        "num_rounds": 4,  # done, not planned
        "num_rounds_planned": 9,
        "final_accuracy": 0.5,  # round 2: round 3 was not evaluated
        "best_accuracy": 0.75,
        "best_round": 1,
        "final_loss_nats": 1.5,
        "wall_seconds": 33.5,
        "round_seconds_mean": 5.0,  # (2 + 4 + 6 + 8) / 4
        "idle_seconds_mean": 1.5,  # (1 + 2) / 2: rounds 2 and 3 do not know
        "merged_kl_nats_mean": 0.25,  # (0.5 + 0.25 + 0) / 3
        "ingress_bytes": 5000,  # five lines
        "egress_bytes": 4500,
        "samples_trained": 600,
        "num_dropped": 5,
        "planning_seconds_mean": 0.01,
    }
    assert summary == expected
    assert summarise(CONFIG, [record.to_json() for record in records], 33.5) == expected


def test_summary_of_nothing_and_of_a_config_with_a_hole() -> None:
    summary = summarise(CONFIG, [], 0.0)
    assert (summary["num_rounds"], summary["final_accuracy"], summary["round_seconds_mean"]) == (0, None, None)
    assert (summary["ingress_bytes"], summary["merged_kl_nats_mean"]) == (0, None)
    with pytest.raises(ConfigError, match="missing: dataset, seed;"):
        summarise({key: value for key, value in CONFIG.items() if key not in ("dataset", "seed")}, [], 0.0)


def test_summary_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"best_accuracy": 0.5, "x": math.nan})
    assert json.loads(path.read_text()) == {"best_accuracy": 0.5, "x": None}

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write_summary(path, {"best_accuracy": 0.75})
    assert json.loads(path.read_text())["best_accuracy"] == 0.5
