"""The journal of a run: one JSON object per line and round, on the disk before the next round is over; and its summary.

A line is written whole or not at all as far as a reader can tell: a crash in mid-write leaves a torn last line, which
readers skip and the next `Journal` cuts off. Everything here is the run's record, not its state (see checkpoint.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.runtime.files import write_atomic
from mergesfl.runtime.record import DroppedWorker, RoundRecord, last_attempts, plain_json

__all__ = ["SUMMARY_KEYS", "DroppedWorker", "Journal", "RoundRecord", "read_journal", "summarise", "write_summary"]

SUMMARY_KEYS = (
    *("method", "dataset", "partition", "num_workers", "num_rounds", "seed", "final_accuracy", "best_accuracy"),
    *("wall_seconds", "round_seconds_mean", "idle_seconds_mean", "ingress_bytes", "egress_bytes", "samples_trained"),
    "merged_kl_nats_mean",
)
CONFIG_KEYS = ("method", "dataset", "partition", "num_workers", "seed")


class Journal:
    """Appends rounds to journal.jsonl; each line is on the disk when `append` returns. One writer at a time."""

    def __init__(self, path: Path, first_round: int = 0) -> None:
        """Opens or creates the journal of a run whose next round is first_round.

        Lines of rounds >= first_round are cut off: a crash may have come after the line and before the checkpoint, so
        these rounds are run again. A torn last line goes too. 0 starts from nothing.

        Raises CheckpointError when a line in the middle is damaged or the file cannot be written.
        """
        self.path = path
        kept = [text for _, row, text in _lines(path) if row["round_num"] < first_round] if path.exists() else []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, b"".join(text + b"\n" for text in kept))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _not_writable(path, error) from error

    def append(self, record: RoundRecord | Mapping[str, Any]) -> None:
        """Writes one line and waits until it is on the disk.

        Raises CheckpointError when it cannot be written (disk full); the lines before it are intact then.
        """
        row = record.to_json() if isinstance(record, RoundRecord) else plain_json(record)
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise _not_writable(self.path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, oldest first; a torn last line is left out.

    Raises CheckpointError when the file is missing or a line before the last is damaged (with its number).
    """
    return [row for _, row, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[int, dict[str, Any], bytes]]:
    """(line number from 1, object, bytes without the newline) of every intact line."""
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"journal {path} cannot be read ({error.strerror}); expected the journal.jsonl of a run folder: "
            "check the path"
        ) from error
    while texts and not texts[-1].strip():
        texts.pop()
    rows: list[tuple[int, dict[str, Any], bytes]] = []
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text)
            intact = isinstance(row, dict) and isinstance(row.get("round_num"), int)
        except ValueError:
            intact = False
        if intact:
            rows.append((number, row, text))
        elif number < len(texts):
            raise CheckpointError(
                f"journal {path}: line {number} of {len(texts)} is damaged ({text[:40]!r}...); expected one JSON "
                "object with round_num: delete that line, or move the file away to go on without the old rounds"
            )
    return rows


def summarise(
    config_values: Mapping[str, Any], records: Sequence[RoundRecord | Mapping[str, Any]], wall_seconds: float
) -> dict[str, Any]:
    """The summary of a run: at least SUMMARY_KEYS.

    Bytes and samples are sums over all lines, void attempts included (they really crossed the network); means are over
    rounds, one value each (the last attempt), without the rounds where the value is unknown. num_rounds counts the
    rounds that were done. A value that no round has is None.

    Args:
        config_values: holds CONFIG_KEYS; num_rounds, if there, is reported as num_rounds_planned.
        records: every journal line of the run.
        wall_seconds: from the start of the run to its end, evaluation included.

    Raises ConfigError when config_values lacks one of CONFIG_KEYS.
    """
    missing = [key for key in CONFIG_KEYS if key not in config_values]
    if missing:
        raise ConfigError(
            f"summary needs {', '.join(CONFIG_KEYS)}; missing: {', '.join(missing)}; pass them by these names"
        )
    every = [record.to_json() if isinstance(record, RoundRecord) else dict(record) for record in records]
    rows = last_attempts(every)
    evaluated = [row for row in rows if row["accuracy"] is not None]
    best = max(evaluated, key=lambda row: float(row["accuracy"]), default=None)
    summary = {
        **{key: config_values[key] for key in CONFIG_KEYS},
        "num_rounds": len(rows),
        "num_rounds_planned": config_values.get("num_rounds"),
        "final_accuracy": evaluated[-1]["accuracy"] if evaluated else None,
        "best_accuracy": best["accuracy"] if best else None,
        "best_round": best["round_num"] if best else None,
        "final_loss_nats": evaluated[-1]["loss_nats"] if evaluated else None,
        "wall_seconds": wall_seconds,
        "round_seconds_mean": _mean(rows, "round_seconds"),
        "planning_seconds_mean": _mean(rows, "planning_seconds"),
        "idle_seconds_mean": _mean(rows, "idle_seconds"),
        "merged_kl_nats_mean": _mean(rows, "merged_kl_nats"),
        "num_dropped": sum(len(row["dropped"]) for row in every),
        **{key: sum(int(row[key]) for row in every) for key in ("ingress_bytes", "egress_bytes", "samples_trained")},
    }
    ordered = {**{key: summary[key] for key in SUMMARY_KEYS}, **summary}
    return {key: plain_json(value) for key, value in ordered.items()}


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json atomically. Raises CheckpointError when it cannot be written."""
    try:
        write_atomic(path, json.dumps(plain_json(summary), indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise _not_writable(path, error) from error


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row[key] is not None and math.isfinite(row[key])]
    return math.fsum(values) / len(values) if values else None


def _not_writable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error.strerror or error}); what was written before is intact: "
        "free space or fix the permissions, then go on with --resume"
    )
