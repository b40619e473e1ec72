"""The codecs of one run, put on its messages: right before they are sent, right after they have arrived.

    Features    x (d, F...)   -> features = the codec's values, parts = its other arrays
    Gradient    x (d, F...)   -> gradient = the codec's values, parts = its other arrays; an empty one as it is
    Assign,     each float32 tensor of two or more dimensions W (O, ...) -> no longer in the state, but in parts, as
    Update      "NAME:PART"; all else as it is: biases, batch-norm's means and variances and integers are few bytes, and
                a small variance that became 0 would be divided by

What arrives must be exactly what the run's codec makes of the shape that is expected; else RemoteProtocolError, which
closes that peer only. Chance is drawn per (seed, kind of message, worker, round, step, part), so that a run is the same
over every transport, and a repeated one, too. All [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from mergesfl.codecs import find_codec, find_weight_codec
from mergesfl.codecs.base import VALUES, Codec, Floats, IllegalCode, sample_bytes
from mergesfl.codecs.fp32 import Fp32
from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.messages import Array, Assign, Features, Gradient, Update, Welcome, round_of
from mergesfl.seeding import generator_for

State = Mapping[str, Array]


class RunCodecs:
    """What both ends of a run need to read each other.

    Args:
        seed: of the run.
        features, gradients, weights: names of codecs; a worker reads them in its Welcome.

    Raises ConfigError for a name that this end does not know.
    """

    def __init__(self, seed: int, features: str, gradients: str, weights: str) -> None:
        self._seed = seed
        self._features, self._gradients = find_codec(features), find_codec(gradients)
        self._weights = find_weight_codec(weights)

    @staticmethod
    def of(welcome: Welcome) -> RunCodecs:
        """Those that the server names. Raises ConfigError."""
        return RunCodecs(welcome.seed, welcome.feature_codec, welcome.gradient_codec, welcome.weight_codec)

    @property
    def changes_features(self) -> bool:
        """Whether there is anything to do to them before they are sent."""
        return not isinstance(self._features, Fp32)

    def feature_bytes(self, feature_shape: tuple[int, ...]) -> int:
        """What one sample (F...) is on its way up: c of Eq. 10."""
        return sample_bytes(self._features, feature_shape)

    def gradient_bytes(self, feature_shape: tuple[int, ...]) -> int:
        """What one sample (F...) is on its way down."""
        return sample_bytes(self._gradients, feature_shape)

    def state_bytes(self, state: State) -> int:
        """What a state is, either way."""
        return sum(
            self._weights.num_bytes((1, *array.shape)) if self._carries(array) else array.nbytes
            for array in state.values()
        )

    def encode_features(self, message: Features, worker_id: str) -> Features:
        """The message as it is sent; its features are float32 (d, F...)."""
        if not self.changes_features:  # and no generator to make for it
            return message
        generator = self._generator("features", worker_id, message.round_num, message.step, message.part)
        values, parts = _encoded(self._features, message.features, generator)
        return replace(message, features=values, parts=parts)

    def decode_features(self, message: Features, out: Floats) -> None:
        """Writes its float32 features (d, F...), of the shape of `out`, to it. Raises RemoteProtocolError."""
        _decode("features", self._features, message.features, message.parts, out)

    def encode_gradient(
        self, gradient: Array, worker_id: str, round_num: int, step: int, part: int = 0
    ) -> tuple[Array, State]:
        """(gradient, parts) of a Gradient in this wire round, of a float32 gradient (d, F...), or (0,)."""
        if not gradient.size or isinstance(self._gradients, Fp32):
            return gradient, {}
        return _encoded(self._gradients, gradient, self._generator("gradient", worker_id, round_num, step, part))

    def decode_gradient(self, message: Gradient, shape: tuple[int, ...]) -> Array:
        """The float32 gradient of this shape (d, F...), or an empty one: without a codec the very array that was sent.

        Raises RemoteProtocolError.
        """
        if message.gradient.shape == (0,) and message.gradient.dtype == np.float32 and not message.parts:
            return message.gradient
        if _is_plain(self._gradients, message.gradient, message.parts, shape):
            return message.gradient
        return _decoded("a gradient", self._gradients, message.gradient, message.parts, shape)

    def encode_assigned(self, state: State, worker_id: str, round_num: int) -> tuple[State, State]:
        """(state, parts) of an Assign in this wire round. Several workers with the same state may be sent the same."""
        return self._encode_state(state, self._generator("assign", worker_id, round_num, 0))

    def decode_assign(self, message: Assign) -> State:
        """The whole state. Raises RemoteProtocolError."""
        return self._decode_state(message.state, message.parts)

    def encode_update(self, message: Update, worker_id: str) -> Update:
        """The message as it is sent."""
        generator = self._generator("update", worker_id, message.round_num, 0)
        state, parts = self._encode_state(message.state, generator)
        return replace(message, state=state, parts=parts)

    def decode_update(self, message: Update) -> Update:
        """The message with its whole state. Raises RemoteProtocolError."""
        return replace(message, state=self._decode_state(message.state, message.parts), parts={})

    def _generator(
        self, kind: str, worker_id: str, wire_round_num: int, step: int, part: int = 0
    ) -> np.random.Generator:
        """The first part has the stream of an unsplit step."""
        purpose = ("codec", kind, worker_id, round_of(wire_round_num), step)
        return generator_for(self._seed, *purpose, part) if part else generator_for(self._seed, *purpose)

    def _carries(self, array: Array) -> bool:
        """Whether this tensor of a state goes through the codec."""
        return not isinstance(self._weights, Fp32) and array.dtype == np.float32 and array.ndim >= 2

    def _encode_state(self, state: State, generator: np.random.Generator) -> tuple[State, State]:
        plain: dict[str, Array] = {}
        parts: dict[str, Array] = {}
        for name, array in state.items():
            if self._carries(array):
                encoded = self._weights.encode(cast(Floats, array[np.newaxis]), generator)
                parts |= {f"{name}:{part}": values for part, values in encoded.items()}
            else:
                plain[name] = array
        return plain, parts

    def _decode_state(self, state: State, parts: State) -> State:
        """All codecs of weights send as values an array of the tensor's own shape, as one sample."""
        grouped: dict[str, dict[str, Array]] = {}
        for key, array in parts.items():
            name, _, part = key.rpartition(":")
            grouped.setdefault(name, {})[part] = array
        whole = dict(state)
        for name, group in grouped.items():
            values = group.pop(VALUES, None)
            if values is None or values.ndim < 3 or name in state or isinstance(self._weights, Fp32):
                raise _strange(f"a state with parts of '{name}'", self._weights, f"parts {sorted(group)}")
            if len(values) != 1:  # an empty array may claim any shape, and memory is taken before its parts are read
                found = f"{values.dtype}{values.shape}, expected {values.dtype}{(1, *values.shape[1:])}"
                raise _strange(f"'{name}'", self._weights, found)
            whole[name] = _decoded(f"'{name}'", self._weights, values, group, values.shape)[0]
        for name, array in state.items():
            if self._carries(array):
                raise _strange(f"'{name}'", self._weights, f"{array.dtype}{array.shape} as it is")
        return whole


