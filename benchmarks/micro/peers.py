"""Ways to send features up and get as many bytes of gradient back: ours, bare pyzmq, pickle over ZeroMQ, gRPC.

Each is a client for one process and a server for another. What a server answers lies in memory of its own, as a top's
gradient does: that of pickle and gRPC, which make objects of what arrives, is what they were sent; ours and bare pyzmq,
which only view it, answer the bytes of the first message of the same size. To pass on a frame that was received would
be cheaper, and no server with a model does that.

Bare pyzmq sends three frames up and two down, with copy=False: pyzmq copies what is below 64 KiB and lends the rest.
Ours copies more, and small tensors travel in its header: at 4 KiB it sends one frame each way, above two. Its tensors
from 32 KiB up lie in memory that both ends map (mergesfl/transport/shared.py), as in every run on one machine; those of
the others cross the socket, and those of "ours by socket", which is what ours does between two machines. The processes
of all keep freed memory, as those of a run.
`python -m benchmarks.micro.peers NAME ADDRESS` is the server; it prints where it listens and ends with its parent.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

from benchmarks.micro.server_process import serve_until_closed
from mergesfl.control.estimates import Estimates
from mergesfl.errors import ConfigError
from mergesfl.parts import MAX_PARTS_PER_STEP
from mergesfl.protocol.messages import PROTOCOL_VERSION, Assign, Features, Gradient, Ready, Register, Welcome
from mergesfl.runtime.clock import WallClock
from mergesfl.transport import DEFAULT_LINK, LinkSettings, bind, connect
from ps.fleet import Fleet
from ps.switchboard import Switchboard
from workers.link import Link

Array = NDArray[Any]
ROUND_NUM = 1
ENDLESS_STEPS = 1 << 40
NUM_IN_FLIGHT = MAX_PARTS_PER_STEP  # messages of a burst: as many as a worker may have on the way
BATCH_SIZE = 16  # d: samples of one message
BY_SOCKET = LinkSettings(shares_memory=False)
_GRPC_METHOD = "/bench/exchange"
_GRPC_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class Gradients:
    """What a server answers."""

    def __init__(self) -> None:
        self._of_size: dict[int, Array] = {}

    def of(self, features: Array) -> Array:
        """As large as these features, which are copied the first time."""
        gradient = self._of_size.get(features.nbytes)
        if gradient is None:
            gradient = self._of_size[features.nbytes] = features.copy()
        return gradient


class Client(Protocol):
    """The worker's side."""

    def exchange(self, features: Array, labels: Array) -> object:
        """Sends features (d, F) float32 and labels (d,) int64; what came back, as many bytes as the features have."""
        ...

    def burst(self, features: Array, labels: Array) -> list[object]:
        """Sends them NUM_IN_FLIGHT times, then takes as many answers."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class OurWorker:
    """Our protocol whole: records, codec, session and link, as a worker has them, in a round without end."""

    def __init__(self, address: str, num_parts: int, settings: LinkSettings) -> None:
        self._num_parts = num_parts  # of a step; the server reads it in the worker's name
        self.link = Link(connect(address, settings), WallClock(), lambda: None)
        self._step = 0
        self.link.send(Register(str(num_parts), PROTOCOL_VERSION, "cpu", {}, 1, (1,), ("0",), (1,)))
        assert isinstance(self.link.receive(), Welcome)
        self.link.send(Ready((1,), 4))
        assert isinstance(self.link.receive(), Assign)

    def step(self, features: Array, labels: Array) -> list[object]:
        """One step: all its parts up, then all gradients."""
        for part in range(self._num_parts):
            self.link.send(Features(ROUND_NUM, self._step, features, labels, part=part))
        answers: list[object] = []
        for _ in range(self._num_parts):
            answer = self.link.receive()
            assert isinstance(answer, Gradient)
            answers.append(answer.gradient)
        self._step += 1
        return answers


class OurClient:
    """Two workers, one with steps of one message and one with steps in parts."""

    def __init__(self, address: str, settings: LinkSettings = DEFAULT_LINK) -> None:
        self._one, self._many = (OurWorker(address, num_parts, settings) for num_parts in (1, NUM_IN_FLIGHT))

    def exchange(self, features: Array, labels: Array) -> object:
        """A step."""
        return self._one.step(features, labels)[0]

    def burst(self, features: Array, labels: Array) -> list[object]:
        """A step in parts."""
        return self._many.step(features, labels)

    def close(self) -> None:
        """Closes the endpoints."""
        self._one.link.close()
        self._many.link.close()


def serve_ours(address: str) -> None:
    """The switchboard, which hands up Features; it answers with Gradients of the same bytes."""
    fleet = Fleet(("0",), (1,), Estimates(), max_workers=10)
    welcome = Welcome("cnn", "conv2", ("0",), (1,), 0, "float32", 1.0, (), (), False, 0, "fp32", "fp32", "fp32")
    endpoint = bind(address)
    switchboard = Switchboard(endpoint, fleet, welcome, 4, lambda: None, WallClock(), 60.0)
    print(endpoint.address, flush=True)
    gradients = Gradients()
    num_assigned = 0
    while True:
        arrived = switchboard.receive(1.0)
        message = None if arrived is None else arrived[1]
        if arrived is not None and isinstance(message, Features):
            own = gradients.of(message.features)
            switchboard.send(arrived[0], Gradient(ROUND_NUM, message.step, 0.0, own, part=message.part))
            del arrived, message  # as the server, which has copied the features into its batch, lets them go
        elif num_assigned < len(fleet.available()):
            member, num_assigned = fleet.available()[num_assigned], num_assigned + 1
            num_parts = int(member.worker_id)
            switchboard.send(
                member,
                Assign(ROUND_NUM, ENDLESS_STEPS, ENDLESS_STEPS, num_parts * BATCH_SIZE, "bench", {}, {}, {}, num_parts),
            )


class ZmqClient:
    """A DEALER without anything."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def close(self) -> None:
        """Closes socket and context."""
        self._socket.close(0)
        self._context.term()


