"""Small floating-point formats: the bits of a float32 rounded to fewer, to nearest, ties to even.

With integers throughout, as numpy has vector instructions for them and none for its own float16. In place where it can
be: what these steps cost is passes over memory. All [ours].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergesfl.codecs.base import Floats

_MANTISSA_BITS, _BIAS = 23, 127  # of float32
_MAGNITUDE = 0x7FFF_FFFF


def rounded_bits(x: Floats, exponent_bits: int, mantissa_bits: int, largest: float) -> NDArray[np.int32]:
    """Sign, exponent and mantissa of every number, in the low bits; the memory order is that of x.

    Numbers beyond +-largest, which the format has, become that, and so do infinities and NaN.
    """
    bits = x.view(np.int32)
    magnitude = bits & _MAGNITUDE  # magnitudes are ordered as the integers that their bits are
    np.minimum(magnitude, _bits_of(largest), out=magnitude)
    dropped_bits = _MANTISSA_BITS - mantissa_bits
    excess = _BIAS + 1 - (1 << exponent_bits - 1)  # of float32's bias over that of the format
    small = _small_codes(magnitude, excess, mantissa_bits) if excess else None
    odd = magnitude >> dropped_bits
    odd &= 1
    magnitude += odd
    magnitude += (1 << dropped_bits - 1) - 1 - (excess << _MANTISSA_BITS)  # a carry moves on into the exponent
    magnitude >>= dropped_bits
    if small is not None:
        np.maximum(magnitude, small, out=magnitude)  # below the format's normal numbers `small` is the larger one
    sign = np.right_shift(bits, 31, out=odd)  # -1 or 0
    sign &= 1 << exponent_bits + mantissa_bits
    magnitude |= sign
    return magnitude


def _small_codes(magnitude: NDArray[np.int32], excess: int, mantissa_bits: int) -> NDArray[np.int32]:
    """The codes of what is below the format's smallest normal number, which all others are taken for.

    They are multiples of one step. Added to a number of which the step is the last bit, the processor rounds to it.
    """
    smallest_normal = 2.0 ** (excess + 1 - _BIAS)
    anchor = smallest_normal * 2.0 ** (_MANTISSA_BITS - mantissa_bits)
    small = np.minimum(magnitude, _bits_of(smallest_normal))
    numbers = small.view(np.float32)
    numbers += np.float32(anchor)
    small -= _bits_of(anchor)
    return small


def _bits_of(number: float) -> int:
    return int(np.float32(number).view(np.int32))