PLAIN = RunCodecs(0, "fp32", "fp32", "fp32")  # sends everything as it is


def _is_plain(codec: Codec, values: Array, others: State, shape: tuple[int, ...]) -> bool:
    """Whether this is what it stands for: of most runs every message."""
    return isinstance(codec, Fp32) and not others and values.dtype == np.float32 and values.shape == shape


def _encoded(codec: Codec, x: Array, generator: np.random.Generator) -> tuple[Array, dict[str, Array]]:
    """(values, other parts)."""
    if not isinstance(codec, Fp32):
        x = x.astype(np.float32, copy=False)
    parts = codec.encode(cast(Floats, x), generator)
    return parts.pop(VALUES), parts


def _decoded(what: str, codec: Codec, values: Array, others: State, shape: tuple[int, ...]) -> Floats:
    """As a new array, which lies as the values do."""
    out = np.empty_like(values, np.float32) if values.shape == shape else np.empty(shape, np.float32)
    _decode(what, codec, values, others, out)
    return out


def _decode(what: str, codec: Codec, values: Array, others: State, out: Floats) -> None:
    if VALUES in others:
        raise _strange(what, codec, f"'{VALUES}' twice")
    try:
        codec.decode({VALUES: values, **others}, out)
    except IllegalCode as error:
        raise RemoteProtocolError(f"sent {what} {error}{_advice(codec)}") from None


def _strange(what: str, codec: Codec, found: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"sent {what}: {found}{_advice(codec)}")


def _advice(codec: Codec) -> str:
    return f" (codec {codec.name}); install the same mergesfl on both ends"
