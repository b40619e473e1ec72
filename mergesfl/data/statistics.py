"""What a partition looks like in numbers. Legend: N workers, C classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergesfl.data.dataset import IntArray
from mergesfl.errors import ConfigError

if TYPE_CHECKING:
    from mergesfl.data.partition import Partition


@dataclass(frozen=True)
class PartitionStatistics:
    """How unequal the workers are.

    Attributes:
        num_workers: N.
        num_samples: samples over all workers.
        num_classes: C.
        label_counts_per_worker: (N, C).
        num_samples_per_worker: (N,).
        sample_share_per_worker: (N,) of all samples; sums to 1.
        mean_kl_nats: mean over the workers that hold samples of KL(V_i || Phi_0), natural logarithm.
        max_kl_nats: the largest of them.
        num_workers_with_one_class: workers all of whose samples carry one label.
        num_workers_without_samples: workers with nothing.
    """

    num_workers: int
    num_samples: int
    num_classes: int
    label_counts_per_worker: tuple[tuple[int, ...], ...]
    num_samples_per_worker: tuple[int, ...]
    sample_share_per_worker: tuple[float, ...]
    mean_kl_nats: float
    max_kl_nats: float
    num_workers_with_one_class: int
    num_workers_without_samples: int


def partition_statistics(partition: Partition, labels: IntArray, num_classes: int) -> PartitionStatistics:
    """The statistics of a partition of these labels.

    Phi_0 is the unweighted mean of V_i [paper], over the workers that hold samples: others have no V_i [ours].

    Args:
        partition: of these very labels (its digest is compared).
        labels: (n,) 0..C-1.
        num_classes: C.

    Raises:
        DataError: the partition belongs to other labels.
        ConfigError: a label is not below num_classes.
    """
    partition.check_labels(labels)
    if len(labels) and int(labels.max()) >= num_classes:
        raise ConfigError(f"label {int(labels.max())} with num_classes {num_classes}: expected 0..{num_classes - 1}")
    counts = np.stack([np.bincount(labels[rows], minlength=num_classes) for rows in partition.assignments])  # (N, C)
    sizes = counts.sum(axis=1)  # (N,)
    label_mix = counts[sizes > 0] / sizes[sizes > 0, None]  # V_i, (workers with samples, C)
    reference = label_mix.mean(axis=0)  # Phi_0, (C,)
    ratio = np.divide(label_mix, reference, out=np.ones_like(label_mix), where=label_mix > 0)  # 0 ln 0 = 0
    kl_nats = np.maximum((label_mix * np.log(ratio)).sum(axis=1), 0.0)  # rounding may give -1e-17
    return PartitionStatistics(
        num_workers=partition.num_workers,
        num_samples=int(sizes.sum()),
        num_classes=num_classes,
        label_counts_per_worker=tuple(tuple(int(count) for count in row) for row in counts),
        num_samples_per_worker=tuple(int(size) for size in sizes),
        sample_share_per_worker=tuple(float(size / sizes.sum()) for size in sizes),
        mean_kl_nats=float(kl_nats.mean()),
        max_kl_nats=float(kl_nats.max()),
        num_workers_with_one_class=int(((counts > 0).sum(axis=1) == 1).sum()),
        num_workers_without_samples=int((sizes == 0).sum()),
    )
