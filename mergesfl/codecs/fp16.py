"""fp16: IEEE 754 binary16, rounded to nearest, ties to even.

Error: |decoded - x| <= 2**-11 |x| for 2**-14 <= |x| <= 65504, and <= 2**-25 below. A finite number beyond 65504 becomes
the largest that there is, +-65504: infinity would void the round for it. NaN and infinities stay what they are. [ours]
"""

from __future__ import annotations

import numpy as np

from mergesfl.codecs.base import VALUES, Array, Floats, Parts, require, require_names, size_of

LARGEST = np.float16(65504.0)


class Fp16:
    """Half the bytes."""

    name = "fp16"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES float16 (d, F...)."""
        with np.errstate(over="ignore", under="ignore"):
            half = x.astype(np.float16)
        is_over = np.isinf(half)
        if is_over.any():
            is_over &= np.isfinite(x)
            half[is_over] = np.copysign(LARGEST, half[is_over])
        return {VALUES: half}

    def decode(self, parts: Parts, out: Floats) -> None:
        """Exactly the halves. Raises IllegalCode."""
        require_names(parts, VALUES)
        np.copyto(out, require(parts, VALUES, np.float16, out.shape))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """2 per number."""
        return 2 * size_of(shape)
