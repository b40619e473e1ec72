"""Memory in common: what lies in it is what was sent, no view is written over, and no peer's word is taken for it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from mergesfl.errors import RemoteProtocolError, TransportError
from mergesfl.processes import local_address
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import Gradient, Pong
from mergesfl.runtime.arrays import borrowed_tensor
from mergesfl.transport import LinkSettings
from mergesfl.transport import shared as shared_module
from mergesfl.transport import zeromq as zeromq_module
from mergesfl.transport.addresses import is_of_this_machine
from mergesfl.transport.area import AREA_BYTES, MAX_PLACED, Area
from mergesfl.transport.sealed import NONCE_BYTES, make_memory, open_memory
from mergesfl.transport.shared import (
    CLOSED_SECONDS,
    FEWEST_BYTES,
    MARK,
    MAX_UNANSWERED,
    MEMORY_BYTES,
    MOST_BYTES,
    SWEEP_SECONDS,
    UP_BEGIN,
    Prefix,
    ServerSide,
    SharedMemory,
    WorkerSide,
)
from mergesfl.transport.zeromq import ZmqServer, ZmqWorker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory in common is Linux's")

PATIENCE_SECONDS = 20.0
PEER = b"somebody"
LARGE = FEWEST_BYTES
OPENING_BYTES = shared_module._OPENING.size
QUICK = LinkSettings(linger_seconds=1.0, reconnect_seconds=0.02, max_reconnect_seconds=0.1)


def content(seed: int, num_bytes: int = LARGE) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def as_bytes(frames: Sequence[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


class Ends:
    """Both ends without a socket; they have agreed. What was carried last is kept."""

    def __init__(self) -> None:
        self.worker, self.server = WorkerSide(), ServerSide(may_open=True)
        self.worker.unpack([b"welcome"])
        self.up([b"ready"])
        self.down([b"pong"])

    def up(self, frames: Sequence[Frame]) -> list[Frame]:
        self.carried = list(self.worker.pack(frames).frames)
        return self.server.unpack(PEER, list(self.carried))

    def down(self, frames: Sequence[Frame]) -> list[Frame]:
        self.carried = list(self.server.pack(PEER, frames).frames)
        return self.worker.unpack(list(self.carried))


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.worker.close()


class Said(NamedTuple):
    """What stood in front of the header that was carried last."""

    opening: bytes
    freed: tuple[int, ...]
    placed: list[tuple[int, ...]]  # (index, offset, bytes)


def prefix_of(ends: Ends) -> Said:
    first = bytes(ends.carried[0])
    prefix = Prefix.of(first)
    assert prefix is not None
    assert first.startswith(MARK)
    entries = iter(prefix.placed)
    return Said(first[:OPENING_BYTES], prefix.freed, list(zip(*[entries] * 3, strict=True)))


# --- what is carried ---


@pytest.mark.parametrize(
    "sizes", [(), (0,), (LARGE,), (LARGE - 1,), (1, LARGE, 2, 3 * LARGE + 1, 3), (LARGE, 0, LARGE)]
)
def test_a_message_arrives_as_it_was_sent_and_its_large_frames_do_not_cross(ends: Ends, sizes: tuple[int, ...]) -> None:
    frames = [b"header", *(content(seed, size) for seed, size in enumerate(sizes))]
    for send in (ends.up, ends.down):
        assert as_bytes(send(frames)) == frames
        assert as_bytes(ends.carried[1:]) == [frame for frame in frames[1:] if len(frame) < LARGE]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8).data])
def test_any_kind_of_frame_may_be_sent(ends: Ends, kind: type) -> None:
    frames = [kind(b"header"), kind(content(1)), kind(b"small")]
    assert as_bytes(ends.up(frames)) == [b"header", content(1), b"small"]


def test_what_has_nothing_to_say_travels_as_it_is(ends: Ends) -> None:
    ends.up([b"first"])  # tells that the server has been heard
    for send in (ends.up, ends.down):
        assert as_bytes(send([b"header", b"small"])) == ends.carried == [b"header", b"small"]


def test_a_frame_is_only_read_by_who_gets_it_and_lies_on_a_cache_line(ends: Ends) -> None:
    for received in ends.up([b"header", content(1, LARGE + 1), content(2)])[1:]:
        view = memoryview(received)
        assert view.readonly
        assert np.frombuffer(view, np.uint8).ctypes.data % 64 == 0


def test_what_is_viewed_is_not_written_over_and_its_place_is_used_again_when_it_is_let_go(ends: Ends) -> None:
    for send, answer in ((ends.up, ends.down), (ends.down, ends.up)):
        kept = send([b"header", content(1)])
        first = prefix_of(ends).placed[0][1]
        answer([b"header"])  # tells nothing: the frame is still viewed
        other = send([b"header", content(2)])
        assert prefix_of(ends).placed[0][1] > first
        assert as_bytes(kept) == [b"header", content(1)]
        array = np.frombuffer(kept[1], np.float32)
        del kept
        answer([b"header"])  # a view of a view holds it, too
        assert send([b"header", content(3)]) is not None
        assert prefix_of(ends).placed[0][1] > first
        assert array.tobytes() == content(1)
        del array
        answer([b"header"])  # tells it now
        assert as_bytes(send([b"header", content(4)])) == [b"header", content(4)]
        assert prefix_of(ends).placed[0][1] == first
        assert as_bytes(other) == [b"header", content(2)]


HOLDERS = (  # what is made of an array, and how it is looked at
    (lambda array: array, lambda kept: kept.tolist()),
    (lambda array: array[3:].T, lambda kept: kept.T.tolist()),
    (lambda array: borrowed_tensor(array, torch.device("cpu")), lambda kept: kept.tolist()),
    (lambda array: borrowed_tensor(array, torch.device("cpu"))[3:].T, lambda kept: kept.T.tolist()),
)


@pytest.mark.parametrize(("derived", "looked_at"), HOLDERS)
def test_decoded_arrays_hold_their_place(
    ends: Ends, derived: Callable[..., Any], looked_at: Callable[..., Any]
) -> None:
    """Neither an array of a frame nor a part of it nor a tensor lets go of the frame: numpy shortens bases."""
    gradient = np.arange(LARGE // 4, dtype=np.float32).reshape(16, -1)  # (d, F)
    received = decode(ends.down(encode(Gradient(1, 0, 0.5, gradient))))
    assert isinstance(received, Gradient)
    kept = derived(received.gradient)
    del received
    gc.collect()
    ends.up([b"header"])
    ends.down([b"header", content(1, LARGE)])
    assert looked_at(kept) in (gradient.tolist(), gradient[3:].tolist())
    del kept
    ends.up([b"header"])
    assert len(prefix_of(ends).freed) == 2


def test_without_room_frames_take_the_socket(ends: Ends) -> None:
    most = [content(seed, MOST_BYTES) for seed in range(2)]
    views = [ends.up([b"header", most[0]]) for _ in range(AREA_BYTES // MOST_BYTES)]  # the area is full
    assert as_bytes(ends.up([b"header", content(1), b"small"])) == [b"header", content(1), b"small"]
    assert as_bytes(ends.carried) == [b"header", content(1), b"small"]
    del views[3]
    ends.down([b"header"])
    assert as_bytes(ends.up([b"header", most[1], content(2)])) == [b"header", most[1], content(2)]
    assert as_bytes(ends.carried[1:]) == [content(2)]
    assert all(as_bytes(view) == [b"header", most[0]] for view in views)


def test_a_frame_above_the_limit_and_one_more_than_may_lie_there_take_the_socket(ends: Ends) -> None:
    huge = bytes(MOST_BYTES + 1)
    assert as_bytes(ends.up([b"header", huge])) == [b"header", huge]
    assert len(ends.carried) == 2
    many = [b"header", *[bytes(LARGE)] * (MAX_PLACED + 1)]
    received = ends.up(many)
    assert as_bytes(received) == many
    assert len(ends.carried) == 2
    del received
    ends.down([b"header"])
    ends.up(many)
    assert len(ends.carried) == 2  # all places were free again


def test_a_message_that_could_not_be_sent_leaves_nothing_behind(ends: Ends) -> None:
    ends.down([b"header", content(1)])  # let go at once: the next message up tells so
    for _ in range(3):
        packed = ends.worker.pack([b"header", content(2)])
        assert (len(packed.freed), list(packed.placed)) == (1, [UP_BEGIN])
        ends.worker.take_back(packed)
    assert as_bytes(ends.up([b"header", content(3)])) == [b"header", content(3)]
    assert prefix_of(ends).placed[0][1] == UP_BEGIN
    assert len(prefix_of(ends).freed) == 1
    packed = ends.server.pack(PEER, [b"header", content(4)])
    assert list(packed.placed) == [UP_BEGIN + AREA_BYTES]
    ends.server.take_back(PEER, packed)
    assert ends.server.pack(PEER, [b"header", content(4)]).placed == packed.placed


def test_an_answer_that_could_not_be_sent_is_given_with_the_next_message() -> None:
    worker, server = WorkerSide(), ServerSide(may_open=True)
    worker.unpack([b"welcome"])
    server.unpack(PEER, list(worker.pack([b"ready"]).frames))
    server.take_back(PEER, server.pack(PEER, [b"pong"]))
    worker.unpack(list(server.pack(PEER, [b"pong"]).frames))
    assert len(worker.pack([b"up", content(1)]).placed) == 1
    worker.close()


@given(st.lists(st.one_of(st.integers(1, AREA_BYTES), st.integers(1, 1000)), max_size=60), st.randoms())
def test_no_two_frames_share_a_byte(sizes: list[int], chance: random.Random) -> None:
    class Unwritten:  # 512 MiB need not be touched for this
        def __setitem__(self, where: slice, data: memoryview) -> None:
            assert where.stop - where.start == len(data)

    area = Area(Unwritten(), UP_BEGIN)  # type: ignore[arg-type]
    taken: dict[int, int] = {}
    for size in sizes:
        begin = area.put(memoryview(ZEROS)[:size], size)
        if begin is None:
            gaps = sorted([(UP_BEGIN, UP_BEGIN), *((b, e + -e % 64) for b, e in taken.items())])
            ends_of_gaps = [b for b, _ in gaps[1:]] + [UP_BEGIN + AREA_BYTES]
            assert all(stop - end < size for (_, end), stop in zip(gaps, ends_of_gaps, strict=True))
        else:
            assert begin % 64 == 0
            assert UP_BEGIN <= begin < begin + size <= UP_BEGIN + AREA_BYTES
            assert all(begin + size <= b or e <= begin for b, e in taken.items())
            taken[begin] = begin + size
        if taken and chance.random() < 0.4:
            gone = chance.choice(list(taken))
            del taken[gone]
            area.free(gone)
        area.free(chance.randrange(1, 64))  # nobody's


ZEROS = mmap.mmap(-1, AREA_BYTES)  # untouched


# --- how they agree ---


def test_a_worker_offers_nothing_before_it_has_heard_of_a_server() -> None:
    worker, server = WorkerSide(), ServerSide(may_open=True)
    assert worker.pack([b"register", content(1)]).frames == [b"register", content(1)]
    worker.unpack([b"welcome"])
    carried = worker.pack([b"ready", content(1)]).frames
    assert carried[1] == content(1)  # offered, not agreed
    assert as_bytes(server.unpack(PEER, list(carried))) == [b"ready", content(1)]
    worker.close()


def test_a_server_that_does_not_take_the_offer_gets_all_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: tuple[int, int], num_bytes: int, nonce: bytes) -> None:
        raise OSError("another container")

    monkeypatch.setattr(shared_module, "open_memory", refuse)
    worker, server = WorkerSide(), ServerSide(may_open=True)
    for index in range(2 * MAX_UNANSWERED):
        assert worker.unpack(list(server.pack(PEER, [b"down"]).frames)) == [b"down"]
        carried = list(worker.pack([b"up", content(1)]).frames)
        assert (carried[0][:1] == MARK) == (index < MAX_UNANSWERED)  # then it gives up
        assert server.unpack(PEER, carried) == [b"up", content(1)]
    worker.close()


def test_a_system_without_such_memory_uses_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with local_address("ipc") as address:
        server = ZmqServer(address, QUICK)
        worker = ZmqWorker(server.address, QUICK)
        try:
            for frames in ([b"one"], [b"two", content(1)]):
                exchange(server, worker, frames)
        finally:
            worker.close()
            server.close()


def test_a_server_started_anew_reads_the_first_message_and_writes_nothing_over_what_its_predecessor_wrote(
    ends: Ends,
) -> None:
    kept = ends.down([b"header", content(1)])
    ends.server = ServerSide(may_open=True)
    assert as_bytes(ends.up([b"header", content(2)])) == [b"header", content(2)]
    assert ends.carried[1:] == []
    assert as_bytes(ends.down([b"header", content(3)])) == [b"header", content(3)]
    assert ends.carried[1:] == [content(3)]
    assert as_bytes(kept) == [b"header", content(1)]


def newcomer(server: ServerSide, peer: bytes) -> WorkerSide:
    """A worker that has made its offer."""
    worker = WorkerSide()
    worker.unpack([b"welcome"])
    assert server.unpack(peer, list(worker.pack([b"ready"]).frames)) == [b"ready"]
    return worker


def test_memory_that_its_worker_has_closed_is_let_go_of_after_a_while(ends: Ends) -> None:
    kept = ends.up([b"header", content(1)])
    num_before = mappings()
    gone = [newcomer(ends.server, b"%d" % index) for index in range(3)]
    assert mappings() == num_before + 6
    late = gone[0].pack([b"late"])  # on its way when its worker closes
    for worker in gone:
        worker.close()
    del worker, gone
    assert mappings() == num_before + 3
    now = 100.0
    ends.server.sweep(now)
    assert ends.server.unpack(b"0", list(late.frames)) == [b"late"]
    ends.server.sweep(now + CLOSED_SECONDS - SWEEP_SECONDS)
    assert mappings() == num_before + 3
    ends.server.sweep(now + CLOSED_SECONDS)
    assert mappings() == num_before
    assert as_bytes(ends.up([b"header", content(2)])) == [b"header", content(2)]  # of a living one nothing is lost
    ends.worker.close()
    ends.server.sweep(now + CLOSED_SECONDS + SWEEP_SECONDS)
    ends.server.sweep(now + 2 * CLOSED_SECONDS + SWEEP_SECONDS)
    assert ends.server.pack(PEER, [b"header", content(2)]).placed == ()
    assert as_bytes(kept) == [b"header", content(1)]  # who views it still has it


def test_what_lies_in_memory_that_cannot_be_opened_any_more_is_lost(ends: Ends) -> None:
    """A refusal would end the worker for good; a loss lets it ask, and be told to register again."""
    ends.server = ServerSide(may_open=True)
    packed = ends.worker.pack([b"header", content(1)])
    ends.worker.close()
    assert ends.server.unpack(PEER, list(packed.frames)) is None


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:mergesfl")


def test_no_more_memories_than_the_limit(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "MAX_MEMORIES", 1)
    worker = newcomer(ends.server, b"another")
    assert ends.server.pack(b"another", [b"pong"]).frames == [b"pong"]  # not taken
    worker.close()


def test_of_few_file_descriptors_most_are_left_for_connections(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (15, 15) if what == resource.RLIMIT_NOFILE else (-1, -1))
    worker = newcomer(ends.server, b"another")
    assert ends.server.pack(b"another", [b"pong"]).frames == [b"pong"]  # not taken: 15 // 8 has been given
    worker.close()


def test_a_worker_that_was_about_to_give_up_and_is_answered_takes_part(ends: Ends) -> None:
    worker, server = WorkerSide(), ServerSide(may_open=True)
    for _ in range(2 * MAX_UNANSWERED):
        worker.unpack([b"before the first offer"])
    server.unpack(PEER, list(worker.pack([b"offer"]).frames))
    for _ in range(MAX_UNANSWERED):
        worker.unpack([b"on its way before the server had read it"])
    assert worker.pack([b"up"]).frames == [b"up"]
    received = worker.unpack(list(server.pack(PEER, [b"down", content(1)]).frames))
    assert as_bytes(received) == [b"down", content(1)]
    del received
    packed = worker.pack([b"up", content(2)])
    assert (len(packed.freed), len(packed.placed)) == (1, 1)
    worker.close()


def test_an_offer_that_could_not_be_sent_is_not_waited_for() -> None:
    worker, server = WorkerSide(), ServerSide(may_open=True)
    worker.unpack([b"welcome"])
    worker.take_back(worker.pack([b"no connection"]))
    for _ in range(2 * MAX_UNANSWERED):
        worker.unpack([b"of who has not heard of it"])
    server.unpack(PEER, list(worker.pack([b"ready"]).frames))
    assert server.pack(PEER, [b"down", content(1)]).placed
    worker.close()


def test_a_server_that_opens_no_memory_takes_no_offer() -> None:
    server = ServerSide(may_open=False)
    worker = newcomer(server, PEER)
    assert server.unpack(PEER, list(worker.pack([b"up", content(1)]).frames)) == [b"up", content(1)]
    assert server.pack(PEER, [b"pong", content(1)]).frames == [b"pong", content(1)]
    worker.close()


@pytest.mark.parametrize("limit", ["address space", "overcommit"])
def test_where_memory_in_reserve_counts_or_may_be_missing_none_is_made(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "address space":
        monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 40, resource.RLIM_INFINITY))
    else:
        monkeypatch.setattr(Path, "read_text", lambda path: "2\n")
    with pytest.raises(OSError, match=limit):
        WorkerSide()


# --- what is refused ---


def refused(frames: list[Frame], side: ServerSide | WorkerSide) -> None:
    """As it came, and no message to the codec."""
    received = side.unpack(PEER, list(frames)) if isinstance(side, ServerSide) else side.unpack(list(frames))
    assert received == frames
    with pytest.raises(RemoteProtocolError, match=r"header of \d+ bytes is no msgpack"):
        decode(received)


def forged(ends: Ends, freed: Sequence[int], *placed: tuple[int, int, int]) -> bytes:
    """A prefix of the worker of these ends before a legal header."""
    known = prefix_of(ends)
    entries = [number for entry in placed for number in entry]
    form = shared_module._numbers(len(freed), len(placed))
    return known.opening + form.pack(len(freed), len(placed), *freed, *entries) + bytes(encode(Pong())[0])


@pytest.mark.parametrize(
    "placed",
    [
        [(1, UP_BEGIN - 64, 64)],
        [(1, 0, 64)],
        [(1, UP_BEGIN, 0)],
        [(1, UP_BEGIN + 8, 64)],
        [(1, UP_BEGIN, AREA_BYTES + 1)],
        [(1, UP_BEGIN + AREA_BYTES, 64)],
        [(1, UP_BEGIN + AREA_BYTES - 64, 65)],
        [(1, MEMORY_BYTES, 1 << 40)],
        [(1, 1 << 63, 64)],
        [(1, UP_BEGIN, (1 << 64) - 1)],
        [(0, UP_BEGIN, 64)],
        [(2, UP_BEGIN, 64)],
        [(1, UP_BEGIN, 64), (1, UP_BEGIN + 64, 64)],
        [(2, UP_BEGIN, 64), (1, UP_BEGIN + 64, 64)],
        [(1, UP_BEGIN, 64), (2, UP_BEGIN, 64)],
        [(1, UP_BEGIN, 64), (65535, UP_BEGIN + 64, 64)],
    ],
)
def test_what_is_no_place_of_a_frame_is_refused(ends: Ends, placed: list[tuple[int, int, int]]) -> None:
    ends.up([b"header", content(1)])
    refused([forged(ends, [], *placed)], ends.server)
    ends.up([b"header", content(1)])
    assert as_bytes(ends.up([b"header", content(2)])) == [b"header", content(2)]  # and nothing is broken by it


def test_a_place_that_is_still_viewed_is_refused_and_one_that_was_never_taken_may_be_freed(ends: Ends) -> None:
    kept = ends.up([b"header", content(1)])
    _, offset, num_bytes = prefix_of(ends).placed[0]
    refused([forged(ends, [], (1, offset, num_bytes))], ends.server)
    assert ends.server.unpack(PEER, [forged(ends, [0, 1, offset, 1 << 60])]) == [encode(Pong())[0]]
    assert as_bytes(kept) == [b"header", content(1)]


def test_a_prefix_that_is_not_whole_or_has_too_many_entries_is_refused(ends: Ends) -> None:
    ends.up([b"header", content(1)])
    prefix = bytes(ends.carried[0][: -len(b"header")])
    for size in range(1, len(prefix)):
        refused([prefix[:size]], ends.server)
    counts = shared_module._COUNTS
    for numbers in ((MAX_PLACED + 1, 0), (0, MAX_PLACED + 1), (65535, 65535)):
        begin = prefix[:OPENING_BYTES] + counts.pack(*numbers)
        refused([begin + bytes(30 * (MAX_PLACED + 1))], ends.server)


def test_who_names_more_places_than_there_are_is_refused(ends: Ends) -> None:
    """A peer that is never told what was let go of may not fill the list of it."""
    places = [(index, UP_BEGIN + 64 * index, 64) for index in range(1, MAX_PLACED + 1)]
    ends.up([b"header", content(1)])
    received = ends.server.unpack(PEER, [forged(ends, [], *places[:-1])])  # beside the one above
    assert received is not None
    assert len(received) == MAX_PLACED
    refused([forged(ends, [], places[0])], ends.server)


def test_a_server_does_not_read_where_it_writes(ends: Ends) -> None:
    ends.down([b"header", content(1)])
    prefix = bytes(ends.carried[0])
    refused([prefix], ends.server)  # its own words


def test_the_right_nonce_of_another_process_or_descriptor_is_another_offer(ends: Ends) -> None:
    ends.up([b"header", content(1)])
    first = bytes(ends.carried[0])
    for place in (1 + NONCE_BYTES, 1 + NONCE_BYTES + 4):  # of pid and fd
        wrong = first[:place] + b"\xff\xff\xff\x7f" + first[place + 4 :]
        assert ends.server.unpack(PEER, [wrong]) is None
        assert ends.worker.unpack([wrong]) == [wrong]
    assert as_bytes(ends.up([b"header", content(2)])) == [b"header", content(2)]


def offer(pid: int, handle: int, nonce: bytes, *placed: int) -> bytes:
    num_placed = len(placed) // 3
    opening = shared_module._OPENING.pack(MARK, nonce, pid, handle)
    return opening + shared_module._numbers(0, num_placed).pack(0, num_placed, *placed) + b"header"


def sealed(num_bytes: int, seals: int, nonce: bytes, name: str = "mergesfl") -> int:
    import fcntl

    handle = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, num_bytes)
    os.pwrite(handle, nonce, 0)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
    return handle


def strange_files(folder: Path, nonce: bytes) -> Iterator[tuple[str, int]]:
    import fcntl

    yield "may shrink", sealed(MEMORY_BYTES, fcntl.F_SEAL_GROW, nonce)
    yield "too small", sealed(MEMORY_BYTES - 1, fcntl.F_SEAL_SHRINK, nonce)
    yield "too large", sealed(MEMORY_BYTES + 1, fcntl.F_SEAL_SHRINK, nonce)
    yield "another nonce", sealed(MEMORY_BYTES, fcntl.F_SEAL_SHRINK, bytes(NONCE_BYTES))
    yield "another name", sealed(MEMORY_BYTES, fcntl.F_SEAL_SHRINK, nonce, "other")
    plain = folder / "plain"
    plain.write_bytes(nonce)
    os.truncate(plain, MEMORY_BYTES)
    yield "a file of a disk", os.open(plain, os.O_RDWR)
    os.mkfifo(folder / "fifo")
    yield "a FIFO", os.open(folder / "fifo", os.O_RDWR)
    yield "a socket", socket.socket().detach()
    yield "a device", os.open("/dev/zero", os.O_RDWR)
    yield "nothing", 1 << 20


def test_what_is_no_sealed_memory_of_the_offered_nonce_is_not_taken(tmp_path: Path) -> None:
    nonce = content(1, NONCE_BYTES)
    for what, handle in strange_files(tmp_path, nonce):
        server = ServerSide(may_open=True)
        assert server.unpack(PEER, [offer(os.getpid(), handle, nonce)]) == [b"header"], what  # an offer not taken
        asked = offer(os.getpid(), handle, nonce, 1, UP_BEGIN, LARGE)
        assert server.unpack(PEER, [asked]) is None, what
        assert server.pack(PEER, [b"pong", content(1)]).frames == [b"pong", content(1)], what
        if handle != 1 << 20:
            os.close(handle)
    import fcntl

    handle = sealed(MEMORY_BYTES, fcntl.F_SEAL_SHRINK, nonce)  # and this one is
    asked = offer(os.getpid(), handle, nonce, 1, UP_BEGIN, LARGE)
    assert as_bytes(ServerSide(may_open=True).unpack(PEER, [asked])) == [b"header", bytes(LARGE)]
    os.close(handle)


def test_a_stranger_makes_the_server_look_at_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask a file system that hangs for no more than what a file is would hold the server."""
    plain = tmp_path / "mergesfl"
    plain.write_bytes(bytes(NONCE_BYTES))
    handle = os.open(plain, os.O_RDWR)
    server = ServerSide(may_open=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *_: pytest.fail("opened"))
        assert server.unpack(PEER, [offer(os.getpid(), handle, bytes(NONCE_BYTES))]) == [b"header"]
    os.close(handle)


