"""How features leave a worker: encoded and sent by the computing thread, or by another while it computes the next part.

The other thread encodes and sends one message after the other. While it has something to do the connection is its own,
for a socket is used by one thread at a time; `settle` takes it back. Both make the same bytes, in the same order.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import Features
from workers.link import Link

# Numbers in a message: below, two threads of so short operations cost each other what one of them saves; measured for
# steps of HAR with 4 to 64 samples (benchmarks/LOG.md, 2026-11-26). [ours]
FEWEST_NUMBERS_BESIDE = 1 << 13


class Sender:
    """The way out of one round, and a context: at its end no thread is left.

    Args:
        link: the connection; the other thread's from `send_beside` until `settle`.
        codecs: of the run.
        worker_id: whose features these are.
        has_thread: whether there is another thread.
    """

    def __init__(self, link: Link, codecs: RunCodecs, worker_id: str, has_thread: bool) -> None:
        self._link = link
        self._codecs = codecs
        self._worker_id = worker_id
        # Its thread begins with the first message. Without a codec there is nothing to do that would be worth one.
        wanted = has_thread and codecs.changes_features
        self._executor = ThreadPoolExecutor(1, f"sender-{worker_id}") if wanted else None
        self._last: Future[None] | None = None  # of what was handed over: done when all of it is

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread. What it has not sent by now is not wanted any more: an error has ended the round."""
        if self._executor is None:
            return
        if self._last is not None and not self._last.done():
            self._link.abandon()
        self._executor.shutdown(cancel_futures=True)
        self._last = None  # its error knows this round's frames, and they this sender

    def may_send_beside(self, message: Features) -> bool:
        """Whether there is another thread, and enough for it to do."""
        return self._executor is not None and message.features.size >= FEWEST_NUMBERS_BESIDE

    def encode(self, message: Features) -> Features:
        """As it is sent."""
        return self._codecs.encode_features(message, self._worker_id)

    def send(self, encoded: Features) -> None:
        """Sends it, when all that was handed over is out. Raises like `settle`."""
        self.settle()
        self._link.send(encoded)

    def send_beside(self, message: Features) -> None:
        """Hands it over, not encoded yet, and returns at once. Raises like `settle`, of what was handed over before."""
        assert self._executor is not None, "there is another thread"
        if self._last is not None and self._last.done():
            self.settle()
        try:
            self._last = self._executor.submit(self._encode_and_send, message, self._last)
        except RuntimeError:  # the system has no thread for us
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
            self.send(self.encode(message))

    def settle(self) -> None:
        """Waits until all that was handed over is out, or one of it has failed. Raises like Link.send."""
        last, self._last = self._last, None
        try:
            if last is not None:
                last.result()
        finally:
            del last  # else its error would know this frame, and the frame it

    def _encode_and_send(self, message: Features, before: Future[None] | None) -> None:
        try:
            if before is not None:
                before.result()  # done, as there is one thread; where it failed, what follows must not go out
        finally:
            del before
        self._link.send(self.encode(message))
