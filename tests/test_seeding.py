"""Streams of chance: pinned values, purity, independence."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from mergesfl.seeding import generator_for, seed_for

# Printed once and pinned: another value here means that no earlier run can be repeated or resumed.
GOLDEN: dict[tuple[int, tuple[str | int, ...]], int] = {
    (0, ()): 2_033_344_993_903_900_207,
    (0, ("plan", 3, 1)): 2_917_878_916_846_306_226,
    (1, ("batches", "worker-00", 0)): 4_532_311_423_618_676_499,
    (2**63 - 1, ("weights",)): 2_077_743_705_210_227_322,
}


def test_pinned_seeds() -> None:
    assert {(seed, purpose): seed_for(seed, *purpose) for seed, purpose in GOLDEN} == GOLDEN


def test_a_seed_is_63_bits_of_sha256_of_the_joined_purpose() -> None:
    """The documented recipe, step by step: unit separators, the first 8 bytes little-endian, one bit dropped."""
    digest = hashlib.sha256(b"5\x1ftop\x1f2\x1f9").digest()
    assert seed_for(5, "top", 2, 9) == sum(byte << (8 * i) for i, byte in enumerate(digest[:8])) // 2


def test_pinned_draws() -> None:
    assert generator_for(0, "plan", 3, 1).integers(1000, size=5).tolist() == [828, 710, 557, 437, 172]


def test_streams_depend_on_their_purpose_alone() -> None:
    """Draws of one stream move no other one: there is no hidden state."""
    first = generator_for(0, "batches", "a", 0).random(5)
    generator_for(0, "batches", "b", 0).random(1000)
    np.random.default_rng().random(10)
    assert np.array_equal(generator_for(0, "batches", "a", 0).random(5), first)


def test_seeds_are_different_and_fit_torch_and_json() -> None:
    """3 seeds x 20 names x 20 rounds: 1,200 seeds; a collision by chance has probability 1,200^2 / 2^64 < 1e-13."""
    seeds = [
        seed_for(seed, "batches", f"worker-{i}", h) for seed, i, h in itertools.product(range(3), range(20), range(20))
    ]
    assert len(set(seeds)) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # All 63 bits are used: each is set in about half of the seeds (600 +- 17.3; 6 sigma is 104).
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 600) < 104


def test_neighbouring_purposes_do_not_run_together() -> None:
    """Joined without a separator these would be one text."""
    assert len({seed_for(1, "a", 11), seed_for(1, "a1", 1), seed_for(1, "a", 1, 1), seed_for(11, "a", 1)}) == 4


def test_streams_of_neighbours_are_uncorrelated() -> None:
    """1,000 draws each: |r| < 5 / sqrt(1000) = 0.158 for all pairs of ten neighbouring rounds."""
    draws = np.stack([generator_for(0, "batches", "a", h).standard_normal(1000) for h in range(10)])  # (10, 1000)
    correlation = np.corrcoef(draws) - np.eye(10)
    assert np.abs(correlation).max() < 0.158
