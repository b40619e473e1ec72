"""What an endpoint can do, whatever carries the frames: TCP and IPC (zeromq.py) or queues in one process (memory.py).

A message on the wire is a list of frames: bytes-like objects, the header first (see mergesfl.protocol.codec). Small
frames are copied when they are sent; large ones may be LENT: whoever sends them never changes their memory again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mergesfl.protocol.layout import Frame, frame_bytes

Frames = Sequence[Frame]

LEND_BYTES = 1 << 16  # frames of this size and more may be lent, and are within one process [ours]


def carried(frame: Frame) -> Frame:
    """What arrives in the same process of a frame that was sent: itself, or a copy if it is small and may change."""
    return frame if type(frame) is bytes or frame_bytes(frame) >= LEND_BYTES else bytes(frame)


class ServerEndpoint(Protocol):
    """The parameter server's end: one endpoint, many peers. Not thread-safe: one thread owns it."""

    @property
    def address(self) -> str:
        """The address workers connect to, with the real port when port * or 0 was asked for."""

    def send(self, peer: bytes, frames: Frames) -> None:
        """Queues one message for one peer. Frames of LEND_BYTES and more may be lent: do not change them.

        Raises TransportError at once when the peer is gone or its queue is full.
        """

    def recv(self, timeout_seconds: float) -> tuple[bytes, list[Frame]] | None:
        """The next message and the peer it came from; None when the time is over (0: only look)."""

    def close(self) -> None:
        """Closes the endpoint; messages already queued get up to the linger time to leave."""


class WorkerEndpoint(Protocol):
    """A worker's end: one connection to the parameter server, which may not be there yet."""

    def send(self, frames: Frames) -> bool:
        """Queues one message, large frames lent; False when there is no connection now (try again)."""

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        """The next message; None when the time is over (0: only look)."""

    def close(self) -> None:
        """Closes the connection; messages already queued get up to the linger time to leave."""
