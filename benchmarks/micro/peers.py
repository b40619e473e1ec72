"""Four ways to send features up and get as many bytes of gradient back: ours, bare pyzmq, pickle over ZeroMQ, gRPC.

Each is a client for one process and a server for another, which answers every message with the bytes it has brought.
`python -m benchmarks.micro.peers NAME ADDRESS` is the server; it prints where it listens and ends with its parent.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from mergesfl.control.estimates import Estimates
from mergesfl.errors import ConfigError
from mergesfl.protocol.messages import PROTOCOL_VERSION, Assign, Features, Gradient, Ready, Register, Welcome
from mergesfl.runtime.clock import WallClock
from mergesfl.transport import bind, connect
from ps.fleet import Fleet
from ps.switchboard import Switchboard
from workers.link import Link

Array = NDArray[Any]
ROUND_NUM = 1
ENDLESS_STEPS = 1 << 40
BATCH_SIZE = 16  # d: samples of one message
_GRPC_METHOD = "/bench/exchange"
_GRPC_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class Client(Protocol):
    """The worker's side."""

    def exchange(self, features: Array, labels: Array) -> object:
        """Sends features (d, F) float32 and labels (d,) int64; what came back, as many bytes as the features have."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class OurClient:
    """Our protocol whole: records, codec, session and link, as a worker has them."""

    def __init__(self, address: str) -> None:
        self._link = Link(connect(address), WallClock(), lambda: None)
        self._step = 0
        self._link.send(Register("w", PROTOCOL_VERSION, "cpu", {}, 1, (1,), ("0",), (1,)))
        assert isinstance(self._link.receive(), Welcome)
        self._link.send(Ready((1,), 4))
        assert isinstance(self._link.receive(), Assign)

    def exchange(self, features: Array, labels: Array) -> object:
        """One step of the round without end."""
        self._link.send(Features(ROUND_NUM, self._step, features, labels))
        answer = self._link.receive()
        assert isinstance(answer, Gradient)
        self._step += 1
        return answer.gradient

    def close(self) -> None:
        """Closes the endpoint."""
        self._link.close()


def serve_ours(address: str) -> None:
    """The switchboard, which hands up Features; it answers with Gradients of the same bytes."""
    fleet = Fleet(("0",), (1,), Estimates(), max_workers=10)
    welcome = Welcome("cnn", "conv2", ("0",), (1,), 0, "float32", 1.0, (), (), False, 0, "fp32", "fp32", "fp32")
    endpoint = bind(address)
    switchboard = Switchboard(endpoint, fleet, welcome, 4, lambda: None, WallClock(), 60.0)
    print(endpoint.address, flush=True)
    while not fleet.available():
        switchboard.receive(1.0)
    assign = Assign(ROUND_NUM, ENDLESS_STEPS, ENDLESS_STEPS, BATCH_SIZE, "bench", {}, {})
    switchboard.send(fleet.available()[0], assign)
    while True:
        arrived = switchboard.receive(1.0)
        message = None if arrived is None else arrived[1]
        if arrived is not None and isinstance(message, Features):
            switchboard.send(arrived[0], Gradient(ROUND_NUM, message.step, 0.0, message.features))
            del arrived, message  # as the server, which has copied the features into its batch, lets them go


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
        self._socket.send_multipart([b"header", features.data, labels.data], copy=False)
        return self._socket.recv_multipart(copy=False)


class PickleClient(ZmqClient):
    """send_pyobj and recv_pyobj, pyzmq's own way to send objects."""

    def exchange(self, features: Array, labels: Array) -> object:
        """The object that came back."""
        self._socket.send_pyobj({"round": ROUND_NUM, "features": features, "labels": labels})
        return self._socket.recv_pyobj()


def _router(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(address)
    print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    return socket


def serve_bare(address: str) -> None:
    """Sends the header and the features back."""
    socket = _router(address)
    while True:
        peer, header, features, _ = socket.recv_multipart(copy=False)
        socket.send_multipart([peer, header, features], copy=False)


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
        return np.frombuffer(self._call(features.tobytes() + labels.tobytes()), np.uint8)

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
    BARE: Contestant(BareClient, serve_bare),
    "pickle": Contestant(PickleClient, serve_pickle),
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
    threading.Thread(target=CONTESTANTS[name].serve, args=(address,), daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # the thread still holds its socket: an orderly end would wait for it


if __name__ == "__main__":
    main()
