"""What every transport promises, checked on each of them: tcp, ipc and memory."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from mergesfl.errors import ConfigError, LocalProtocolError, TransportError
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.protocol.messages import Features, Ping, Pong
from mergesfl.transport import LinkSettings, MemoryHub, ServerEndpoint, WorkerEndpoint, bind, connect
from mergesfl.transport.base import LEND_BYTES

PATIENCE_SECONDS = 20.0  # only a broken transport ever waits for so long
SETTINGS = LinkSettings(linger_seconds=1.0, max_queued_messages=8, reconnect_seconds=0.02, max_reconnect_seconds=0.1)


class Net:
    """Makes endpoints of one transport and closes them all at the end."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.hub = MemoryHub("test", max_queued_messages=8) if scheme == "memory" else None
        self.address = {"tcp": "tcp://127.0.0.1:*", "ipc": f"ipc://{folder}/ps", "memory": "memory://test"}[scheme]
        self.open: list[ServerEndpoint | WorkerEndpoint] = []

    def server(self, limits: Limits = DEFAULT) -> ServerEndpoint:
        server = bind(self.address, SETTINGS, limits, hub=self.hub)
        self.address = server.address  # a restarted server gets the same port
        self.open.append(server)
        return server

    def worker(self) -> WorkerEndpoint:
        worker = connect(self.address, SETTINGS, hub=self.hub)
        self.open.append(worker)
        return worker

    def pair(self) -> tuple[ServerEndpoint, WorkerEndpoint, bytes]:
        """A server and a worker that have already spoken, and the worker's name."""
        server, worker = self.server(), self.worker()
        return server, worker, introduce(server, worker)


