"""The private data of one worker: a data set of its own, or its share of a partition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergesfl.data import load_dataset
from mergesfl.data.dataset import Array, Dataset, IntArray, Scale
from mergesfl.data.partition import load_partition
from mergesfl.errors import ConfigError


@dataclass(frozen=True)
class LocalData:
    """Samples x (n, *sample_shape) as stored, labels y (n,), and how stored numbers become network input."""

    x: Array
    y: IntArray
    scale: Scale
    sample_shape: tuple[int, ...]
    num_classes: int

    @property
    def label_counts(self) -> tuple[int, ...]:
        """(C,) how many samples carry each label."""
        return tuple(int(count) for count in np.bincount(self.y, minlength=self.num_classes))


def share_of(dataset: Dataset, indices: IntArray | None) -> LocalData:
    """The training samples at these positions; None: all of them."""
    train = dataset.train
    x, y = (train.x, train.y) if indices is None else (train.x[indices], train.y[indices])
    return LocalData(x, y, dataset.scale, dataset.sample_shape, dataset.num_classes)


def load_local_data(dataset: str, partition_file: Path | None, index: int | None, image_size_pixels: int) -> LocalData:
    """Reads a data set ("name" or "name:path") and takes a share of it when a partition is named.

    Raises DataError, or ConfigError for an index that the partition does not have.
    """
    whole = load_dataset(dataset, image_size_pixels=image_size_pixels)
    if partition_file is None:
        return share_of(whole, None)
    partition = load_partition(partition_file)
    if index is None or not 0 <= index < len(partition.assignments):
        raise ConfigError(
            f"--index {index}: {partition_file} has the shares 0 to {len(partition.assignments) - 1}; give one of them"
        )
    partition.check_labels(whole.train.y)
    return share_of(whole, partition.assignments[index])
