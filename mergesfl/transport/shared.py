"""Memory that a worker and the server of one machine have in common: large frames lie there and not in the socket.

A socket costs the kernel's two copies of every byte; what lies in common memory is copied once, by its sender, and read
where it lies. On Linux, between processes of one user, over ipc:// and over tcp:// to an address of this machine; else,
and whenever there is no room, frames take the socket. No bit of any result depends on it. It goes by itself; who wants
to know what a socket does turns it off (LinkSettings.shares_memory).

The memory is the worker's (sealed.py), one for each endpoint. One half is written by the worker and read by the server
(up), the other the other way round (down):

    0                     UP_BEGIN            UP_BEGIN + AREA_BYTES      MEMORY_BYTES
    | nonce, u8 opened    | up                | down                       |

Once it has heard of the server, the worker offers its memory in front of its headers: nonce, process, file descriptor.
A server that can open /proc/PID/fd/FD and finds the nonce there has the same memory, and says so by the same opening in
front of its own next header; then both use it. Over TCP a worker offers it to addresses of its own machine only. What
proves that the server is there, too, and no forwarded port of another machine, is the nonce, which is random: elsewhere
nobody finds it, whoever hears it. Every prefix repeats the offer, so that a server that was started anew can read what
comes. It finds the byte `opened` set by its predecessor, whose frames may still be read, and writes nothing. A prefix
is, little-endian,

    u8 0xC1 (which begins no msgpack) | 16 bytes nonce | u32 pid | u32 fd | u16 freed | u16 placed
    u64 offset                         of each frame that the sender has let go of: its place is free again
    u16 index, u64 offset, u64 bytes   of each frame of the message that lies in the memory, in their order

A frame is let go of when nothing of this process views it any more; the next message to its sender says so, and its
place is used again. The places of messages that are lost with a connection or a server stay taken until the worker's
endpoint is closed. All numbers are checked by who reads them: over TCP anybody may send some. What is read in place may
be changed by the peer meanwhile: who could do so runs as the same user and could as well write into this process's
files. What is small travels in the header (protocol/layout.py), which is a copy.

All [ours].
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import resource
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergesfl.protocol.layout import Frame, frame_bytes
from mergesfl.transport.area import ALIGNMENT_BYTES, AREA_BYTES, MAX_PLACED, Area
from mergesfl.transport.sealed import NONCE_BYTES, Identity, Source, identity_of, make_memory, open_memory

MARK = b"\xc1"
UP_BEGIN = mmap.PAGESIZE  # both ends are on one machine
MEMORY_BYTES = UP_BEGIN + 2 * AREA_BYTES
# Below, a frame costs the socket no more than its entry here (benchmarks/LOG.md, 2026-11-26); above, it is rather a
# state than a batch, which the server has once and would have here once per worker.
FEWEST_BYTES, MOST_BYTES = 1 << 15, 1 << 25
MAX_UNANSWERED = 8  # messages of a server after the first offer, before the worker stops: some were on the way [ours]
# Of one server; who comes later uses the socket. Each takes a file descriptor of the server, beside the one of the
# connection, and libzmq ends the process where there is none left: an eighth of them at most. [ours]
MAX_MEMORIES = 1024
# What a worker has sent before it closed may be unread for a while yet. [ours]
SWEEP_SECONDS, CLOSED_SECONDS = 1.0, 10.0

_OPENING = struct.Struct(f"<c{NONCE_BYTES}sII")
_COUNTS = struct.Struct("<HH")

Bytes = NDArray[np.uint8]

log = logging.getLogger("transport")


@functools.lru_cache(64)
def _numbers(num_freed: int, num_placed: int) -> struct.Struct:
    """What follows the opening."""
    return struct.Struct(f"<HH{num_freed}Q{num_placed * 'HQQ'}")


class Packed(NamedTuple):
    """A message as it is sent: its frames for the socket, and what to take back if it cannot be sent."""

    frames: Sequence[Frame]
    placed: Sequence[int] = ()  # offsets
    freed: Sequence[int] = ()


class Prefix(NamedTuple):
    """What stands in front of a header, without the opening, and the header."""

    freed: tuple[int, ...]  # offsets
    placed: tuple[int, ...]  # index, offset, bytes, and so on
    header: bytes

    @staticmethod
    def of(first: bytes) -> Prefix | None:
        """None: not a whole one."""
        if len(first) < _OPENING.size + _COUNTS.size:
            return None
        num_freed, num_placed = _COUNTS.unpack_from(first, _OPENING.size)
        if num_freed > MAX_PLACED or num_placed > MAX_PLACED:
            return None
        form = _numbers(num_freed, num_placed)
        begin = _OPENING.size + form.size
        if len(first) < begin:
            return None
        numbers = form.unpack_from(first, _OPENING.size)
        return Prefix(numbers[2 : 2 + num_freed], numbers[2 + num_freed :], first[begin:])


class SharedMemory:
    """The memory of one worker, as one of the two ends sees it; used by one thread at a time.

    Args:
        memory: whole.
        source: (pid, fd) of the memory, as the worker says.
        sends_up: this is the worker's end.
        may_place: this end may use it already.
    """

    def __init__(self, memory: mmap.mmap, source: Source, sends_up: bool, may_place: bool) -> None:
        self.opening = _OPENING.pack(MARK, memory[:NONCE_BYTES], *source)  # of every prefix
        self.source = source
        self.may_place = may_place
        self._has_told = False  # the other end that it may; until then every header has a prefix
        up, down = UP_BEGIN, UP_BEGIN + AREA_BYTES
        self._area = Area(memoryview(memory), up if sends_up else down)
        self._memory = memoryview(memory)
        self._read_begin = down if sends_up else up
        self._views: dict[int, weakref.ref[Bytes]] = {}  # by offset: what the callbacks hang on
        self._let_go: deque[int] = deque()  # filled by whatever thread drops the last view

    def pack(self, frames: Sequence[Frame]) -> Packed:
        """The message, with a prefix if there is anything to say; large frames are in the memory, if they find room."""
        let_go = self._let_go
        if len(frames) == 1 and self._has_told and not let_go:
            return Packed(frames)
        freed: list[int] = []
        while let_go and len(freed) < MAX_PLACED:
            freed.append(let_go.popleft())
        left: list[Frame] = [frames[0]]
        placed: list[int] = []
        entries: list[int] = []
        for index in range(1, len(frames)):
            frame, offset = frames[index], None
            if self.may_place and FEWEST_BYTES <= (num_bytes := frame_bytes(frame)) <= MOST_BYTES:
                offset = self._area.put(frame, num_bytes)
            if offset is None:
                left.append(frame)
            else:
                placed.append(offset)
                entries += (index, offset, num_bytes)
        if freed or placed or not self._has_told:
            self._has_told = self.may_place
            counts = len(freed), len(placed)
            left[0] = b"".join((self.opening, _numbers(*counts).pack(*counts, *freed, *entries), frames[0]))
        return Packed(left, placed, freed)

    def take_back(self, packed: Packed) -> None:
        """The message could not be sent."""
        self._has_told = False
        self._let_go.extendleft(reversed(packed.freed))
        for offset in packed.placed:
            self._area.free(offset)

    def unpack(self, frames: list[Frame]) -> list[Frame]:
        """The message without its prefix, frames in the memory as views; as it came if that names what is no place.

        Args:
            frames: a message that begins with the opening.
        """
        prefix = Prefix.of(bytes(frames[0]))
        if prefix is None:
            return frames
        placed = prefix.placed
        views = self._views
        if len(views) + len(self._let_go) + len(placed) // 3 > MAX_PLACED:
            return frames  # more than the sender has places
        whole: list[Frame] = [prefix.header]
        begin, end = self._read_begin, self._read_begin + AREA_BYTES
        num_plain = 1  # frames that are in the message already
        for place in range(0, len(placed), 3):
            index, offset, num_bytes = placed[place : place + 3]
            if not (begin <= offset and 0 < num_bytes <= end - offset) or offset % ALIGNMENT_BYTES or offset in views:
                return frames
            while len(whole) < index and num_plain < len(frames):
                whole.append(frames[num_plain])
                num_plain += 1
            if len(whole) != index:
                return frames
            whole.append(self._view(offset, num_bytes))
        if num_plain < len(frames):
            whole += frames[num_plain:]
        for offset in prefix.freed:
            self._area.free(offset)
        return whole

    def _view(self, offset: int, num_bytes: int) -> memoryview:
        # An array straight of the memory: numpy makes the base of an array of an array's part the whole array, and what
        # was made of this one would not hold it. Of memory that is read-only by itself torch could borrow nothing.
        view = np.frombuffer(self._memory, np.uint8, num_bytes, offset)
        view.setflags(write=False)
        self._views[offset] = weakref.ref(view, functools.partial(_let_go, self._views, self._let_go, offset))
        return view.data


def _let_go(views: dict[int, weakref.ref[Bytes]], offsets: deque[int], offset: int, _: object) -> None:
    """The last that viewed the frame is gone."""
    del views[offset]
    offsets.append(offset)


class WorkerSide:
    """The memory of a worker's endpoint, made here.

    Raises OSError: this system has no such memory, or gives none.
    """

    def __init__(self) -> None:
        memory, handle = make_memory(MEMORY_BYTES)
        self._shared = SharedMemory(memory, (os.getpid(), handle), sends_up=True, may_place=False)
        self._close = weakref.finalize(self, os.close, handle)
        self._is_offering = False  # not before it has heard of a server, nor when that one has not answered for long
        self._has_offered = False
        self._num_unanswered = 0

    def close(self) -> None:
        """Who has the memory keeps it, nobody else gets it."""
        self._close()

    def pack(self, frames: Sequence[Frame]) -> Packed:
        """The message as it is sent."""
        if not self._is_offering:
            return Packed(frames)
        self._has_offered = True
        return self._shared.pack(frames)

    def take_back(self, packed: Packed) -> None:
        """The message could not be sent."""
        self._has_offered = False  # the next one says it again
        self._shared.take_back(packed)

    def unpack(self, frames: list[Frame]) -> list[Frame]:
        """The message as it was sent; as it came, if its prefix is no legal one: the codec refuses that."""
        if frames[0][: _OPENING.size] == self._shared.opening:
            self._shared.may_place = self._is_offering = True
            return self._shared.unpack(frames)
        if not self._shared.may_place:
            self._num_unanswered += self._has_offered
            self._is_offering = self._num_unanswered < MAX_UNANSWERED
        return frames


class ServerSide:
    """The memories of all workers that a server's endpoint has opened.

    Args:
        may_open: takes offers. Else they may arrive all the same, and all else is in the socket.
    """

    def __init__(self, may_open: bool) -> None:
        self._may_open = may_open
        self._memories: dict[bytes, tuple[SharedMemory, Identity]] = {}
        self._closed_since: dict[bytes, float] = {}
        self._next_sweep_seconds = 0.0

    def pack(self, peer: bytes, frames: Sequence[Frame]) -> Packed:
        """The message as it is sent to this peer."""
        known = self._memories.get(peer)
        return Packed(frames) if known is None else known[0].pack(frames)

    def take_back(self, peer: bytes, packed: Packed) -> None:
        """The message could not be sent."""
        if peer in self._memories:
            self._memories[peer][0].take_back(packed)

    def unpack(self, peer: bytes, frames: list[Frame]) -> list[Frame] | None:
        """The message as this peer has sent it; as it came, if its prefix is no legal one: the codec refuses that.

        None: it lies in memory that cannot be opened (any more), and is lost. Its worker is gone, or has spoken with
        a server before this one, and will find that its session is unknown.
        """
        if frames[0][:1] != MARK:
            return frames
        first = bytes(frames[0])
        known = self._memories.get(peer)
        if known is None or not first.startswith(known[0].opening):
            prefix = Prefix.of(first)
            if prefix is None:
                return frames
            known = self._opened(first) if self._may_open else None
            if known is None:  # no more than an offer, which is not taken
                return None if prefix.placed else [prefix.header, *frames[1:]]
            self._memories[peer] = known
        return known[0].unpack(frames)

    def sweep(self, now_seconds: float) -> None:
        """To be called often: lets go, from time to time, of memory that its worker has closed some time ago."""
        if now_seconds < self._next_sweep_seconds:
            return
        self._next_sweep_seconds = now_seconds + SWEEP_SECONDS
        for peer, (shared, identity) in list(self._memories.items()):
            if identity_of(shared.source) == identity:
                self._closed_since.pop(peer, None)
            elif now_seconds - self._closed_since.setdefault(peer, now_seconds) >= CLOSED_SECONDS:
                del self._memories[peer], self._closed_since[peer]

    def _opened(self, first: bytes) -> tuple[SharedMemory, Identity] | None:
        _, nonce, pid, handle = _OPENING.unpack_from(first)
        if len(self._memories) >= min(MAX_MEMORIES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8):
            return None
        try:
            memory, identity = open_memory((pid, handle), MEMORY_BYTES, nonce)
        except (OSError, ValueError) as error:  # of another container or user, of nobody ...
            log.debug("no memory in common with process %d: %s", pid, error)
            return None
        was_opened, memory[NONCE_BYTES] = memory[NONCE_BYTES], 1
        return SharedMemory(memory, (pid, handle), sends_up=False, may_place=not was_opened), identity
