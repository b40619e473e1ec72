"""bf16: the upper half of a float32, rounded to nearest, ties to even; all of float32's range, 8 bits of precision.

Error: |decoded - x| <= 2**-8 |x| for |x| >= 2**-126 (the smallest normal number), and <= 2**-134 below.
A finite number beyond the largest bfloat16 (3.39e38) becomes that one. NaN and infinities stay not finite. [ours]

numpy has no such type: the bits travel as int16.
"""

from __future__ import annotations

import numpy as np

from mergesfl.codecs.base import VALUES, Array, Floats, Parts, require, require_names, size_of

_INFINITY = 0x7F80_0000  # bits of float32; above are the NaN
_LARGEST = 0x7F7F_0000  # of the largest finite bfloat16
_QUIET = 0x0040_0000  # makes a NaN whose upper half is kept a NaN still


class Bf16:
    """Half the bytes, float32's range."""

    name = "bf16"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES int16 (d, F...): the bits."""
        bits = np.ascontiguousarray(x).view(np.uint32)
        magnitude, sign = bits & np.uint32(0x7FFF_FFFF), bits & np.uint32(0x8000_0000)
        odd = (magnitude >> np.uint32(16)) & np.uint32(1)
        rounded = np.minimum(magnitude + np.uint32(0x7FFF) + odd, np.uint32(_LARGEST))  # halves: up if above, or odd
        kept = np.where(magnitude > _INFINITY, magnitude | np.uint32(_QUIET), magnitude)  # of what is not finite
        upper = (np.where(magnitude >= _INFINITY, kept, rounded) | sign) >> np.uint32(16)
        return {VALUES: upper.astype(np.uint16).view(np.int16).reshape(x.shape)}

    def decode(self, parts: Parts, out: Floats) -> None:
        """Exactly the bfloat16. Raises IllegalCode."""
        require_names(parts, VALUES)
        bits = out.view(np.uint32)
        np.copyto(bits, require(parts, VALUES, np.int16, out.shape).view(np.uint16))
        np.left_shift(bits, np.uint32(16), out=bits)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """2 per number."""
        return 2 * size_of(shape)