@pytest.fixture(params=["tcp", "ipc", "memory"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    with TemporaryDirectory(prefix="msfl") as folder:  # short: a UNIX socket path has at most 107 bytes
        made = Net(request.param, Path(folder))
        yield made
        for endpoint in made.open:
            endpoint.close()


def eventually(attempt: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not attempt():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)


def heard(server: ServerEndpoint) -> tuple[bytes, list[bytes]]:
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    return received[0], [bytes(frame) for frame in received[1]]


def answered(worker: WorkerEndpoint) -> list[bytes]:
    frames = worker.recv(PATIENCE_SECONDS)
    assert frames is not None
    return [bytes(frame) for frame in frames]


def introduce(server: ServerEndpoint, worker: WorkerEndpoint) -> bytes:
    eventually(lambda: worker.send([b"hello"]))
    peer, frames = heard(server)
    assert frames == [b"hello"]
    return peer


def test_frames_arrive_whole_and_in_order_both_ways(net: Net) -> None:
    server, worker, peer = net.pair()
    for number in range(300):  # far more than may queue: what was read must count as read at once
        frames = [b"%d" % number, b"", bytes(number), b"end"]
        assert worker.send(frames)
        assert heard(server) == (peer, frames)
        server.send(peer, frames)
        assert answered(worker) == frames


def test_messages_queue_in_order(net: Net) -> None:
    server, worker, peer = net.pair()
    for number in range(4):
        assert worker.send([b"up", b"%d" % number])
        server.send(peer, [b"down", b"%d" % number])
    assert [heard(server)[1][1] for _ in range(4)] == [b"0", b"1", b"2", b"3"]
    assert [answered(worker)[1] for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def test_any_bytes_like_frame(net: Net) -> None:
    server, worker, peer = net.pair()
    frames: list[Frame] = [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"view"),
        np.arange(3, dtype=np.float64).view(np.uint8).data,
    ]
    assert worker.send(frames)
    assert heard(server)[1] == [bytes(frame) for frame in frames]
    server.send(peer, frames)
    assert answered(worker) == [bytes(frame) for frame in frames]


def test_16_mib_both_ways(net: Net) -> None:
    server, worker, peer = net.pair()
    features = np.random.default_rng(0).standard_normal((512, 8192)).astype(np.float32)  # (d, F): 16 MiB
    labels = np.arange(512, dtype=np.int64)  # (d,)
    assert worker.send(encode(Features(0, 0, features, labels)))
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    message = decode(received[1])
    assert isinstance(message, Features)
    server.send(peer, received[1])  # what was received can be sent on as it is
    echo = worker.recv(PATIENCE_SECONDS)
    assert echo is not None
    del received
    gc.collect()
    copy = decode(echo)
    assert isinstance(copy, Features)
    for arrived in (message, copy):  # each array keeps its frames alive
        assert np.array_equal(arrived.features, features) and np.array_equal(arrived.labels, labels)


@pytest.mark.parametrize("num_bytes", [8, LEND_BYTES - 1, 1 << 20])
def test_what_has_arrived_does_not_change_with_the_sender(net: Net, num_bytes: int) -> None:
    server, worker, peer = net.pair()
    mine = np.zeros(num_bytes, dtype=np.uint8)
    if net.hub is not None and num_bytes >= LEND_BYTES:  # in one process the memory itself arrives, without a copy
        assert worker.send([b"up", mine.data])
        arrived = server.recv(PATIENCE_SECONDS)
        assert arrived is not None and np.shares_memory(np.frombuffer(arrived[1][1], dtype=np.uint8), mine)
        return
    assert worker.send([b"up", mine.data])
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    mine[:] = 1
    assert bytes(received[1][1]) == bytes(num_bytes)
    server.send(peer, [b"down", mine.data])
    back = worker.recv(PATIENCE_SECONDS)
    assert back is not None
    mine[:] = 2
    assert bytes(back[1]) == b"\1" * num_bytes


def test_an_absent_server_queues_nothing(net: Net) -> None:
    first = net.server()
    first.close()
    worker = net.worker()
    assert not worker.send([b"lost"])
    assert worker.recv(0.05) is None
    server = net.server()
    assert introduce(server, worker)  # the first thing it hears is hello: "lost" was never queued
    assert server.recv(0) is None


def test_an_unknown_peer_is_an_error(net: Net) -> None:
    server = net.server()
    with pytest.raises(TransportError, match="6e6f626f6479 is unreachable"):  # "nobody" in hexadecimal
        server.send(b"nobody", [b"hello"])


def test_a_worker_that_closed_is_an_error(net: Net) -> None:
    server, worker, peer = net.pair()
    other = net.worker()
    other_peer = introduce(server, other)
    assert worker.send([b"last words"])
    worker.close()
    worker.close()  # twice does no harm
    assert heard(server) == (peer, [b"last words"])

    def gone() -> bool:
        try:
            server.send(peer, [b"?"])
        except TransportError:
            return True
        return False

    eventually(gone)
    server.send(other_peer, [b"you are fine"])
    assert answered(other) == [b"you are fine"]


def test_workers_find_a_restarted_server(net: Net) -> None:
    server, worker, peer = net.pair()
    address = server.address
    server.close()
    eventually(lambda: not worker.send([b"into the void"]))
    again = net.server()
    assert again.address == address
    frames = encode(Ping())
    eventually(lambda: worker.send(frames))
    assert heard(again) == (peer, [bytes(frame) for frame in frames])  # the same endpoint is the same peer
    again.send(peer, encode(Pong()))
    assert decode(answered(worker)) == Pong()


def test_each_worker_is_its_own_peer(net: Net) -> None:
    server = net.server()
    workers = [net.worker() for _ in range(5)]
    peers = [introduce(server, worker) for worker in workers]
    assert len(set(peers)) == 5
    for number, peer in reversed(list(enumerate(peers))):
        server.send(peer, [b"%d" % number])
    assert [answered(worker) for worker in workers] == [[b"0"], [b"1"], [b"2"], [b"3"], [b"4"]]


def test_queues_are_bounded(net: Net) -> None:
    """8 messages may wait at each end of a link (SETTINGS), and the sockets' own buffers hold some of 1 MiB besides.

    libzmq hears of what was read in lots of half the bound, so up to 4 that were read may still count.
    """
    server, worker, peer = net.pair()
    big = bytes(1 << 20)
    num_up = 0
    for num_up in range(1000):  # noqa: B007
        if not worker.send([big]):
            break
    assert 4 <= num_up < 100
    num_down = 0
    with pytest.raises(TransportError, match="does not read: 8 messages wait for it"):
        for num_down in range(1000):  # noqa: B007
            server.send(peer, [big])
    assert 4 <= num_down < 100
    for _ in range(num_up):
        assert heard(server) == (peer, [big])
    for _ in range(num_down):
        assert answered(worker) == [big]
    eventually(lambda: worker.send([b"free again"]))
    assert heard(server)[1] == [b"free again"]


def test_a_message_of_no_frames_is_our_bug(net: Net) -> None:
    server, worker, peer = net.pair()
    with pytest.raises(LocalProtocolError, match="0 frames"):
        worker.send([])
    with pytest.raises(LocalProtocolError, match="0 frames"):
        server.send(peer, [])
    server.send(peer, [b"still works"])
    assert answered(worker) == [b"still works"]


def test_too_many_frames_are_cut_so_that_the_codec_refuses(net: Net) -> None:
    server, worker, _ = net.pair()
    assert worker.send([b"x"] * 20_000)
    frames = heard(server)[1]
    assert DEFAULT.max_frames < len(frames) <= DEFAULT.max_frames + 2
    assert worker.send([b"the next one is whole"])
    assert heard(server)[1] == [b"the next one is whole"]


def test_only_looking_does_not_wait(net: Net) -> None:
    server, worker, _ = net.pair()
    for timeout_seconds in (0.0, -1.0, 0.001):
        assert server.recv(timeout_seconds) is None
        assert worker.recv(timeout_seconds) is None


def test_a_waiting_receiver_is_woken(net: Net) -> None:
    server, worker, peer = net.pair()
    late = threading.Timer(0.1, lambda: worker.send([b"late"]))
    late.start()
    assert heard(server) == (peer, [b"late"])
    late.join()
    late = threading.Timer(0.1, lambda: server.send(peer, [b"late too"]))
    late.start()
    woken = worker.recv(float("inf"))
    assert woken is not None and bytes(woken[0]) == b"late too"
    late.join()


def test_closed_endpoints_say_so(net: Net) -> None:
    server, worker, peer = net.pair()
    for endpoint in (worker, server):
        endpoint.close()
        with pytest.raises(TransportError, match="make a new one"):
            endpoint.recv(0)
    with pytest.raises(TransportError, match="make a new one"):
        worker.send([b"x"])
    with pytest.raises(TransportError):
        server.send(peer, [b"x"])


def test_closing_with_messages_on_the_way_does_not_hang(net: Net) -> None:
    server, worker, peer = net.pair()
    assert worker.send([bytes(1 << 20)])
    server.send(peer, [bytes(1 << 20)])
    server.close()
    worker.close()


def test_the_address_can_be_bound_once(net: Net) -> None:
    server, worker, peer = net.pair()
    with pytest.raises(TransportError, match="has"):
        net.server()
    server.send(peer, [b"the first one still works"])
    assert answered(worker) == [b"the first one still works"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("udp://127.0.0.1:5", "unknown kind of address 'udp://127.0.0.1:5': .*ipc, memory, tcp"),
        ("127.0.0.1:5555", "unknown kind of address"),
        ("memory://hub", "needs a hub"),
        ("tcp://127.0.0.1", "write tcp://HOST:PORT"),
        ("tcp://127.0.0.1:65536", "port up to 65535"),
        ("tcp://127.0.0.1:80x", "write tcp://HOST:PORT"),
        ("tcp://:5555", "write tcp://HOST:PORT"),
        ("ipc://", "write tcp://HOST:PORT with a port up to 65535, or ipc:///PATH"),
        ("ipc:///" + "a" * 200, "too long for a UNIX socket"),
    ],
)
@pytest.mark.parametrize("open_endpoint", [bind, connect])
def test_bad_addresses(open_endpoint: Callable[[str], object], address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_endpoint(address)


def test_a_hub_of_another_name() -> None:
    with pytest.raises(ConfigError, match="is not the address of the hub given, 'memory://b'"):
        bind("memory://a", hub=MemoryHub("b"))
    with pytest.raises(ConfigError, match="1 or more"):
        MemoryHub("b", max_queued_messages=0)
