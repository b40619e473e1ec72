"""A worker's batch in parts: how many there are, and how many samples each of them holds; the same at both ends."""

from __future__ import annotations

# Of one step. Every part pays the latency and the overheads of a message, and the gain shrinks: with as long a way up
# as down a step's transfer takes (P + 1) / 2P of the unsplit time, 0.56 with 8 parts, 0.53 with 16. [ours]
MAX_PARTS_PER_STEP = 8


def part_sizes(num_samples: int, parts_per_step: int) -> tuple[int, ...]:
    """Samples of each part: as equal as possible, the first ones have one more, none is empty.

    Args:
        num_samples: d_i of the whole batch.
        parts_per_step: P, how many parts are wanted; fewer are made of fewer samples.

    >>> part_sizes(10, 4), part_sizes(3, 8), part_sizes(10, 1)
    ((3, 3, 2, 2), (1, 1, 1), (10,))
    """
    num_parts = max(1, min(parts_per_step, num_samples))
    share, rest = divmod(num_samples, num_parts)
    return tuple(share + (part < rest) for part in range(num_parts))


def part_bytes(num_bytes: int, num_samples: int, parts_per_step: int) -> tuple[int, ...]:
    """Of so many bytes for the whole batch each part's share, rounded down.

    >>> part_bytes(100, 10, 4)
    (30, 30, 20, 20)
    """
    return tuple(num_bytes * size // num_samples for size in part_sizes(num_samples, parts_per_step))
