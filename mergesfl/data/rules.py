"""How samples are spread over workers: pure functions of (labels, num_workers, generator, groups, parameter).

Every rule gives each sample to exactly one worker; the order inside one worker's array means nothing.
Legend: n samples, N workers, C classes.
"""

from __future__ import annotations

import numpy as np

from mergesfl.data.dataset import IntArray
from mergesfl.errors import ConfigError


def iid(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, parameter: float
) -> list[IntArray]:
    """A random permutation cut into N parts whose sizes differ by at most one."""
    return list(np.array_split(generator.permutation(len(labels)), num_workers))


def dirichlet(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, alpha: float
) -> list[IntArray]:
    """For each class q ~ Dir(alpha * ones(N)); worker j gets a share q_j of the class. [paper as recalled]"""
    parts: list[list[IntArray]] = [[] for _ in range(num_workers)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(num_workers, alpha))  # (N,)
        for worker, piece in enumerate(_cut(rows, shares)):
            parts[worker].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def level(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, p: float
) -> list[IntArray]:
    """The paper's level of non-IID data: p = 0 is iid, otherwise Dir(1/p). [paper as recalled]"""
    if p == 0:
        return iid(labels, num_workers, generator, groups, p)
    return dirichlet(labels, num_workers, generator, groups, 1.0 / p)


def dominant(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, ratio: float
) -> list[IntArray]:
    """A share `ratio` of class c goes to worker c mod N, the rest evenly to the other workers. [code]

    A remainder that does not divide goes to others drawn at random, one each. [ours]
    """
    parts: list[list[IntArray]] = [[] for _ in range(num_workers)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        owner = int(label) % num_workers
        others = generator.permutation([worker for worker in range(num_workers) if worker != owner])
        num_owned = round(ratio * len(rows)) if len(others) else len(rows)
        parts[owner].append(rows[:num_owned])
        if len(others):
            for worker, piece in zip(others, np.array_split(rows[num_owned:], len(others)), strict=True):
                parts[worker].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def shards(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, num_shards: float
) -> list[IntArray]:
    """Samples sorted by label, cut into N * k equal shards, k random shards per worker (McMahan et al. 2017)."""
    per_worker = int(num_shards)
    by_label = generator.permutation(len(labels))
    by_label = by_label[np.argsort(labels[by_label], kind="stable")]  # which rows share a shard is chance as well
    pieces = np.array_split(by_label, num_workers * per_worker)
    drawn = generator.permutation(len(pieces)).reshape(num_workers, per_worker)  # (N, k)
    return [np.concatenate([pieces[shard] for shard in row]) for row in drawn]


def quantity(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, beta: float
) -> list[IntArray]:
    """IID labels, unequal sizes: shares q ~ Dir(beta * ones(N)) of a random permutation (Li et al., ICDE 2022)."""
    rows = generator.permutation(len(labels))
    return _cut(rows, generator.dirichlet(np.full(num_workers, beta)))


def natural(
    labels: IntArray, num_workers: int, generator: np.random.Generator, groups: IntArray | None, parameter: float
) -> list[IntArray]:
    """Whole groups (subjects, speakers), in random order; numbers of groups per worker differ by at most one. [ours]

    Raises ConfigError when the data set has no groups, or fewer groups than workers.
    """
    if groups is None:
        raise ConfigError("partition 'groups' needs a data set with groups (har, speech, an npz with group_train)")
    names = np.unique(groups)
    if len(names) < num_workers:
        raise ConfigError(f"partition 'groups': {len(names)} groups for {num_workers} workers: use fewer workers")
    spread = np.array_split(generator.permutation(names), num_workers)
    return [np.flatnonzero(np.isin(groups, mine)) for mine in spread]


def _cut(rows: IntArray, shares: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[IntArray]:
    """Rows cut at the rounded cumulated shares: each piece is within one sample of its share."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)  # (N - 1,), not decreasing
    return list(np.split(rows, np.minimum(ends, len(rows))))
