"""Codecs: what features, gradients and weights become on the wire. One file per codec, one line per codec in CODECS.

The section [codec] of the configuration names one for each role. Why some may not carry weights: a state of which most
is missing is none (topk), and one that is always rounded to nearest in coarse steps does not learn (fp8: a round's
change of a weight is mostly less than half a step, and vanishes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from mergesfl.codecs.base import Codec
from mergesfl.codecs.bf16 import Bf16
from mergesfl.codecs.fp8 import Fp8
from mergesfl.codecs.fp16 import Fp16
from mergesfl.codecs.fp32 import Fp32
from mergesfl.codecs.int8 import Int8
from mergesfl.codecs.topk import TopK
from mergesfl.errors import ConfigError, unknown_name

CODECS: Mapping[str, Callable[[], Codec]] = {
    "fp32": Fp32,
    "fp16": Fp16,
    "bf16": Bf16,
    "int8": Int8,
    "fp8": Fp8,
}
CODECS_OF_A_SHARE: Mapping[str, Callable[[float], Codec]] = {"topk": TopK}  # written with it: topk(0.1)
WEIGHT_CODECS = ("fp32", "fp16", "bf16", "int8")

_NAME = re.compile(r"([a-z0-9]+)(?:\(([0-9.eE+-]+)\))?")


def find_codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError with what is legal, the nearest first."""
    match = _NAME.fullmatch(name)
    base, share = match.groups() if match else (name, None)
    if base in CODECS and share is None:
        return CODECS[base]()
    if base in CODECS_OF_A_SHARE:
        try:
            return CODECS_OF_A_SHARE[base](float(share or ""))
        except ValueError:
            raise ConfigError(f"codec '{name}' needs a share of the numbers to keep: {base}(0.1)") from None
    raise unknown_name("codec", name, [*CODECS, *(f"{other}(0.1)" for other in CODECS_OF_A_SHARE)])


def find_weight_codec(name: str) -> Codec:
    """The same for weights. Raises ConfigError also for a codec that is not for them."""
    codec = find_codec(name)
    if codec.name not in WEIGHT_CODECS:
        raise ConfigError(f"codec '{name}' is not for weights (see mergesfl/codecs): choose {', '.join(WEIGHT_CODECS)}")
    return codec
