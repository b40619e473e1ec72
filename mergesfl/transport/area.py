"""One direction of the memory that worker and server have in common (shared.py): which places are taken. [ours]"""

from __future__ import annotations

import bisect

from mergesfl.protocol.layout import Frame

# Only what has been used once takes memory: eight parts of a step (mergesfl/parts.py) of 32 MiB.
AREA_BYTES = 1 << 28
ALIGNMENT_BYTES = 64  # of every frame: a cache line, more than any element type wants
MAX_PLACED = 256  # frames at a time


class Area:
    """Where one end puts what it sends: first fit, lowest place first, so that what is used stays small and warm."""

    def __init__(self, memory: memoryview, begin: int) -> None:
        self._memory = memory
        self._begin, self._end = begin, begin + AREA_BYTES
        self._taken: list[tuple[int, int]] = []  # (begin, end) in order

    def put(self, frame: Frame, num_bytes: int) -> int | None:
        """Copies a frame of so many bytes; where it lies, or None: no room."""
        begin = self._begin
        if len(self._taken) >= MAX_PLACED:
            return None
        index = 0
        for taken_begin, taken_end in self._taken:
            if begin + num_bytes <= taken_begin:
                break
            begin = taken_end
            index += 1
        end = begin + num_bytes
        if end > self._end:
            return None
        self._memory[begin:end] = memoryview(frame).cast("B")
        self._taken.insert(index, (begin, end + -end % ALIGNMENT_BYTES))
        return begin

    def free(self, begin: int) -> None:
        """The frame that was put there is not needed any more; of an unknown one nothing happens."""
        index = bisect.bisect_left(self._taken, (begin, 0))
        if index < len(self._taken) and self._taken[index][0] == begin:
            del self._taken[index]