class BareClient(ZmqClient):
    """Multipart messages of a header, features and labels, copy=False both ways."""

    def exchange(self, features: Array, labels: Array) -> object:
        """The frames that came back."""
        self._send(features, labels)
        return self._socket.recv_multipart(copy=False)

    def burst(self, features: Array, labels: Array) -> list[object]:
        """The frames of each message that came back."""
        for _ in range(NUM_IN_FLIGHT):
            self._send(features, labels)
        return [self._socket.recv_multipart(copy=False) for _ in range(NUM_IN_FLIGHT)]

    def _send(self, features: Array, labels: Array) -> None:
        self._socket.send_multipart([b"header", features.data, labels.data], copy=False)


class PickleClient(ZmqClient):
    """send_pyobj and recv_pyobj, pyzmq's own way to send objects."""

    def exchange(self, features: Array, labels: Array) -> object:
        """The object that came back."""
        self._send(features, labels)
        return self._socket.recv_pyobj()

    def burst(self, features: Array, labels: Array) -> list[object]:
        """The objects that came back."""
        for _ in range(NUM_IN_FLIGHT):
            self._send(features, labels)
        return [self._socket.recv_pyobj() for _ in range(NUM_IN_FLIGHT)]

    def _send(self, features: Array, labels: Array) -> None:
        self._socket.send_pyobj({"round": ROUND_NUM, "features": features, "labels": labels})


class PickleTorchClient(PickleClient):
    """The same with torch's tensors, which is what a training loop has."""

    def _send(self, features: Array, labels: Array) -> None:
        tensors = {"features": torch.from_numpy(features), "labels": torch.from_numpy(labels)}
        self._socket.send_pyobj({"round": ROUND_NUM, **tensors})


def _router(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(address)
    print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    return socket


def serve_bare(address: str) -> None:
    """Sends the header and a gradient back."""
    socket, gradients = _router(address), Gradients()
    while True:
        peer, header, features, _ = socket.recv_multipart(copy=False)
        gradient = gradients.of(np.frombuffer(features.buffer, np.uint8))
        del features
        socket.send_multipart([peer, header, gradient.data], copy=False)


def serve_pickle(address: str) -> None:
    """Sends an object with the features back."""
    socket = _router(address)
    while True:
        peer = socket.recv()
        message = socket.recv_pyobj()
        socket.send(peer, zmq.SNDMORE)
        socket.send_pyobj({"round": ROUND_NUM, "gradient": message["features"]})


class GrpcClient:
    """One unary call per message: bytes up, bytes back."""

    def __init__(self, address: str) -> None:
        import grpc

        self._channel = grpc.insecure_channel(_grpc_target(address), options=_GRPC_OPTIONS)
        self._call = self._channel.unary_unary(_GRPC_METHOD)

    def exchange(self, features: Array, labels: Array) -> object:
        """The array in the bytes that came back."""
        return np.frombuffer(self._call(b"".join((features.data, labels.data))), np.uint8)

    def burst(self, features: Array, labels: Array) -> list[object]:
        """Calls that wait together."""
        calls = [self._call.future(b"".join((features.data, labels.data))) for _ in range(NUM_IN_FLIGHT)]
        return [np.frombuffer(call.result(), np.uint8) for call in calls]

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


def serve_grpc(address: str) -> None:
    """A generic handler: no generated code, no protobuf."""
    import grpc

    def answer(request: bytes, context: object) -> bytes:
        return request[: len(request) - 8 * BATCH_SIZE]

    handlers = {_GRPC_METHOD.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.server(ThreadPoolExecutor(1), options=_GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port(_grpc_target(address))
    print(address.replace("*", str(port)), flush=True)
    server.start()
    server.wait_for_termination()


def _grpc_target(address: str) -> str:
    scheme, _, rest = address.partition("://")
    return f"unix:{rest}" if scheme == "ipc" else rest.replace("*", "0")


@dataclass(frozen=True)
class Contestant:
    """Both sides of one way."""

    client: Callable[[str], Client]
    serve: Callable[[str], None]


BARE = "bare pyzmq"  # what all others are compared with
CONTESTANTS: Mapping[str, Contestant] = {
    "ours": Contestant(OurClient, serve_ours),
    "ours by socket": Contestant(functools.partial(OurClient, settings=BY_SOCKET), serve_ours),
    BARE: Contestant(BareClient, serve_bare),
    "pickle": Contestant(PickleClient, serve_pickle),
    "pickle torch": Contestant(PickleTorchClient, serve_pickle),
    "grpc": Contestant(GrpcClient, serve_grpc),
}


def check_contestants(names: Iterable[str]) -> None:
    """Raises ConfigError: grpc is asked for and not installed."""
    if "grpc" in names:
        try:
            import grpc  # noqa: F401
        except ImportError:
            raise ConfigError("grpcio is not installed: pip install 'mergesfl[bench]', or leave grpc out") from None


def main() -> None:
    """Serves until the parent's end of stdin is closed."""
    name, address = sys.argv[1:]
    serve_until_closed(CONTESTANTS[name].serve, address)


if __name__ == "__main__":
    main()
