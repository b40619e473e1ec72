"""What a codec is: float32 tensor <-> a few named arrays, which cross the wire in its place. Pure, numpy only.

Every codec takes batches x (d, F...): d samples of shape F... A tensor of weights W (O, ...) is one sample (1, O, ...).
The *channels* of a codec with a scale are the first dimension of F..., so that each has one scale for all d samples of
the message. Where F... is one dimension (a flat cut) there is one scale for the whole message: one per number would
cost more than the numbers. [ours]

Rules, all [ours]:
1. What is not finite stays not finite in its sample or its channel: the server's checks must see it. What is finite
   stays finite.
2. Chance comes from the generator that is given, and from nowhere else.
3. `decode` trusts nothing: names, types, shapes and values of what arrived are checked against the shape that is
   expected, and IllegalCode says what is wrong.
4. It writes into memory that is there, the rows of a merged batch for example (ps/buffer.py), in whatever order these
   lie, and makes no other array of float32 of that size.
5. The bytes of a message are known before it is made: `num_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Parts = Mapping[str, Array]  # what crosses the wire; VALUES is among them, (d, ...) of any type

VALUES = "values"
BYTES_PER_FLOAT32 = 4
# Of a code with a scale: no scale and no product of one may leave the normal numbers of float32. [ours]
LARGEST = 2.0**126  # what is beyond becomes this
SMALLEST_RANGE = 2.0**-118  # a channel below this becomes 0


class IllegalCode(ValueError):
    """Parts that the codec does not make. The caller says whose they are."""


class Codec(Protocol):
    """One codec. Its error bound stands on top of its file."""

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    def encode(self, x: Floats, generator: np.random.Generator) -> dict[str, Array]:
        """x (d, F...) -> the parts that stand for it."""
        ...

    def decode(self, parts: Parts, out: Floats) -> None:
        """The parts of an x of the shape of out (d, F...) -> what is left of it, in out, whatever its strides.

        Raises IllegalCode; what is in out is of no use then.
        """
        ...

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of an x of this shape (d, F...)."""
        ...


def sample_bytes(codec: Codec, feature_shape: tuple[int, ...]) -> int:
    """Bytes that one more sample (F...) adds to a message: c of Eq. 10.

    Scales come once per message, whatever d; like the header they are not counted. [ours]
    """
    return codec.num_bytes((2, *feature_shape)) - codec.num_bytes((1, *feature_shape))


def require_names(parts: Parts, *names: str) -> None:
    """Raises IllegalCode unless these and no other parts are there."""
    if parts.keys() != set(names):
        raise IllegalCode(f"parts {sorted(parts)}, expected {sorted(names)}")


def require(parts: Parts, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """The part, if it has this type and shape; else raises IllegalCode."""
    part, expected = parts[name], np.dtype(dtype)
    if part.dtype != expected or part.shape != shape:
        what = "" if name == VALUES else f"{name} "
        raise IllegalCode(f"{what}{part.dtype}{part.shape}, expected {expected}{shape}")
    return part


def require_scale(parts: Parts, shape: tuple[int, ...]) -> Floats:
    """The part "scale" (1, channels, 1...), see `channel_shape`; +inf marks a channel that holds what is not finite."""
    scale: Floats = require(parts, "scale", np.float32, (num_channels(shape),))
    if not (scale >= 0).all():  # neither is NaN
        raise IllegalCode(f"scale with {scale[~(scale >= 0)][0]}, expected numbers that are not negative")
    return scale.reshape(channel_shape(shape))


def num_channels(shape: tuple[int, ...]) -> int:
    """Of an x of this shape (d, F...): the first dimension of F..., or 1 where F... has less than two."""
    return shape[1] if len(shape) > 2 else 1


def channel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What one number per channel is reshaped to, to be spread over an x of this shape: (1, channels, 1...)."""
    return (1, num_channels(shape), *(1,) * (len(shape) - 2))[: len(shape)]


def per_channel(reduce: Callable[..., Floats], x: Floats) -> Floats:
    """np.min or np.max of every channel, (channels,), or () where there is one; 0 is among them.

    First over the samples: number by number, for which there are vector instructions, in whatever order x lies.
    """
    over_samples = reduce(x, axis=0, initial=0.0)  # (F...)
    axes = tuple(range(1, over_samples.ndim)) if over_samples.ndim > 1 else None
    return reduce(over_samples, axis=axes, initial=0.0)


def size_of(shape: tuple[int, ...]) -> int:
    """Numbers in an x of this shape."""
    return math.prod(shape)
