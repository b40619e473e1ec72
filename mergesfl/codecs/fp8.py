"""fp8: float8 e4m3 (4 bits of exponent, 3 of mantissa, no infinity), each channel scaled so that its largest is 448.

    scale = max |x| of the channel / 448
    code = e4m3(x / scale), to nearest, ties to even;   decoded = e4m3(code) * scale

Error: |decoded - x| <= 2**-4 |x| for |x| >= 2**-6 scale, and <= 2**-10 scale below, both times 1.001 for float32's own
rounding. So numbers that are up to 448 * 64 = 28,672 times smaller than their channel's largest keep 3 bits; int8 errs
less near the largest.

Format: "FP8 Formats for Deep Learning" (Micikevicius et al., arXiv 2209.05433), torch's float8_e4m3fn. Scale [ours].
A channel whose largest is below 2**-118 becomes 0; numbers beyond +-2**126 become that. A channel with something that
is not finite is marked by scale = +inf and comes out as NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergesfl.codecs.base import (
    LARGEST,
    SMALLEST_RANGE,
    VALUES,
    Array,
    Floats,
    Parts,
    channel_shape,
    num_channels,
    per_channel,
    require,
    require_names,
    require_scale,
    size_of,
)
from mergesfl.codecs.small_floats import rounded_bits

EXPONENT_BITS, MANTISSA_BITS = 4, 3
LARGEST_E4M3 = 448.0
NAN = 0x7F  # the one magnitude that is no number
CODES_AT_A_TIME = 1 << 14  # that are looked up [ours]


def to_e4m3(x: Floats) -> NDArray[np.uint8]:
    """The codes of numbers; beyond +-448 that of +-448. NaN has a code, too."""
    codes = rounded_bits(x, EXPONENT_BITS, MANTISSA_BITS, LARGEST_E4M3).astype(np.uint8)
    is_nan = np.isnan(x)
    if is_nan.any():
        codes[is_nan] |= NAN
    return codes


def _all_numbers() -> Floats:
    """(256,) the number of every code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[code & 0x7F == NAN] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


NUMBERS = _all_numbers()


def _look_up(codes: NDArray[np.uint8], out: Floats) -> None:
    """The number of every code, to an array of the same shape.

    A few at a time, as numpy makes an index of 8 bytes of every code; and in the order in which `out` lies.
    """
    order = sorted(range(out.ndim), key=out.strides.__getitem__, reverse=True)
    codes, out = codes.transpose(order), out.transpose(order)
    num = max(1, CODES_AT_A_TIME * len(out) // max(out.size, 1))
    for begin in range(0, len(out), num):
        rows = slice(begin, begin + num)
        np.take(NUMBERS, codes[rows], out=out[rows], mode="clip")  # all are legal; "raise" would make a copy of out


class Fp8:
    """A quarter of the bytes, more range and less precision than int8."""

    name = "fp8"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES uint8 (d, F...), "scale" float32 (channels,)."""
        spread = channel_shape(x.shape)
        largest = per_channel(np.max, np.abs(x)).astype(np.float64)  # (channels,) or (); NaN if there is one
        is_finite, is_zero = np.isfinite(largest), largest < SMALLEST_RANGE
        largest = np.where(is_finite & ~is_zero, np.minimum(largest, LARGEST), 1.0)
        scale = (largest / LARGEST_E4M3).astype(np.float32)
        keeps = (is_finite & ~is_zero).reshape(spread)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled: Floats = np.divide(x, scale.reshape(spread), order="C")
        if not keeps.all():
            scaled = np.where(keeps, scaled, np.float32(0))
        scale = np.where(is_zero, np.float32(0), scale)
        scale = np.where(is_finite, scale, np.float32(np.inf))
        return {VALUES: to_e4m3(scaled), "scale": scale.reshape(-1)}

    def decode(self, parts: Parts, out: Floats) -> None:
        """e4m3(code) * scale. Raises IllegalCode."""
        require_names(parts, VALUES, "scale")
        codes = require(parts, VALUES, np.uint8, out.shape)
        scale = require_scale(parts, out.shape)
        _look_up(codes, out)
        with np.errstate(invalid="ignore", over="ignore"):
            out *= np.where(np.isfinite(scale), scale, np.float32(np.nan))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """1 per number, 4 per channel."""
        return size_of(shape) + 4 * num_channels(shape)
