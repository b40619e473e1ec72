"""What one round did, as a record: the keys of a journal line.

Legend: S the workers of a round's plan; per-worker tuples are in plan order and have one entry per worker of S.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergesfl.errors import CheckpointError


@dataclass(frozen=True)
class DroppedWorker:
    """A worker that the round went on without: since which step, and why."""

    worker_id: str
    step: int
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """What one round did: the keys of a journal line.

    Attributes:
        round_num: h, counted from 0.
        accuracy: share of the test set that is classified right, 0..1; None when this round was not evaluated.
        loss_nats: mean cross-entropy on the test set; None when not evaluated.
        train_loss_nats: mean over the steps of the loss that was trained on; None when there was none.
        worker_ids: S in plan order.
        batch_sizes: d_i in samples.
        finished_worker_ids: the workers whose update went into the average.
        dropped: the workers of S that were lost on the way.
        kl_before_nats: KL of Eq. 12 of S before the fine-tuning of Eq. 14 [paper].
        kl_after_nats: the same for the batch sizes of the plan [paper].
        merged_kl_nats: the same, weighted with the batches of the workers that really answered [ours].
        predicted_seconds: t_i of Eq. 7 [paper].
        observed_seconds: what worker i really took (compute + transfer); None for a worker that did not finish.
        predicted_idle_seconds: W, mean over S of (max_j t_j - t_i) [paper].
        idle_seconds: W from the observed seconds of the workers that finished.
        ingress_bytes: bytes that the PS received in this round.
        egress_bytes: bytes that the PS sent in this round.
        samples_trained: samples that went into a step of the top (or of a full model).
        planning_seconds: what the plan itself took; part of round_seconds.
        round_seconds: from the survey, or else from the start of planning, to the end of the average, without the
            evaluation.
        evaluation_seconds: what the evaluation took; 0 when there was none. It runs beside the next round (on a real
            clock) and is part of no round_seconds: where it takes longer than that round, the rest of it is between
            that round and the one after.
        learning_rate: of the top (or of the full model) in this round.
        attempt: 1, and one more for each time that this round was void and repeated.
        ingress_budget_bytes: B of Eq. 10 [paper]; 0 when the method has no budget.
        ingress_bytes_per_step: sum of d_i * c: how much of it the plan uses.
        survey_seconds: what asking all workers for their speeds took; part of round_seconds. 0 when nobody was asked.
        waiting_seconds: how long a worker of those that finished had nothing to do: while the PS held its requests, and
            from its update to the last one; the mean. idle_seconds compares the workers' sums over the round, so it is
            what even a server that answers at once cannot avoid; this is what it came to, step by step. None: unknown.
    """

    round_num: int
    accuracy: float | None
    loss_nats: float | None
    train_loss_nats: float | None
    worker_ids: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    finished_worker_ids: tuple[str, ...]
    dropped: tuple[DroppedWorker, ...]
    kl_before_nats: float | None
    kl_after_nats: float | None
    merged_kl_nats: float | None
    predicted_seconds: tuple[float | None, ...]
    observed_seconds: tuple[float | None, ...]
    predicted_idle_seconds: float | None
    idle_seconds: float | None
    ingress_bytes: int
    egress_bytes: int
    samples_trained: int
    planning_seconds: float
    round_seconds: float
    evaluation_seconds: float
    learning_rate: float
    attempt: int = 1
    ingress_budget_bytes: int = 0
    ingress_bytes_per_step: int = 0
    survey_seconds: float = 0.0
    waiting_seconds: float | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.worker_ids), len(self.batch_sizes), len(self.predicted_seconds), len(self.observed_seconds)}
        assert len(lengths) == 1, f"per-worker fields of round {self.round_num} differ in length: {lengths}"

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; a number that is not finite becomes None."""
        row = {field.name: plain_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        row["dropped"] = [dataclasses.asdict(lost) for lost in self.dropped]
        return row

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> RoundRecord:
        """The record of one journal line. Keys that this version does not know are ignored.

        Raises CheckpointError when a key is missing.
        """
        known: dict[str, Any] = {
            field.name: row[field.name] for field in dataclasses.fields(RoundRecord) if field.name in row
        }
        required = {field.name for field in dataclasses.fields(RoundRecord) if field.default is dataclasses.MISSING}
        missing = required - known.keys()
        if missing:
            raise CheckpointError(
                f"journal line of round {row.get('round_num')} lacks {', '.join(sorted(missing))}; "
                "it was written by another version: read it with read_journal instead"
            )
        known["dropped"] = [DroppedWorker(lost["worker_id"], lost["step"], lost["reason"]) for lost in known["dropped"]]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in known.items()
        }
        return RoundRecord(**values)


def plain_json(value: Any) -> Any:
    """The value as valid JSON holds it: NaN and infinities become None, tuples lists, numpy values Python's.

    Raises TypeError for anything else that JSON has no form for.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_json(dataclasses.asdict(value))
    raise TypeError(f"JSON has no form for {type(value).__name__}: {value!r}")


def last_attempts(records: Sequence[RoundRecord | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One JSON row per round, in order of the rounds: of a round that was repeated the last attempt."""
    rows = [record.to_json() if isinstance(record, RoundRecord) else dict(record) for record in records]
    by_round = {row["round_num"]: row for row in rows}
    return [by_round[round_num] for round_num in sorted(by_round)]
