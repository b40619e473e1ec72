"""Batch sizes: by speed (Eq. 9), and scaled by one factor to a given sum (Algorithm 1, last step).

Legend: N workers, n chosen workers, d_i samples per step of worker i, D their sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesfl.control.fleet import FloatArray, IntArray

# 64 * s / s may come out as 63.999...: a quotient this close below an integer is that integer. [ours]
_ROUND_OFF = 1e-12
_BISECTIONS = 60  # halvings of the bracket of the scale factor: to the last bit of a float64, nearly


def known_or_typical(seconds_per_sample: Sequence[float | None]) -> FloatArray:
    """(N,) seconds per sample: an unknown speed (None) is taken as the median of the known ones. [ours]

    If none is known all are 1.0: equal, in no real unit. Only ratios matter to Eq. 9.
    """
    known = [seconds for seconds in seconds_per_sample if seconds is not None]
    typical = float(np.median(known)) if known else 1.0
    return np.array([typical if seconds is None else seconds for seconds in seconds_per_sample], dtype=np.float64)


def regulated_batch_sizes(seconds_per_sample: FloatArray, num_samples: IntArray, max_batch_size: int) -> IntArray:
    """d_i = max(1, floor(D_max * (mu_l + beta_l) / (mu_i + beta_i))), l the fastest worker (Eq. 9). [paper]

    Never more than the samples that worker i has; 0 for a worker without samples, which also cannot be l. [ours]

    Args:
        seconds_per_sample: (N,) mu_i + beta_i, compute and transfer.
        num_samples: (N,) size of the local data set.
        max_batch_size: D_max, the batch size of the fastest worker.

    Returns: (N,) d_i in samples per step.
    Raises: ValueError if a speed is not finite or negative, or D_max is less than 1.
    """
    seconds = np.asarray(seconds_per_sample, dtype=np.float64)
    samples = np.asarray(num_samples, dtype=np.int64)
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size is {max_batch_size}, expected at least 1")
    if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
        bad = seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]
        raise ValueError(f"seconds_per_sample holds {bad}, expected finite numbers >= 0: see known_or_typical")
    has_samples = samples > 0  # (N,)
    if not has_samples.any():
        return np.zeros_like(samples)
    fastest = seconds[has_samples].min()
    is_fastest = seconds <= fastest  # (N,) also 0 / 0
    ratio = np.where(is_fastest, 1.0, fastest / np.where(is_fastest, 1.0, seconds))  # (N,) in (0, 1]
    sizes = np.floor(max_batch_size * ratio * (1 + _ROUND_OFF)).astype(np.int64)  # (N,)
    return np.minimum(np.maximum(sizes, 1), samples)


def scale_to_total(batch_sizes: FloatArray | IntArray, caps: IntArray, total_samples: int) -> IntArray:
    """Multiplies all d_i by one factor so that they sum to the total, each from 1 to its cap; integers.

    A worker that reaches its cap stays there and the factor of the others grows. Rounded by largest remainder (the
    earlier worker first among equals), so the sum is exactly min(total, sum of caps).

    Args:
        batch_sizes: (n,) proportions > 0; may be fractional.
        caps: (n,) the most that each may get, >= 1.
        total_samples: D to reach, >= n.

    Raises: ValueError if the total is less than one sample per worker.
    """
    real = np.asarray(batch_sizes, dtype=np.float64)
    total = min(int(total_samples), int(caps.sum()))
    if total < len(real):
        raise ValueError(
            f"{total_samples} samples for {len(real)} workers, expected at least 1 each: choose fewer workers"
        )
    low, high = 0.0, float((caps / real).max())  # at `high` every worker is at its cap
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.clip(middle * real, 1, caps).sum() > total:
            high = middle
        else:
            low = middle
    scaled = np.clip(low * real, 1, caps)  # (n,) sums to the total, less a rounding error
    sizes = np.floor(scaled * (1 + _ROUND_OFF)).astype(np.int64)
    by_remainder = np.argsort(-(scaled - sizes), kind="stable")
    missing = total - int(sizes.sum())
    while missing > 0:
        open_workers = by_remainder[sizes[by_remainder] < caps[by_remainder]][:missing]
        sizes[open_workers] += 1
        missing -= len(open_workers)
    return sizes


def batch_caps(num_samples: IntArray, max_batch_size: int, allow_above_max: bool) -> IntArray:
    """(n,) the largest d_i allowed: the worker's own samples, and D_max unless it may be passed.

    Whether scaling may take d_i past D_max is not published; it may unless ControlSettings says otherwise. [ours]
    """
    samples = np.asarray(num_samples, dtype=np.int64)
    return samples if allow_above_max else np.minimum(samples, max_batch_size)
