"""Chance as an argument: one seed, and from it an independent stream for every purpose.

A stream is named by what it is for, e.g. ("batches", worker_id, round_num), never by how many numbers were drawn
before it. So a resumed, a repeated or a reordered run draws the same numbers, and nothing has to be stored.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: equal arguments give equal seeds, different ones unrelated seeds.

    >>> seed_for(0, "plan", 3) == seed_for(0, "plan", 3) != seed_for(0, "plan", 4)
    True
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator for one purpose (see `seed_for`)."""
    return np.random.default_rng(seed_for(seed, *purpose))
