"""int8: 256 steps from the smallest to the largest number of each channel, 0 being one of them; rounded by chance.

    lo = min(0, smallest), hi = max(0, largest) of a channel;  scale = (hi - lo) / 255;  zero = round(-lo / scale)
    code = zero + floor(x / scale + u), u ~ U[0, 1);   decoded = (code - zero) * scale

Error: |decoded - x| <= 1.001 scale, and 0 is exact. Rounding by chance is right in the mean, E[decoded] = x, but where
a channel has both signs and x is within one step of its end. (0.001 is for float32's own rounding.)

Affine, not symmetric, as features after a ReLU have one sign: a symmetric code would never use half of its steps.
By chance, not to nearest, although that errs half as much: a gradient, or a round's change of a weight, that is smaller
than half a step would vanish every time; so it is kept in the mean. Features gain nothing from it and lose little
(1/255 of a channel's range). All [ours]; rounding by chance as in QSGD (Alistarh et al., NIPS 2017).

A channel whose range is below 2**-118 becomes 0; numbers beyond +-2**126 (8.5e37) become that: both so that no scale or
product leaves the normal numbers of float32. A channel with something that is not finite is marked by scale = +inf and
comes out as NaN.
"""

from __future__ import annotations

import numpy as np

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

NUM_STEPS = 255
_BYTES_PER_CHANNEL = 4 + 1  # scale and zero


class Int8:
    """A quarter of the bytes."""

    name = "int8"

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """VALUES uint8 (d, F...), "scale" float32 (channels,), "zero" uint8 (channels,)."""
        spread = channel_shape(x.shape)
        lo = per_channel(np.min, x).astype(np.float64)  # (channels,) or (); NaN where there is one
        hi = per_channel(np.max, x).astype(np.float64)
        is_finite = np.isfinite(lo) & np.isfinite(hi)
        lo, hi = np.where(is_finite, np.maximum(lo, -LARGEST), 0.0), np.where(is_finite, np.minimum(hi, LARGEST), 0.0)
        is_zero = hi - lo < SMALLEST_RANGE
        scale = np.where(is_zero, 1.0, (hi - lo) / NUM_STEPS).astype(np.float32)
        zero = np.rint(-lo / scale)
        with np.errstate(invalid="ignore", over="ignore"):
            steps = x / scale.reshape(spread)  # (d, F...)
            below = np.floor(steps)
            steps -= below  # (d, F...) how far above
            is_up = np.empty_like(x, bool)  # in the memory order of x, which the drawn numbers need not have
            below += np.less(generator.random(x.shape, dtype=np.float32), steps, out=is_up)
            if zero.any():  # never after a ReLU
                below += zero.astype(np.float32).reshape(spread)
            np.clip(below, 0, NUM_STEPS, out=below)
        if not is_finite.all():
            np.nan_to_num(below, copy=False)
        codes = below.astype(np.uint8)
        scale = np.where(is_zero, np.float32(0), scale)
        scale = np.where(is_finite, scale, np.float32(np.inf))
        return {VALUES: codes, "scale": scale.reshape(-1), "zero": zero.astype(np.uint8).reshape(-1)}

    def decode(self, parts: Parts, out: Floats) -> None:
        """(code - zero) * scale. Raises IllegalCode."""
        require_names(parts, VALUES, "scale", "zero")
        shape = out.shape
        codes = require(parts, VALUES, np.uint8, shape)
        scale = require_scale(parts, shape)
        zero = require(parts, "zero", np.uint8, (num_channels(shape),)).reshape(channel_shape(shape))
        np.copyto(out, codes)
        out -= zero.astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            out *= np.where(np.isfinite(scale), scale, np.float32(np.nan))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """1 per number, 5 per channel."""
        return size_of(shape) + _BYTES_PER_CHANNEL * num_channels(shape)
