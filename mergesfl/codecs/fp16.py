"""fp16: IEEE 754 binary16, rounded to nearest, ties to even.

Error: |decoded - x| <= 2**-11 |x| for 2**-14 <= |x| <= 65504, and <= 2**-25 below. A finite number beyond 65504 becomes
the largest that there is, +-65504: infinity would void the round for it. NaN and infinities stay what they are. [ours]
"""

from __future__ import annotations

import numpy as np

from mergesfl.codecs.base import VALUES, Array, Floats, Parts, require, require_names, size_of
from mergesfl.codecs.small_floats import rounded_bits

EXPONENT_BITS, MANTISSA_BITS = 5, 10
LARGEST = 65504.0


class Fp16:
    """Half the bytes."""

    name = "fp16"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES float16 (d, F...)."""
        half = rounded_bits(x, EXPONENT_BITS, MANTISSA_BITS, LARGEST).astype(np.uint16).view(np.float16)
        is_finite = np.isfinite(x)
        if not is_finite.all():
            half[~is_finite] = x[~is_finite]
        return {VALUES: half}

    def decode(self, parts: Parts, out: Floats) -> None:
        """Exactly the halves. Raises IllegalCode."""
        require_names(parts, VALUES)
        np.copyto(out, require(parts, VALUES, np.float16, out.shape))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """2 per number."""
        return 2 * size_of(shape)
