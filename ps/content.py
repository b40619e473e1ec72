"""What a worker has sent, decoded and found to be content that the round can use.

Legend: d_i samples of worker i in one step, or in one part of it, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mergesfl.codecs.base import Floats
from mergesfl.errors import MergeSFLError, RemoteProtocolError
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import Features, Update


class NotFiniteError(MergeSFLError):
    """A worker's own arithmetic broke down: no use in this round, and no reason to close it."""


def read_features(name: str, message: Features, out: Floats, num_classes: int, codecs: RunCodecs) -> float:
    """Decodes the features, and looks at the labels; max |z|.

    Args:
        name: of the worker.
        message: as it was received.
        out: where its features go, of the shape (d_i, F...) that they must have; of no use after an error.
        num_classes: C; labels are 0 to C - 1.
        codecs: of the run.

    Raises RemoteProtocolError for content that no honest worker sends, NotFiniteError for what is of no use.
    """
    try:
        codecs.decode_features(message, out)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"worker '{name}' {error}") from None
    labels = message.labels
    if labels.shape != out.shape[:1] or labels.dtype != np.int64:
        raise RemoteProtocolError(
            f"worker '{name}' sent labels {labels.dtype}{labels.shape}, expected int64{out.shape[:1]}"
        )
    if len(labels) and not int(labels.view(np.uint64).max()) < num_classes:  # what is negative is huge
        raise RemoteProtocolError(
            f"worker '{name}' sent labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    magnitude = float(max(out.max(), -out.min())) if out.size else 0.0  # NaN: both are NaN
    if not math.isfinite(magnitude):
        raise NotFiniteError(f"worker '{name}' sent features that are not finite")
    return magnitude


def read_update(
    name: str,
    message: Update,
    num_samples: int,
    assigned: Mapping[str, np.ndarray],
    may_omit: bool,
    codecs: RunCodecs,
) -> Update:
    """The trained state, decoded: with names, shapes and dtypes of the one that was assigned, and finite numbers.

    Args:
        name: of the worker.
        message: as it was received.
        num_samples: how many it must have trained.
        assigned: the state that it was given.
        may_omit: whether the method allows that tensors are missing.
        codecs: of the run.

    Raises as `read_features`.
    """
    try:
        message = codecs.decode_update(message)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"worker '{name}' {error}") from None
    if message.num_samples != num_samples:
        raise RemoteProtocolError(f"worker '{name}' trained {message.num_samples} samples, not {num_samples}")
    state = message.state
    if not (state.keys() == assigned.keys() or (may_omit and state.keys() < assigned.keys())):
        odd = sorted(state.keys() ^ assigned.keys())[:3]
        raise RemoteProtocolError(f"worker '{name}' sent a state of other tensors than it was given: {odd} ...")
    for key, array in state.items():
        if array.shape != assigned[key].shape or array.dtype != assigned[key].dtype:
            raise RemoteProtocolError(
                f"worker '{name}' sent '{key}' as {array.dtype}{array.shape}, "
                f"expected {assigned[key].dtype}{assigned[key].shape}"
            )
    for key, array in state.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFiniteError(f"worker '{name}' sent a state whose '{key}' is not finite")
    return message