def test_no_memory_can_be_opened_before_it_has_its_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def draw(num_bytes: int) -> bytes:
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(path.readlink()).startswith("/memfd:mergesfl"):
                    tried.append(int(path.name))
        for handle in tried:
            with pytest.raises((OSError, ValueError)):
                open_memory((os.getpid(), handle), MEMORY_BYTES, bytes(NONCE_BYTES))
        return content(7, num_bytes)

    monkeypatch.setattr(os, "urandom", draw)
    memory, handle = make_memory(MEMORY_BYTES)
    assert handle in tried
    assert memory[:NONCE_BYTES] == content(7, NONCE_BYTES)
    open_memory((os.getpid(), handle), MEMORY_BYTES, content(7, NONCE_BYTES))
    os.close(handle)


def test_memory_of_another_user_is_not_taken(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    ends.up([b"header", content(1)])
    assert ServerSide(may_open=True).unpack(PEER, list(ends.carried)) is None


@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 2))
def test_whatever_bytes_arrive_a_message_is_handed_up(noise: bytes, where: int, num_frames: int) -> None:
    ends = FUZZED
    ends.up([b"header", content(1)])
    first = bytes(ends.carried[0])
    for damaged in (MARK + noise, first[:where] + noise + first[where + len(noise) :], first[:where] + noise):
        frames = [damaged, *[b"frame"] * num_frames]
        received = ends.server.unpack(b"fuzz", list(frames))
        assert received is None or received == frames or len(received) >= 1 + num_frames
        ends.worker.unpack(list(frames))


