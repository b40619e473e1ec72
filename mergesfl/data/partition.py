"""Which worker holds which samples: written as text ("dirichlet(0.1)"), drawn once, checked, saved and read again.

A partition is a pure function of (labels, num_workers, generator, groups). The rules are in rules.py.
Legend: n samples, N workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergesfl.data import rules
from mergesfl.data.dataset import IntArray
from mergesfl.data.npz import read_npz
from mergesfl.data.statistics import PartitionStatistics, partition_statistics
from mergesfl.errors import ConfigError, DataError, unknown_name
from mergesfl.runtime.files import write_atomic

Rule = Callable[[IntArray, int, np.random.Generator, "IntArray | None", float], list[IntArray]]


@dataclass(frozen=True)
class RuleSpec:
    """One line of the table of partitioners: the rule, and what may stand between its brackets.

    Attributes:
        rule: one of mergesfl.data.rules.
        parameter: its name; "" when the rule takes none.
        low: smallest legal value.
        high: largest legal value.
        whole: only whole numbers.
    """

    rule: Rule
    parameter: str = ""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False


# Limits: below 1e-4 a Dirichlet draw is one worker in float64, above 1e6 it is even.
PARTITIONERS: dict[str, RuleSpec] = {
    "iid": RuleSpec(rules.iid),
    "dirichlet": RuleSpec(rules.dirichlet, "alpha", 1e-4, 1e6),
    "level": RuleSpec(rules.level, "p", 0.0, 1e4),
    "dominant": RuleSpec(rules.dominant, "ratio", 0.0, 1.0),
    "shards": RuleSpec(rules.shards, "k", 1, 1e6, whole=True),
    "quantity": RuleSpec(rules.quantity, "beta", 1e-4, 1e6),
    "groups": RuleSpec(rules.natural),
}


@dataclass(frozen=True, eq=False)
class Partition:
    """Who holds what.

    Attributes:
        text: how it was asked for, e.g. "dirichlet(0.1)".
        num_workers: N.
        seed: the seed it was drawn with, for the record; None when the caller did not tell.
        assignments: N arrays of row numbers, int64, sorted; together they hold 0..n-1 once each. Read-only.
        labels_sha256: digest of the labels it was drawn for.

    Raises:
        DataError: the assignments are not such a set.
    """

    text: str
    num_workers: int
    seed: int | None
    assignments: tuple[IntArray, ...]
    labels_sha256: str

    def __post_init__(self) -> None:
        if len(self.assignments) != self.num_workers or self.num_workers < 1:
            raise DataError(f"partition of {len(self.assignments)} parts, expected {self.num_workers}, at least 1")
        for worker, rows in enumerate(self.assignments):
            if rows.ndim != 1 or rows.dtype != np.int64 or (np.diff(rows) <= 0).any():
                raise DataError(f"partition, worker {worker}: expected sorted, distinct int64 row numbers")
            rows.flags.writeable = False
        everything = np.sort(np.concatenate(self.assignments))  # (n,)
        if not np.array_equal(everything, np.arange(len(everything))):
            raise DataError(f"partition: row numbers must be 0..{len(everything) - 1}, each exactly once")

    @property
    def num_samples(self) -> int:
        """The number n of samples over all workers."""
        return sum(len(rows) for rows in self.assignments)

    def check_labels(self, labels: IntArray) -> None:
        """Raises DataError when this partition was drawn for other labels."""
        if len(labels) != self.num_samples or _digest(labels) != self.labels_sha256:
            raise DataError(
                f"the partition '{self.text}' was drawn for other labels ({self.num_samples} samples, sha256 "
                f"{self.labels_sha256[:12]}) than these ({len(labels)}): draw it again or use its own data set"
            )


@dataclass(frozen=True)
class Partitioner:
    """A rule with its parameter; call `split` to draw.

    Attributes:
        text: the normal form, e.g. "dirichlet(0.1)".
        name: a name of PARTITIONERS.
        parameter: the number between the brackets; 0 when the rule takes none.
    """

    text: str
    name: str
    parameter: float = 0.0

    def split(
        self,
        labels: IntArray,
        num_workers: int,
        generator: np.random.Generator,
        groups: IntArray | None = None,
        seed: int | None = None,
    ) -> Partition:
        """Draws a partition of the rows of `labels` (n,). `seed` is only written down.

        Raises ConfigError for num_workers < 1, no samples, or groups that are missing or too few.
        """
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}, expected at least 1")
        if len(labels) == 0:
            raise ConfigError("there are no samples to spread over workers: the training split is empty")
        parts = PARTITIONERS[self.name].rule(labels, num_workers, generator, groups, self.parameter)
        assignments = tuple(np.sort(part).astype(np.int64) for part in parts)
        return Partition(self.text, num_workers, seed, assignments, _digest(labels))


def parse_partition(text: str) -> Partitioner:
    """The partitioner that a text names: "iid", "groups", "dirichlet(0.1)", "level(10)", "shards(2)", ...

    Raises ConfigError for an unknown name (with the nearest legal one) and for a parameter that is not legal.
    """
    match = re.fullmatch(r"\s*([A-Za-z_-]+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None:
        raise ConfigError(f"partition '{text}': expected a name or name(number), e.g. iid, dirichlet(0.1)")
    name, argument = match.group(1), match.group(2)
    if name not in PARTITIONERS:
        raise unknown_name("partition", name, PARTITIONERS)
    spec = PARTITIONERS[name]
    if not spec.parameter:
        if argument is not None:
            raise ConfigError(f"partition '{text}': '{name}' takes no number: write {name}")
        return Partitioner(name, name)
    kind = "a whole number" if spec.whole else "a number"
    legal = f"{name}({spec.parameter}) with {spec.parameter} {kind} from {spec.low:g} to {spec.high:g}"
    try:
        value = float(argument or "")
    except ValueError:
        raise ConfigError(f"partition '{text}': expected {legal}") from None
    # The level 0 is iid, and between 0 and 1e-6 its Dirichlet parameter 1/p would leave the legal range.
    out_of_range = not spec.low <= value <= spec.high or (name == "level" and 0 < value < 1e-6)
    if not math.isfinite(value) or out_of_range or (spec.whole and value != int(value)):
        raise ConfigError(f"partition '{text}': expected {legal}")
    return Partitioner(f"{name}({value:.12g})", name, value)


def save_partition(path: Path, partition: Partition, labels: IntArray, num_classes: int) -> PartitionStatistics:
    """Writes the partition to `path` (.npz) and its statistics, readable, beside it (.json); returns them.

    Each file is written whole or not at all, the partition last: where it exists its statistics do too.

    Raises ConfigError for another suffix, and DataError for labels that are not the partition's.
    """
    if path.suffix != ".npz":
        raise ConfigError(f"a partition is saved as .npz, got '{path}': change the name")
    statistics = partition_statistics(partition, labels, num_classes)
    ends = np.cumsum([len(rows) for rows in partition.assignments])  # (N,)
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        rows=np.concatenate(partition.assignments),  # (n,) worker after worker
        ends=ends,
        text=np.array(partition.text),
        seed=np.array("" if partition.seed is None else str(partition.seed)),
        labels_sha256=np.array(partition.labels_sha256),
    )
    record = {"text": partition.text, "seed": partition.seed, "labels_sha256": partition.labels_sha256}
    report = json.dumps({**record, **dataclasses.asdict(statistics)}, indent=2)
    # One line per worker: json puts every number of a row on a line of its own.
    report = re.sub(r"\[[^\[\]]*\]", lambda row: re.sub(r"\s+", " ", row.group()), report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_suffix(".json"), (report + "\n").encode("utf-8"))
    write_atomic(path, packed.getvalue())
    return statistics


def load_partition(path: Path) -> Partition:
    """Reads what save_partition wrote. Raises DataError when the file is missing, damaged or not a partition."""
    arrays = read_npz(path, ("rows", "ends", "text", "seed", "labels_sha256"))
    rows, ends, seed = arrays["rows"], arrays["ends"], str(arrays["seed"])
    whole = rows.dtype == np.int64 and ends.dtype.kind in "iu" and rows.ndim == ends.ndim == 1 and len(ends) > 0
    if not whole or int(ends[-1]) != len(rows) or int(ends[0]) < 0 or (np.diff(ends) < 0).any():
        raise DataError(
            f"{path}: not a partition: row numbers and their ends do not fit, expected what this program saved"
        )
    if seed and not re.fullmatch(r"-?\d+", seed):
        raise DataError(f"{path}: seed '{seed}', expected a whole number or nothing")
    try:
        return Partition(
            text=str(arrays["text"]),
            num_workers=len(ends),
            seed=int(seed) if seed else None,
            assignments=tuple(np.array(part) for part in np.split(rows, ends[:-1])),
            labels_sha256=str(arrays["labels_sha256"]),
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _digest(labels: IntArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()
