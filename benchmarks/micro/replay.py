"""Many live workers in one process that compute nothing: each speaks the whole protocol and replays recorded features.

`python -m benchmarks.micro.replay ADDRESS RECORDING.npz NUM_WORKERS` registers them all and ends when the server has
said goodbye to the last. Every worker has a connection and a session of its own; one loop serves them all, so the load
on the server is that of as many devices that answer at once.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from mergesfl.processes import worker_name
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Assign,
    Features,
    Goodbye,
    Gradient,
    Message,
    Pong,
    Ready,
    Register,
    Update,
    Welcome,
)
from mergesfl.protocol.session import Arrival, Role, Session

FILES_PER_WORKER = 2  # its connection, and what libzmq wakes its socket with


class Replayer:
    """One worker.

    Args:
        socket: its own DEALER, connected.
        worker_id: who it is.
        features: (d, F...) float32, what it sends in every step.
        labels: (d,) int64, beside them; they are also all the samples that it says to hold.
        sample_shape: what it says that one of them looks like.
        class_names: (C,) of the run.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        worker_id: str,
        features: NDArray[Any],
        labels: NDArray[Any],
        sample_shape: tuple[int, ...],
        class_names: tuple[str, ...],
    ) -> None:
        self._socket = socket
        self._session = Session(Role.WORKER)
        self._features = features
        self._labels = labels
        self._assign: Assign | None = None
        counts = tuple(np.bincount(labels, minlength=len(class_names)).tolist())
        versions = {"mergesfl": "replay"}
        self._send(
            Register(worker_id, PROTOCOL_VERSION, "replay", versions, len(labels), counts, class_names, sample_shape)
        )

    def answer(self) -> bool:
        """Takes one message and answers it at once; False when the run is over."""
        message = decode([frame.buffer for frame in self._socket.recv_multipart(copy=False)])
        if self._session.receive(message) is Arrival.STALE or isinstance(message, Pong):
            return True
        if isinstance(message, Welcome):
            self._send(Ready(self._features.shape[1:], self._features[0].nbytes))
        elif isinstance(message, Assign | Gradient):
            self._assign = message if isinstance(message, Assign) else self._assign
            assert self._assign is not None, "the session lets no Gradient come first"
            self._send(self._next(self._assign))
        else:
            if not isinstance(message, Goodbye):
                print(f"a replayed worker stops: {message}", file=sys.stderr)
            return False
        return True

    def _next(self, assign: Assign) -> Features | Update:
        if self._session.step < assign.num_exchanges:
            return Features(assign.round_num, self._session.step, self._features, self._labels)
        return Update(assign.round_num, assign.batch_size * assign.num_steps, 1e-3, 1e-3, assign.state)

    def _send(self, message: Message) -> None:
        self._session.send(message)
        self._socket.send_multipart(encode(message), copy=False)


def replay(address: str, recording: Path, num_workers: int) -> None:
    """Runs all workers until each has been told that the run is over."""
    with np.load(recording) as saved:
        features, labels = saved["features"], saved["labels"]  # (d, F...), (d,)
        sample_shape, class_names = tuple(saved["sample_shape"].tolist()), tuple(saved["class_names"].tolist())
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most_files, FILES_PER_WORKER * num_workers + 256), most_files))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller, workers = zmq.Poller(), {}
    for index in range(num_workers):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        workers[socket] = Replayer(socket, worker_name(index), features, labels, sample_shape, class_names)
        poller.register(socket, zmq.POLLIN)
    while workers:
        for socket, _ in poller.poll():
            if not workers[socket].answer():
                poller.unregister(socket)
                del workers[socket]
                socket.close()
    context.term()


if __name__ == "__main__":
    replay(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
