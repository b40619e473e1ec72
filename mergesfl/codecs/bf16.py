"""bf16: the upper half of a float32, rounded to nearest, ties to even; all of float32's range, 8 bits of precision.

Error: |decoded - x| <= 2**-8 |x| for |x| >= 2**-126 (the smallest normal number), and <= 2**-134 below.
A finite number beyond the largest bfloat16 (3.39e38) becomes that one. NaN and infinities stay not finite. [ours]

numpy has no such type: the bits travel as int16.
"""

from __future__ import annotations

import numpy as np

from mergesfl.codecs.base import VALUES, Array, Floats, Parts, require, require_names, size_of
from mergesfl.codecs.small_floats import rounded_bits

EXPONENT_BITS, MANTISSA_BITS = 8, 7
LARGEST = (2.0 - 2.0**-MANTISSA_BITS) * 2.0**127
_MAGNITUDE, _INFINITY = 0x7FFF_FFFF, 0x7F80_0000  # bits of float32; magnitudes above the latter are the NaN
_QUIET = 0x0040_0000  # makes a NaN whose upper half is kept a NaN still


class Bf16:
    """Half the bytes, float32's range."""

    name = "bf16"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES int16 (d, F...): the bits."""
        x = np.ascontiguousarray(x).reshape(x.shape)  # numpy makes (1,) of ()
        upper = rounded_bits(x, EXPONENT_BITS, MANTISSA_BITS, LARGEST).astype(np.int16)
        is_finite = np.isfinite(x)
        if not is_finite.all():
            bits = x.view(np.int32)[~is_finite]
            upper[~is_finite] = np.where(bits & _MAGNITUDE > _INFINITY, bits | _QUIET, bits) >> 16
        return {VALUES: upper}

    def decode(self, parts: Parts, out: Floats) -> None:
        """Exactly the bfloat16. Raises IllegalCode."""
        require_names(parts, VALUES)
        bits = out.view(np.uint32)
        np.copyto(bits, require(parts, VALUES, np.int16, out.shape).view(np.uint16))
        np.left_shift(bits, np.uint32(16), out=bits)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """2 per number."""
        return 2 * size_of(shape)
