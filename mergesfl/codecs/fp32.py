"""fp32: nothing changes. Error: none."""

from __future__ import annotations

import numpy as np

from mergesfl.codecs.base import BYTES_PER_FLOAT32, VALUES, Array, Floats, Parts, require, require_names, size_of


class Fp32:
    """The default: what is computed is what crosses the wire."""

    name = "fp32"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """x itself."""
        return {VALUES: x}

    def decode(self, parts: Parts, out: Floats) -> None:
        """What was sent. Raises IllegalCode."""
        require_names(parts, VALUES)
        np.copyto(out, require(parts, VALUES, np.float32, out.shape))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """4 per number."""
        return BYTES_PER_FLOAT32 * size_of(shape)
