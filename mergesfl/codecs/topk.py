"""topk(f): of every sample about f times its numbers, mostly the largest; the others come out as 0.

"Reducing Communication for Split Learning by Randomized Top-k Sparsification" (Zheng, Chen, Lyu, Yao; IJCAI 2023,
arXiv 2305.18469), RandTopk. Each of the k picks takes one of the k largest with probability 1 - a, one of all others
with probability a, so that a neuron which is seldom among the largest is trained nevertheless. [paper]

    k = max(1, round(f F)), F numbers per sample, largest by |x|;  a = 0.1, as in the paper's experiments
    m ~ Binomial(k, a), at most F - k: so many of the others, uniformly; k - m of the k largest, uniformly

Error: a number that is kept is exact, one that is not becomes 0. The worker goes back through the codec as if it had
sent everything, as the codec of gradients is a choice of its own [ours]; in the paper what is dropped gets no gradient.

A sample with something that is not finite sends exactly its k largest, infinities and NaN before all others.
"""

from __future__ import annotations

import math

import numpy as np

from mergesfl.codecs.base import (
    BYTES_PER_FLOAT32,
    VALUES,
    Array,
    Floats,
    IllegalCode,
    Parts,
    require,
    require_names,
)
from mergesfl.errors import ConfigError

RANDOM_SHARE = 0.1  # a
PLACES_AT_A_TIME = 1 << 12  # that are filled; numpy makes an index of 8 bytes of each [ours]


class TopK:
    """f numbers of every sample, each with its place."""

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"topk({fraction:g}) keeps no share of the numbers: give one above 0 and up to 1")
        self._fraction = fraction
        self.name = f"topk({fraction:g})"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES float32 (d, k), "places" int16 or int32 (d, k): in the sample's C order, ascending."""
        d, num, k = len(x), math.prod(x.shape[1:]), self._num_kept(x.shape)
        flat = x.reshape(d, num)
        order = np.argpartition(np.abs(flat), max(num - k, 0), axis=1)[:, ::-1]  # (d, F): the k largest first
        num_random = np.minimum(generator.binomial(k, RANDOM_SHARE, d), num - k)  # (d,)
        largest, others = generator.permuted(order[:, :k], axis=1), generator.permuted(order[:, k:], axis=1)
        num_random[~np.isfinite(flat).all(axis=1)] = 0
        places = largest  # (d, k)
        for row, count in enumerate(num_random):
            places[row, k - count :] = others[row, :count]
        places.sort(axis=1)
        return {VALUES: np.take_along_axis(flat, places, axis=1), "places": places.astype(_type_of(num))}

    def decode(self, parts: Parts, out: Floats) -> None:
        """What was kept, at its places, else 0. Raises IllegalCode."""
        require_names(parts, VALUES, "places")
        d, num, k = len(out), math.prod(out.shape[1:]), self._num_kept(out.shape)
        values = require(parts, VALUES, np.float32, (d, k))
        places = require(parts, "places", _type_of(num), (d, k))
        if places.size and not 0 <= int(places.min()) <= int(places.max()) < num:
            raise IllegalCode(f"places from {places.min()} to {places.max()}, expected 0 to {num - 1}")
        if not (places[:, 1:] > places[:, :-1]).all():
            raise IllegalCode("places that do not ascend, expected each once and in order")
        out[...] = 0
        num_rows = max(1, PLACES_AT_A_TIME // max(k, 1))
        begins = num * np.arange(num_rows)[:, np.newaxis]  # of these samples
        for begin in range(0, d, num_rows):
            rows = slice(begin, begin + num_rows)
            few = places[rows]
            np.put(out[rows], few + begins[: len(few)], values[rows])  # counts in C order, however `out` lies

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """6 per number that is kept, 8 where a sample has more than 32,768."""
        place_bytes = np.dtype(_type_of(math.prod(shape[1:]))).itemsize
        return shape[0] * self._num_kept(shape) * (BYTES_PER_FLOAT32 + place_bytes)

    def _num_kept(self, shape: tuple[int, ...]) -> int:
        num = math.prod(shape[1:])
        return min(max(1, round(self._fraction * num)), num)


def _type_of(num: int) -> type[np.int16 | np.int32]:
    """The smallest type that holds 0 to num - 1."""
    return np.int16 if num <= 1 << 15 else np.int32
