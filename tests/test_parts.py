"""How a batch is cut into parts: the rule in words, for every size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergesfl.parts import MAX_PARTS_PER_STEP, part_bytes, part_sizes


@given(st.integers(1, 10_000), st.integers(1, MAX_PARTS_PER_STEP))
def test_parts_are_as_equal_as_possible_and_none_is_empty(num_samples: int, parts_per_step: int) -> None:
    sizes = part_sizes(num_samples, parts_per_step)
    assert sum(sizes) == num_samples and len(sizes) == min(parts_per_step, num_samples)
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    assert list(sizes) == sorted(sizes, reverse=True)


def test_by_hand() -> None:
    assert part_sizes(7, 3) == (3, 2, 2)
    assert part_sizes(2, 8) == (1, 1)
    assert part_sizes(64, 1) == (64,)
    assert part_bytes(7 * 512, 7, 3) == (3 * 512, 2 * 512, 2 * 512)
