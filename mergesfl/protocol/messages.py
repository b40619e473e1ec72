"""Every message of the protocol, as a frozen record: what crosses the wire between a worker and the parameter server.

Arrays are numpy: the wire knows no torch. Only durations cross the network, never timestamps (clocks disagree).
Legend: d samples of one worker's step, C classes, F... shape of one sample at the cut, n bytes of a probe.

The codecs of the run (mergesfl/codecs, mergesfl/protocol/coding.py) say what features, gradients and states look like
on the wire; `parts` is what a codec sends beside them. With "fp32" there are none. They are not to be mistaken for the
parts of a step: a batch may go up in several messages (mergesfl/parts.py), and `part` says which of them one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Setting = int | float | str | bool

PROTOCOL_VERSION = 5
NUMBERS_PER_ROUND = 100  # of a survey, and of up to 99 attempts
SURVEY_ATTEMPT = 0  # the survey comes before the first attempt at its round


def wire_round(round_num: int, attempt: int) -> int:
    """The number that the messages of one attempt (1, 2, ... 99) at a round carry, or of its survey (SURVEY_ATTEMPT).

    A round that is repeated gets a new one: late messages of the void attempt can be told from those of the new one.
    """
    return round_num * NUMBERS_PER_ROUND + attempt


def round_of(wire_round_num: int) -> int:
    """The round that a number of `wire_round` belongs to: what seeds are drawn from, the same in every attempt."""
    return wire_round_num // NUMBERS_PER_ROUND


@dataclass(frozen=True)
class Register:
    """Worker -> PS. The first message of a session: who I am and what I hold."""

    worker_id: str
    protocol_version: int
    device: str  # description for people: "cuda: Orin" or "cpu: aarch64, 6 cores"
    versions: Mapping[str, str]  # {"mergesfl": "0.1.0", "torch": "2.5.0", "python": "3.10.12"}
    num_samples: int
    label_counts: tuple[int, ...]  # (C',) samples of each class that this worker knows, in any order
    class_names: tuple[str, ...]  # (C',) their names: the server matches them with those of the run
    sample_shape: tuple[int, ...]


@dataclass(frozen=True)
class Welcome:
    """PS -> worker. Accepted: build this model, cut it here, and say when it is ready.

    All workers turn stored numbers into input as the run does: (stored / divisor - mean) / std per channel, augmented
    in training (mergesfl/data/scale.py). That is meant for numbers of `stored_type` only.
    """

    model: str
    cut: str
    class_names: tuple[str, ...]  # (C,) in label order
    sample_shape: tuple[int, ...]
    seed: int
    stored_type: str  # "uint8", "int16" or "float32"
    divisor: float
    mean: tuple[float, ...]  # (channels,) or ()
    std: tuple[float, ...]  # as mean
    flip: bool
    crop_padding_pixels: int
    feature_codec: str  # names of mergesfl/codecs
    gradient_codec: str
    weight_codec: str


@dataclass(frozen=True)
class Ready:
    """Worker -> PS. The model is built and one sample has passed through its bottom."""

    feature_shape: tuple[int, ...]  # F... of one sample
    feature_bytes_per_sample: int  # after the codec


@dataclass(frozen=True)
class Refuse:
    """PS -> worker. Not accepted, and trying again will not help: the worker stops with this reason."""

    reason: str


@dataclass(frozen=True)
class Survey:
    """PS -> worker. Measure yourself before the round is planned: compute one step, then send a Probe."""

    round_num: int  # of `wire_round`, here and in all messages of the survey
    num_samples: int  # d: forward and backward over so many, without training anything
    whole_network: bool  # of the whole network (a federated method), else of the bottom alone
    num_probe_samples: int  # what is sent for so many samples in one direction
    probe_bytes: int  # is so much: n
    echo_bytes: int  # and what comes back for them so much: m
    parts_per_step: int = 1  # both in so many parts (mergesfl/parts.py), as the steps of the rounds to come


@dataclass(frozen=True)
class Probe:
    """Worker -> PS. As many bytes as the samples of this part send; what they are does not matter."""

    round_num: int
    payload: Array  # (n,) uint8; the part's share of n
    part: int = 0


@dataclass(frozen=True)
class Echo:
    """PS -> worker. As many bytes as come back for the samples of this part, and how long the PS held the Probe."""

    round_num: int
    held_seconds: float
    payload: Array  # (m,) uint8; the part's share of m
    part: int = 0


@dataclass(frozen=True)
class Report:
    """Worker -> PS. What the survey found: the observations of Eq. 5 and 6."""

    round_num: int
    compute_seconds_per_sample: float
    transfer_seconds_per_sample: float  # (Probe out until Echo in - held) / num_probe_samples


@dataclass(frozen=True)
class Assign:
    """PS -> worker. Work for one round."""

    round_num: int  # of `wire_round`, here and in all messages of the round
    num_steps: int  # tau
    num_exchanges: int  # tau (split) or 0 (federated)
    batch_size: int  # d_i, samples per step
    method: str  # name in the METHODS table: whose `work` function to run
    settings: Mapping[str, Setting]  # learning_rate and the like
    state: Mapping[str, Array]  # parameters and buffers to start from (bottom or full model)
    parts: Mapping[str, Array] = field(default_factory=dict)  # of the tensors that the codec carries
    parts_per_step: int = 1  # P: the d_i samples of a step go up in min(P, d_i) messages (mergesfl/parts.py)


@dataclass(frozen=True)
class Features:
    """Worker -> PS. Activations at the cut and their labels: of one step, or of one part of it (then d its samples)."""

    round_num: int
    step: int
    features: Array  # (d, F...) float32, or the codec's values (d, ...)
    labels: Array  # (d,) int64
    parts: Mapping[str, Array] = field(default_factory=dict)  # what the codec sends beside its values
    part: int = 0  # of the step


@dataclass(frozen=True)
class Gradient:
    """PS -> worker. dL/dfeatures for the same part of the same step, and how long the PS held the request.

    L is the mean loss over the worker's whole batch, of which a part has its rows.
    """

    round_num: int
    step: int
    held_seconds: float
    gradient: Array  # (d, F...) float32, or the codec's values (d, ...); (0,) float32 for none
    parts: Mapping[str, Array] = field(default_factory=dict)
    part: int = 0  # of the step


@dataclass(frozen=True)
class Update:
    """Worker -> PS. The round is done: the trained state and what it cost."""

    round_num: int
    num_samples: int  # samples trained in this round
    compute_seconds: float  # own forward and backward, whole round
    transfer_seconds: float  # sum over steps of (exchange - held)
    state: Mapping[str, Array]
    metrics: Mapping[str, float] = field(default_factory=dict)  # e.g. {"loss": 0.3} of a federated method
    parts: Mapping[str, Array] = field(default_factory=dict)  # of the tensors that the codec carries


@dataclass(frozen=True)
class Release:
    """PS -> worker. This round or survey is over for you (deadline missed, round void or aborted): drop it and wait."""

    round_num: int
    reason: str


@dataclass(frozen=True)
class Ping:
    """Worker -> PS, while it waits: do you still know me?"""


@dataclass(frozen=True)
class Pong:
    """PS -> worker. Answer to Ping; also sent unasked, to find out whether the peer is still reachable."""


@dataclass(frozen=True)
class Reset:
    """PS -> worker. I do not know this session (the PS was restarted, or dropped you): register again."""

    reason: str


@dataclass(frozen=True)
class Leave:
    """Worker -> PS. The worker stops in an orderly way (Ctrl-C, SIGTERM)."""

    reason: str


@dataclass(frozen=True)
class Goodbye:
    """PS -> worker. The run is finished or the PS stops in an orderly way."""

    reason: str


Message = (
    Register
    | Welcome
    | Ready
    | Refuse
    | Survey
    | Probe
    | Echo
    | Report
    | Assign
    | Features
    | Gradient
    | Update
    | Release
    | Ping
    | Pong
    | Reset
    | Leave
    | Goodbye
)
