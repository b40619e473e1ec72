"""What only real sockets can do: dead and frozen processes, lost links, addresses of the machine, hostile peers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zmq

from mergesfl.errors import ConfigError, RemoteProtocolError, TransportError
from mergesfl.protocol.codec import decode
from mergesfl.protocol.limits import Limits
from mergesfl.transport import LinkSettings
from mergesfl.transport.zeromq import SERVER_UNREAD_MESSAGES, ZmqServer, ZmqWorker

PATIENCE_SECONDS = 20.0
IMPATIENT = LinkSettings(
    linger_seconds=0.5,
    heartbeat_interval_seconds=0.1,
    heartbeat_timeout_seconds=0.5,
    reconnect_seconds=0.02,
    max_reconnect_seconds=0.1,
)
# A worker process that says hello and then sleeps in Python: only its I/O thread answers heartbeats.
SLEEPER = """
import sys, time
from mergesfl.transport import LinkSettings, connect
worker = connect(sys.argv[1], LinkSettings(reconnect_seconds=0.02, max_reconnect_seconds=0.1))
while not worker.send([b"hello"]):
    time.sleep(0.01)
time.sleep(60)
"""


@pytest.fixture
def server() -> Iterator[ZmqServer]:
    made = ZmqServer("tcp://127.0.0.1:*", IMPATIENT)
    yield made
    made.close()


@pytest.fixture
def sleeper(server: ZmqServer) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, server.address], cwd=Path(__file__).parent.parent)
    yield process
    process.kill()  # also ends a stopped process
    process.wait()


def reachable(server: ZmqServer, peer: bytes) -> bool:
    try:
        server.send(peer, [b"are you there?"])
    except TransportError as error:
        assert "is unreachable" in str(error)  # the heartbeat noticed, not the high-water mark
        return False
    return True


def wait_until(server: ZmqServer, peer: bytes, is_reachable: bool) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while reachable(server, peer) is not is_reachable:
        assert time.monotonic() < deadline, f"peer is still {'un' * is_reachable}reachable"
        time.sleep(0.05)


@pytest.mark.parametrize("signal_num", [signal.SIGSTOP, signal.SIGKILL], ids=["frozen", "killed"])
def test_a_frozen_and_a_killed_worker_become_unreachable(
    server: ZmqServer, sleeper: subprocess.Popen[bytes], signal_num: int
) -> None:
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    peer = received[0]
    time.sleep(2 * IMPATIENT.heartbeat_timeout_seconds)
    assert reachable(server, peer)  # busy in Python is not dead
    os.kill(sleeper.pid, signal_num)
    wait_until(server, peer, is_reachable=False)  # 0.6 s on an idle machine: interval + timeout


def test_a_worker_that_comes_back_after_a_freeze_is_the_same_peer(
    server: ZmqServer, sleeper: subprocess.Popen[bytes]
) -> None:
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_until(server, received[0], is_reachable=False)
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_until(server, received[0], is_reachable=True)


def test_a_second_connection_of_the_same_peer_takes_over(server: ZmqServer) -> None:
    """A worker whose link broke connects again before this end has noticed: both connections carry its routing id."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as old, context.socket(zmq.DEALER) as new:
        for dealer, words in ((old, b"old"), (new, b"new")):
            dealer.setsockopt(zmq.ROUTING_ID, b"w1")
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(server.address)
            dealer.send(words)
            received = server.recv(PATIENCE_SECONDS)
            assert received is not None and received[0] == b"w1" and received[1] == [words]
        server.send(b"w1", [b"answer"])
        assert new.poll(int(PATIENCE_SECONDS * 1000))
        assert new.recv() == b"answer"


def test_what_was_read_counts_as_read_at_once() -> None:
    """libzmq looks at such news only now and then unless it is asked: a queue of 2 would seem full after 2 answers."""
    settings = LinkSettings(max_queued_messages=2, reconnect_seconds=0.02)
    server = ZmqServer("tcp://127.0.0.1:*", settings)
    worker = ZmqWorker(server.address, settings)
    while not worker.send([b"hello"]):
        time.sleep(0.01)
    for _ in range(300):
        received = server.recv(PATIENCE_SECONDS)
        assert received is not None
        server.send(received[0], received[1])
        assert worker.recv(PATIENCE_SECONDS) is not None
        assert worker.send([b"again"])
    worker.close()
    server.close()


def test_a_shared_context_is_left_open() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with TemporaryDirectory(prefix="msfl") as folder:
        server = ZmqServer(f"ipc://{folder}/ps", IMPATIENT, context)
        worker = ZmqWorker(server.address, IMPATIENT, context)
        worker.close()
        server.close()
    assert not context.closed
    context.term()


