"""The floor in processes: its steps with every bottom in a worker process, and nothing between but bare pyzmq.

What a run over sockets costs beyond this is the framework; what this costs beyond the floor is that eleven processes
take turns: messages through the kernel, wake-ups, and caches that are full of the others. Whatever arrives is believed,
nobody is late, nothing is counted. Only a gradient is copied once more than it must be, into memory that torch aligns.
 `python -m benchmarks.micro.bare CONFIG.json ADDRESS INDEX` is one worker.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from benchmarks.micro.floor import BottomSide, PlayedRound, TopSide, fresh_network, mean, shares
from mergesfl.config import RunConfig
from mergesfl.data import load_dataset
from mergesfl.data.dataset import Dataset
from mergesfl.processes import local_address, worker_name
from mergesfl.runtime.process import keep_freed_memory

Frames = Sequence[zmq.Frame]

SILENT_MILLISECONDS = 600_000  # then somebody has died, and the benchmark ends with an error


def run_bare(
    config: RunConfig, dataset: Dataset, rounds: Sequence[PlayedRound], after_round: Callable[[Sequence[int]], None]
) -> dict[str, Tensor]:
    """`run_floor` with a process per worker over config.cluster.transport; after_round is told their process ids."""
    with local_address(config.cluster.transport) as address, tempfile.TemporaryDirectory() as folder:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.RCVTIMEO, SILENT_MILLISECONDS)
        socket.bind(address)
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json())
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        command = [sys.executable, "-m", "benchmarks.micro.bare", str(path), bound]
        workers = [subprocess.Popen([*command, str(index)]) for index in range(config.cluster.num_workers)]
        try:
            return _serve(config, dataset, rounds, socket, lambda: after_round([worker.pid for worker in workers]))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            context.destroy(0)


def _serve(
    config: RunConfig,
    dataset: Dataset,
    rounds: Sequence[PlayedRound],
    socket: zmq.Socket[bytes],
    after_round: Callable[[], None],
) -> dict[str, Tensor]:
    network = fresh_network(config, dataset)
    top = TopSide(config, network.top)
    shape = network.feature_shape(dataset.sample_shape)
    for _ in range(config.cluster.num_workers):
        socket.recv_multipart()  # all are there; a worker's identity is its name
    for round_num, played in enumerate(rounds):
        names = [name.encode() for name in played.worker_ids]
        state = network.bottom.state_dict()
        frames = [_bytes_of(tensor) for tensor in state.values()]
        for name, d in zip(names, played.batch_sizes, strict=True):
            socket.send_multipart([name, np.array([round_num, d], np.int64).data, *frames], copy=False)
        top.begin(round_num)
        for step in range(config.training.local_steps):
            sent = list(zip(_gathered(socket, names), played.batch_sizes, strict=True))
            features = [_viewed(one[0], (d, *shape), torch.float32) for one, d in sent]  # (d_i, F...)
            labels = [_viewed(one[1], (d,), torch.int64) for one, d in sent]
            for name, gradient in zip(names, top.step(step, features, labels), strict=True):
                socket.send_multipart([name, _bytes_of(gradient)], copy=False)
        states = [
            {key: _viewed(frame, like.shape, like.dtype) for (key, like), frame in zip(state.items(), one, strict=True)}
            for one in _gathered(socket, names)
        ]
        network.bottom.load_state_dict(mean(states, played.batch_sizes))
        after_round()
    return {name: tensor.detach().clone() for name, tensor in network.joined_state_dict().items()}


def _gathered(socket: zmq.Socket[bytes], names: Sequence[bytes]) -> list[Frames]:
    """One message of each, in this order."""
    arrived: dict[bytes, Frames] = {}
    while len(arrived) < len(names):
        name, *frames = socket.recv_multipart(copy=False)
        arrived[name.bytes] = frames
    return [arrived[name] for name in names]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of (n, c, h, w) the elements in the order of (n, h, w, c), as convolutions on a CPU leave them here."""
    plain = tensor.detach().permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor.detach()
    return plain.contiguous().numpy().reshape(-1).data


def _viewed(frame: zmq.Frame, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What `_bytes_of` made of it, in the frame's own memory."""
    flat = torch.frombuffer(frame.buffer, dtype=dtype)
    if len(shape) != 4:
        return flat.reshape(tuple(shape))
    n, c, h, w = shape
    return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)


def main() -> None:
    """A worker, until it is killed."""
    path, address, index = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()
    config = RunConfig.model_validate_json(Path(path).read_text())
    dataset = load_dataset(config.data.dataset)
    network = fresh_network(config, dataset)
    side, name = BottomSide(config, dataset, network.bottom), worker_name(int(index))
    rows = shares(config, dataset)[name]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVTIMEO, SILENT_MILLISECONDS)
    socket.setsockopt(zmq.ROUTING_ID, name.encode())
    socket.connect(address)
    socket.send(b"here")
    while True:
        numbers, *frames = socket.recv_multipart(copy=False)
        round_num, d = np.frombuffer(numbers.buffer, np.int64).tolist()
        state = side.bottom.state_dict().items()
        side.bottom.load_state_dict(
            {key: _viewed(frame, like.shape, like.dtype) for (key, like), frame in zip(state, frames, strict=True)}
        )
        side.begin(round_num, name, rows, d)
        for step in range(config.training.local_steps):
            features, labels = side.forward(step)
            socket.send_multipart([_bytes_of(features), labels.numpy().data], copy=False)
            (gradient,) = socket.recv_multipart(copy=False)
            side.backward(_viewed(gradient, features.shape, features.dtype).clone())
        socket.send_multipart([_bytes_of(tensor) for tensor in side.bottom.state_dict().values()], copy=False)


if __name__ == "__main__":
    main()
