"""A parameter server that computes nothing: it answers the Features of one worker with Gradients made beforehand.

Each is answered at once, or when a link of a given rate both ways would have carried both messages, one after the other
in each direction. Below a millisecond it sleeps until an answer is due, and meanwhile does not see what arrives.
`python -m benchmarks.micro.answers ADDRESS CODEC BATCH_SIZE PARTS STEPS MEGABITS_PER_SECOND` prints where it listens
and ends with its parent. It assigns one round after the other, of so many steps each.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from benchmarks.micro.server_process import serve_until_closed
from mergesfl.codecs.base import Floats
from mergesfl.errors import TransportError
from mergesfl.protocol.codec import decode, encode, wire_bytes
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import Array, Assign, Features, Gradient, Ready, Register, Update, Welcome, wire_round
from mergesfl.transport import bind

GRADIENT_CODEC = "fp16"
IDLE_SECONDS = 1.0  # of a poll when nothing is due
SHORTEST_POLL_SECONDS = 1e-3  # the transport rounds up to milliseconds
SETTINGS = {"learning_rate": 1e-4}


def codecs_of(feature_codec: str) -> RunCodecs:
    """What both ends use. Raises ConfigError."""
    return RunCodecs(0, feature_codec, GRADIENT_CODEC, "fp32")


class Way:
    """One direction of a link, which carries one message after the other; of 0 Mb/s: which takes no time."""

    def __init__(self, megabits_per_second: float) -> None:
        self._seconds_per_byte = 8e-6 / megabits_per_second if megabits_per_second else 0.0
        self._through_seconds = 0.0  # when the last message was

    def carry(self, begin_seconds: float, num_bytes: int) -> float:
        """When a message is there that is sent at `begin_seconds`."""
        self._through_seconds = max(begin_seconds, self._through_seconds) + num_bytes * self._seconds_per_byte
        return self._through_seconds


class Gradients:
    """Of each part of a step one, whatever is asked."""

    def __init__(self, codecs: RunCodecs) -> None:
        self._codecs = codecs
        self._of_part: dict[int, tuple[Array, Mapping[str, Array]]] = {}

    def answer(self, asked: Features, feature_shape: tuple[int, ...]) -> list[Frame]:
        """The frames of the Gradient."""
        if asked.part not in self._of_part:
            generator = np.random.default_rng(asked.part)
            drawn: Floats = generator.standard_normal((len(asked.labels), *feature_shape), np.float32)  # (d, F...)
            self._of_part[asked.part] = self._codecs.encode_gradient(drawn * np.float32(1e-3), "", 0, 0)
        values, others = self._of_part[asked.part]
        return encode(Gradient(asked.round_num, asked.step, 0.0, values, others, asked.part))


def serve(
    address: str, feature_codec: str, batch_size: int, num_parts: int, num_steps: int, megabits_per_second: float
) -> None:
    """Serves until the worker has gone."""
    endpoint = bind(address)
    print(endpoint.address, flush=True)
    gradients = Gradients(codecs_of(feature_codec))
    up, down = Way(megabits_per_second), Way(megabits_per_second)
    due: deque[tuple[float, bytes, list[Frame]]] = deque()  # when, to whom, what
    feature_shape: tuple[int, ...] = ()
    num_rounds = 0
    while True:
        left_seconds = due[0][0] - time.perf_counter() if due else IDLE_SECONDS
        if left_seconds <= 0:
            _, peer, frames = due.popleft()
            endpoint.send(peer, frames)
            continue
        if left_seconds < SHORTEST_POLL_SECONDS:
            time.sleep(left_seconds)
            continue
        arrived = endpoint.recv(left_seconds - SHORTEST_POLL_SECONDS)
        if arrived is None:
            continue
        peer, frames = arrived
        message = decode(frames)
        if isinstance(message, Features):
            there_seconds = up.carry(time.perf_counter(), wire_bytes(frames))
            answer = gradients.answer(message, feature_shape)
            due.append((down.carry(there_seconds, wire_bytes(answer)), peer, answer))
        elif isinstance(message, Register):
            codecs = (feature_codec, GRADIENT_CODEC, "fp32")
            shape = message.sample_shape
            welcome = Welcome("any", "any", message.class_names, shape, 0, "float32", 1.0, (), (), False, 0, *codecs)
            endpoint.send(peer, encode(welcome))
        elif isinstance(message, Ready | Update):
            if isinstance(message, Ready):
                feature_shape = message.feature_shape
            num_rounds += 1
            round_num = wire_round(num_rounds, 1)
            assign = Assign(
                round_num, num_steps, num_steps, batch_size, "bench", SETTINGS, {}, parts_per_step=num_parts
            )
            try:
                endpoint.send(peer, encode(assign))
            except TransportError:  # that was its last round, and it has gone
                return
        del arrived, frames, message  # over ipc the worker writes its next features to the same memory


def main() -> None:
    """Serves until the parent's end of stdin is closed."""
    address, feature_codec, *counts, rate = sys.argv[1:]
    serve_until_closed(serve, address, feature_codec, *(int(count) for count in counts), float(rate))


if __name__ == "__main__":
    main()
