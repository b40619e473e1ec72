"""A data set in memory: two splits, its classes, and how its numbers become a network's input.

Legend: n samples of a split, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergesfl.data.scale import IDENTITY, PIXELS, SOUND, Array, Scale, scale_of
from mergesfl.errors import DataError
from mergesfl.protocol.limits import DEFAULT

__all__ = ["IDENTITY", "PIXELS", "SOUND", "Array", "Dataset", "IntArray", "Scale", "Split", "make_split", "scale_of"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and labels, as stored: images stay uint8 and sound int16 until a batch of them is made.

    Attributes:
        x: (n, *sample_shape) float32, uint8 or int16.
        y: (n,) int64, 0..C-1.
        groups: (n,) int64, who a sample comes from (HAR: subject, speech: speaker); None when that is not known.
    """

    x: Array
    y: IntArray
    groups: IntArray | None = None

    @property
    def num_samples(self) -> int:
        """The length n of the split."""
        return len(self.y)

    def take(self, indices: Sequence[int] | IntArray) -> Split:
        """The samples of these rows, copied, in this order."""
        rows = np.asarray(indices, dtype=np.int64)
        return Split(self.x[rows], self.y[rows], None if self.groups is None else self.groups[rows])

    def label_counts(self, num_classes: int) -> tuple[int, ...]:
        """(C,) how many samples carry each label."""
        return tuple(int(count) for count in np.bincount(self.y, minlength=num_classes))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test split of one classification task.

    Attributes:
        name: its name in mergesfl.data.DATASETS.
        train: training split; what the partitioners spread over the workers.
        test: test split; only evaluated; empty where only the training split was asked for.
        num_classes: C.
        class_names: (C,) in label order, distinct: the labels of a worker's own data are matched by these names. Data
            without names use "0", "1", ..., so that their numbers are matched.
        sample_shape: shape of one sample as the network wants it, the channel first.
        scale: how stored numbers become the network's input.

    Raises:
        DataError: class names that are not C distinct ones which a message can carry.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    scale: Scale

    def __post_init__(self) -> None:
        names, longest = self.class_names, DEFAULT.max_name_length
        if len(names) != self.num_classes or len(set(names)) != len(names):
            raise DataError(
                f"{len(names)} class names, {len(set(names))} of them distinct, for {self.num_classes} classes: "
                "expected one distinct name per class"
            )
        for name in names:
            if not 0 < len(name) <= longest or not name.isprintable():
                raise DataError(
                    f"class name {name[:longest]!r}: expected 1 to {longest} printable characters; rename it"
                )


def make_split(
    where: object,
    x: Array,
    y: Array,
    groups: Array | None,
    num_classes: int,
    sample_shape: tuple[int, ...],
    may_be_empty: bool = False,
) -> Split:
    """A checked split from what a file held.

    Args:
        where: the path the numbers came from, for the message.
        x: (n, *sample_shape); float16/64 and wide integers become float32, uint8 and int16 stay.
        y: (n,) integers 0..num_classes-1.
        groups: (n,) integers, or None.
        num_classes: C.
        sample_shape: what one sample must look like.
        may_be_empty: whether n = 0 is legal: a worker of a run may hold nothing.

    Raises:
        DataError: wrong shapes, counts that differ, no rows, a label out of range, numbers that are not finite.
    """
    if x.ndim == 0 or x.shape[1:] != sample_shape:
        raise DataError(f"{where}: samples of shape {x.shape[1:]}, expected {sample_shape}")
    if y.ndim != 1 or len(y) != len(x):
        raise DataError(f"{where}: {len(x)} samples and labels of shape {y.shape}, expected one label per sample")
    if groups is not None and groups.shape != y.shape:
        raise DataError(f"{where}: {len(x)} samples and groups of shape {groups.shape}, expected one group per sample")
    if len(x) == 0 and not may_be_empty:
        raise DataError(f"{where}: no samples, expected at least one")
    labels = _integers(where, "labels", y)  # (n,)
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        row = int(outside[0])
        raise DataError(f"{where}: label {labels[row]} in row {row} (from 0), expected 0..{num_classes - 1}")
    group_ids = None if groups is None else _integers(where, "groups", groups)  # (n,)
    return Split(_samples(where, x), labels, group_ids)


def _integers(where: object, what: str, values: Array) -> IntArray:
    if values.dtype.kind not in "iu" and values.size:  # np.array([]) is float64
        raise DataError(f"{where}: {what} of type {values.dtype}, expected whole numbers")
    return values.astype(np.int64)


def _samples(where: object, x: Array) -> Array:
    if x.dtype.kind not in "fiu":
        raise DataError(f"{where}: samples of type {x.dtype}, expected float32, uint8 or int16")
    if x.dtype in (np.dtype(np.uint8), np.dtype(np.int16)):
        return np.ascontiguousarray(x)
    with np.errstate(over="ignore"):  # what overflows float32 is reported just below
        stored: Array = np.ascontiguousarray(x, dtype=np.float32)
    finite = np.isfinite(stored).all(axis=tuple(range(1, stored.ndim)))  # (n,)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"{where}: row {row} (from 0) holds numbers that are not finite, expected finite float32")
    return stored