def test_a_link_that_breaks_in_mid_message_does_not_eat_the_next_one(server: ZmqServer) -> None:
    """The first frame goes out, then the server goes: the rest must still be handed to libzmq (see ZmqWorker.send)."""
    worker = ZmqWorker(server.address, IMPATIENT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not worker.send([b"hello"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.recv(PATIENCE_SECONDS) is not None

    class Breaks(list):  # type: ignore[type-arg]
        """Frames; between the first and the second the server closes."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield b"first"
            server.close()
            time.sleep(0.3)
            yield from [b"second", b"third"]

        def __len__(self) -> int:
            return 3

    worker.send(Breaks([b"first", b"second", b"third"]))
    again = ZmqServer(server.address, IMPATIENT)
    while not worker.send([b"whole", b"message"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    received = again.recv(PATIENCE_SECONDS)
    assert received is not None and [bytes(frame) for frame in received[1]] == [b"whole", b"message"]
    again.close()
    worker.close()


def test_a_frame_above_the_limit_costs_the_connection_and_nobody_else() -> None:
    server = ZmqServer("tcp://127.0.0.1:*", IMPATIENT, limits=Limits(max_message_bytes=1000))
    loud, calm = ZmqWorker(server.address, IMPATIENT), ZmqWorker(server.address, IMPATIENT)
    for worker, frame in ((loud, bytes(1001)), (calm, bytes(1000))):
        while not worker.send([frame]):
            time.sleep(0.01)
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None and received[1] == [bytes(1000)]
    for endpoint in (loud, calm, server):
        endpoint.close()


@pytest.mark.parametrize(("asked", "granted"), [(64, SERVER_UNREAD_MESSAGES), (2, 2)])
def test_a_server_keeps_few_unread_messages_of_a_peer(asked: int, granted: int) -> None:
    settings = LinkSettings(max_queued_messages=asked)
    server = ZmqServer("tcp://127.0.0.1:*", settings)
    worker = ZmqWorker(server.address, settings)
    assert server._socket.getsockopt(zmq.RCVHWM) == granted == min(asked, 8)
    assert server._socket.getsockopt(zmq.SNDHWM) == worker._socket.getsockopt(zmq.SNDHWM) == asked
    worker.close()
    server.close()


def test_bytes_that_are_no_zmtp_hurt_nobody(server: ZmqServer) -> None:
    host, port = server.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        # libzmq takes this for its version 1 and makes "messages" of it: what comes up must be refused by the codec
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(range(256)) * 10)
        worker = ZmqWorker(server.address, IMPATIENT)
        while not worker.send([b"hello"]):
            time.sleep(0.01)
        received = server.recv(PATIENCE_SECONDS)
        while received is not None and received[1] != [b"hello"]:
            with pytest.raises(RemoteProtocolError):
                decode(received[1])
            received = server.recv(PATIENCE_SECONDS)
        assert received is not None
        worker.close()


FORGETFUL = """
import gc
from mergesfl.transport.zeromq import ZmqServer
server = ZmqServer("tcp://127.0.0.1:*")
address = server.address
server.myself = server  # now only the collector can find it
del server
gc.collect()
ZmqServer(address)  # the port is free again; and this one is still open when the process ends
"""


def test_an_endpoint_that_nobody_closed_hangs_neither_the_collector_nor_the_exit() -> None:
    command = [sys.executable, "-c", FORGETFUL]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent, timeout=PATIENCE_SECONDS).returncode == 0


def test_an_empty_message_of_a_foreign_dealer_reaches_the_codec(server: ZmqServer) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(server.address)
        dealer.send(b"")
        received = server.recv(PATIENCE_SECONDS)
        assert received is not None
        with pytest.raises(RemoteProtocolError):
            decode(received[1])


# ------------------------------------------------------------------------------------------------------------ addresses


def test_the_real_port_is_told(server: ZmqServer) -> None:
    assert 0 < int(server.address.rpartition(":")[2]) <= 65535
    zero = ZmqServer("tcp://127.0.0.1:0", IMPATIENT)
    assert 0 < int(zero.address.rpartition(":")[2]) <= 65535
    zero.close()


def test_an_ipc_folder_that_does_not_exist() -> None:
    with TemporaryDirectory() as folder, pytest.raises(TransportError, match="create it"):
        ZmqServer(f"ipc://{folder}/missing/ps")


def test_an_ipc_path_is_never_a_file_to_delete() -> None:
    with TemporaryDirectory(prefix="msfl") as folder:
        precious = Path(folder, "thesis.tex")
        precious.write_text("ten years")
        with pytest.raises(TransportError, match="a file that is no socket lies there"):
            ZmqServer(f"ipc://{precious}")
        assert precious.read_text() == "ten years"


def test_an_ipc_socket_that_a_dead_server_left_is_replaced() -> None:
    with TemporaryDirectory(prefix="msfl") as folder:
        path = Path(folder, "ps")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))  # closing does not remove the file: what kill -9 leaves
        assert path.is_socket()
        server = ZmqServer(f"ipc://{path}", IMPATIENT)
        worker = ZmqWorker(f"ipc://{path}", IMPATIENT)
        while not worker.send([b"hello"]):
            time.sleep(0.01)
        assert server.recv(PATIENCE_SECONDS) is not None
        worker.close()
        server.close()


def test_addresses_of_other_machines_cannot_be_bound() -> None:
    with pytest.raises(TransportError, match="this machine has no such address"):
        ZmqServer("tcp://192.0.2.1:5555")  # TEST-NET-1, RFC 5737: nobody has it


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://*:5555"])
def test_a_worker_needs_a_real_address(address: str) -> None:
    with pytest.raises(ConfigError, match="name the server's host and port"):
        ZmqWorker(address)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_timeout_seconds": 0.0},
        {"heartbeat_timeout_seconds": 7000.0},
        {"heartbeat_interval_seconds": 301.0},
        {"heartbeat_interval_seconds": 0.0},
        {"max_queued_messages": 0},
        {"linger_seconds": -1.0},
        {"reconnect_seconds": 3.0},
        {"reconnect_seconds": 0.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.* = .*; choose"):
        LinkSettings(**wrong)  # type: ignore[arg-type]