FUZZED = Ends()


# --- over sockets, between processes ---


def exchange(server: ZmqServer, worker: ZmqWorker, frames: list[bytes]) -> None:
    """Up and down again, as it was sent."""
    while not worker.send(frames):
        worker.recv(0.01)
    received = server.recv(PATIENCE_SECONDS)
    assert received is not None
    peer, arrived = received
    assert as_bytes(arrived) == frames
    server.send(peer, arrived)
    answer = worker.recv(PATIENCE_SECONDS)
    assert answer is not None
    assert as_bytes(answer) == frames


def crossed(transport: str, settings: LinkSettings, may_open: bool = True) -> tuple[list[int], list[int]]:
    """How many large frames of each of four messages, which have one, cross the socket, up and down.

    Looked at from outside: a plain ROUTER in the place of the server answers with the prefix of a real one.
    """
    up, down = [], []
    with local_address(transport) as address, zmq.Context() as context:
        router = context.socket(zmq.ROUTER)
        router.rcvtimeo = int(1000 * PATIENCE_SECONDS)
        router.bind(address)
        worker = ZmqWorker(router.getsockopt_string(zmq.LAST_ENDPOINT), settings)
        side = ServerSide(may_open=may_open)
        try:
            for _ in range(4):
                while not worker.send([b"header", content(1)]):
                    worker.recv(0.01)
                peer, *frames = router.recv_multipart()
                assert as_bytes(side.unpack(peer, list(frames))) == [b"header", content(1)]
                up.append(sum(map(len, frames)) // LARGE)
                packed = side.pack(peer, [b"answer", content(2)])
                router.send_multipart([peer, *packed.frames])
                assert as_bytes(worker.recv(PATIENCE_SECONDS)) == [b"answer", content(2)]
                down.append(sum(len(memoryview(frame)) for frame in packed.frames) // LARGE)
        finally:
            worker.close()
            router.close(0)
    return up, down


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_large_frames_do_not_cross_the_socket_between_two_ends_on_one_machine(transport: str) -> None:
    assert crossed(transport, QUICK) == ([1, 1, 0, 0], [1, 0, 0, 0])  # not yet offered, offered, agreed


def test_a_worker_offers_no_memory_to_a_server_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(host: str) -> bool:
        asked.append(host)
        return False

    monkeypatch.setattr(zeromq_module, "is_of_this_machine", refuse)
    assert crossed("tcp", QUICK) == ([1] * 4, [1] * 4)
    assert asked == ["127.0.0.1"]  # of who has answered, and once


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_who_wants_to_know_what_a_socket_does_gets_all_through_it(transport: str) -> None:
    socket_alone = dataclasses.replace(QUICK, shares_memory=False)
    assert crossed(transport, socket_alone) == ([1] * 4, [1] * 4)
    with local_address(transport) as address:
        for of_server, of_worker in ((QUICK, socket_alone), (socket_alone, QUICK)):
            server = ZmqServer(address, of_server)
            worker = ZmqWorker(server.address, of_worker)
            num_before = mappings()
            try:
                for _ in range(4):
                    exchange(server, worker, [b"header", content(1)])
                assert mappings() == num_before + (of_worker is QUICK)  # made and not taken
            finally:
                worker.close()
                server.close()


def test_an_offer_behind_a_forwarded_port_of_another_machine_is_not_taken() -> None:
    """As of a worker that speaks to a local port of ssh -L: what it names is nothing, or somebody else's, here."""
    crossing = crossed("tcp", QUICK, may_open=False)
    assert crossing == ([1] * 4, [1] * 4)


def test_addresses_of_this_machine() -> None:
    for own in ("127.0.0.1", "127.1.2.3"):
        assert is_of_this_machine(own)
    for other in ("192.0.2.1", "203.0.113.7", "2001:db8::1", "", "None", "localhost", "127.0.0.1:5555"):
        assert not is_of_this_machine(other), other
    with contextlib.suppress(OSError):  # a machine may have no IPv6
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
        assert is_of_this_machine("::1")


def place_of_next(side: WorkerSide | SharedMemory) -> int:
    """Where the next large frame would lie; it is not sent."""
    packed = side.pack([b"header", content(1)])
    side.take_back(packed)
    return packed.placed[0]


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fails(server: ZmqServer, peer: bytes, frames: list[bytes], why: str) -> bool:
    try:
        server.send(peer, frames)
    except TransportError as error:
        return why in str(error)
    return False


def test_what_a_server_cannot_send_takes_no_place() -> None:
    """It lies in the memory before anybody knows that the peer is full or gone."""
    few = dataclasses.replace(QUICK, max_queued_messages=1)
    server, large = ZmqServer("tcp://127.0.0.1:*", few), [b"header", content(1)]
    worker = ZmqWorker(server.address, few)
    for _ in range(3):
        exchange(server, worker, large)
    ((peer, (memory, _)),) = server._shared._memories.items()
    crossing = [b"header", *[bytes(LARGE - 1)] * 64]
    for _ in range(3):  # once its queue is full, the kernel may take some more
        until(lambda: fails(server, peer, crossing, "does not read"))
        time.sleep(0.1)
    place = place_of_next(memory)
    assert all(fails(server, peer, large, "does not read") for _ in range(3))
    assert place_of_next(memory) == place
    worker.close()
    until(lambda: fails(server, peer, [b"header"], "is unreachable"))
    assert all(fails(server, peer, large, "is unreachable") for _ in range(3))
    assert place_of_next(memory) == place
    server.close()


def test_what_a_worker_cannot_send_takes_no_place() -> None:
    """Neither of messages without a connection, nor of one in whose middle it breaks."""
    server, large = ZmqServer("tcp://127.0.0.1:*", QUICK), [b"header", content(1), b"small"]
    worker = ZmqWorker(server.address, QUICK)
    for _ in range(3):
        exchange(server, worker, large)
    side = worker._shared or pytest.fail("no memory")
    place, send = place_of_next(side), worker._send

    def breaks(frame: Frame, flags: int, copy: bool) -> object:
        if flags & zmq.SNDMORE == 0:  # after the header, which names the place
            server.close()
            time.sleep(0.3)
        return send(frame, flags, copy)

    worker._send = breaks
    assert not worker.send(large)
    worker._send = send
    assert place_of_next(side) == place
    assert not any(worker.send(large) for _ in range(3))
    assert place_of_next(side) == place
    worker.close()


def test_a_message_that_does_not_tell_where_it_came_from_makes_no_memory() -> None:
    worker = ZmqWorker("tcp://127.0.0.1:9", QUICK)
    worker._hear_of(zmq.Frame(b"welcome"))
    assert worker._shared is None
    worker.close()


KILLED = """
import sys, time
from mergesfl.transport import connect
worker = connect(sys.argv[1])
def say(frames):
    while not worker.send(frames):
        time.sleep(0.01)
for _ in range(3):
    say([b"hello", bytes(100_000)])
    worker.recv(20.0)
say([b"last", bytes([7]) * 1_000_000])
time.sleep(60)
"""


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_what_a_killed_worker_has_sent_is_still_there_and_its_memory_goes_with_it(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_before = mappings()
    with local_address(transport) as address:
        server = ZmqServer(address, QUICK)
        command = [sys.executable, "-c", KILLED, server.address]
        with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
            try:
                for _ in range(3):
                    peer, frames = server.recv(PATIENCE_SECONDS) or pytest.fail("nothing came")
                    server.send(peer, [b"answer", *frames[1:]])
                peer, frames = server.recv(PATIENCE_SECONDS) or pytest.fail("nothing came")
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert as_bytes(frames) == [b"last", bytes([7]) * 1_000_000]
                assert mappings() == num_before + 1
                monkeypatch.setattr(shared_module, "SWEEP_SECONDS", 0.0)
                monkeypatch.setattr(shared_module, "CLOSED_SECONDS", 0.0)
                server._shared._next_sweep_seconds = 0.0
                worker = ZmqWorker(server.address, QUICK)
                for _ in range(3):
                    exchange(server, worker, [b"next", content(1)])
                assert mappings() == num_before + 3  # two of the new worker, in this process, and one that is viewed
                del frames
                assert mappings() == num_before + 2
                worker.close()
            finally:
                process.kill()
                server.close()
