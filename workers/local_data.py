"""The private data of one worker: a data set of its own, or its share of a partition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergesfl.data import load_dataset
from mergesfl.data.dataset import Array, Dataset, IntArray, Scale
from mergesfl.data.partition import load_partition
from mergesfl.errors import ConfigError


@dataclass(frozen=True)
class LocalData:
    """Samples x (n, *sample_shape) as stored, labels y (n,), and how stored numbers become network input.

    Labels and scale are those of this data by itself until `relabelled` and `rescaled` fit them to a run.
    """

    x: Array
    y: IntArray
    scale: Scale
    sample_shape: tuple[int, ...]
    class_names: tuple[str, ...]  # (C,) in label order

    @property
    def label_counts(self) -> tuple[int, ...]:
        """(C,) how many samples carry each label."""
        return tuple(int(count) for count in np.bincount(self.y, minlength=len(self.class_names)))

    def relabelled(self, class_names: tuple[str, ...]) -> LocalData:
        """The same samples with the labels of a run: each class keeps its name and takes the run's number for it.

        Raises ConfigError when this data holds samples of a class that the run does not know.
        """
        number = {name: label for label, name in enumerate(class_names)}
        for name, count in zip(self.class_names, self.label_counts, strict=True):
            if count and name not in number:
                raise ConfigError(
                    f"this worker holds {count} samples of class '{name}', the run knows {', '.join(class_names)}: "
                    "name the data set of the run with --dataset"
                )
        new_label = np.array([number.get(name, -1) for name in self.class_names], dtype=np.int64)  # (C of this data,)
        return replace(self, y=new_label[self.y], class_names=class_names)

    def rescaled(self, scale: Scale, stored_type: str) -> LocalData:
        """The same samples with the scale of a run, which is meant for numbers stored as `stored_type`.

        Raises ConfigError when this data holds samples that are stored in another way.
        """
        if len(self.y) and self.x.dtype.name != stored_type:
            raise ConfigError(
                f"the run is for samples stored as {stored_type}, this worker's are {self.x.dtype.name}: store them as "
                f"{stored_type}, or name the data set of the run with --dataset"
            )
        return replace(self, scale=scale)


def share_of(dataset: Dataset, indices: IntArray | None) -> LocalData:
    """The training samples at these positions; None: all of them."""
    train = dataset.train
    x, y = (train.x, train.y) if indices is None else (train.x[indices], train.y[indices])
    return LocalData(x, y, dataset.scale, dataset.sample_shape, dataset.class_names)


def load_local_data(dataset: str, partition_file: Path | None, index: int | None, image_size_pixels: int) -> LocalData:
    """Reads the training samples of a data set ("name" or "name:path"), or its share of them when a partition is named.

    Raises DataError, or ConfigError for an index that the partition does not have.
    """
    if partition_file is None:
        if index is not None:
            raise ConfigError(f"--index {index} names a share of a partition: name the file too, with --partition")
        whole = load_dataset(dataset, image_size_pixels=image_size_pixels, train_only=True)
        return share_of(whole, None)
    partition = load_partition(partition_file)
    if index is None or not 0 <= index < len(partition.assignments):
        raise ConfigError(
            f"--index {index}: {partition_file} has the shares 0 to {len(partition.assignments) - 1}; give one of them"
        )
    rows = partition.assignments[index]

    def choose(labels: IntArray) -> IntArray:
        partition.check_labels(labels)
        return rows

    share = load_dataset(dataset, image_size_pixels=image_size_pixels, train_only=True, choose=choose)
    return share_of(share, None)
