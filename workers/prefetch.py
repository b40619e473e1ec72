"""The next batch, drawn while the worker waits for a gradient instead of when it is wanted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

Batch = tuple[Tensor, Tensor]  # x (d, *sample), y (d,)


class Prefetched(Iterator[Batch]):
    """The same batches in the same order, at most one of them drawn ahead.

    Args:
        batches: where they come from, on the device already.
        num_batches: how many are wanted: after so many none is drawn ahead.
    """

    def __init__(self, batches: Iterator[Batch], num_batches: int) -> None:
        self._batches = batches
        self._num_wanted = num_batches
        self._ahead: Batch | None = None

    def prepare(self) -> None:
        """Draws the next one now, if it is wanted and not there yet."""
        if self._ahead is None and self._num_wanted > 0:
            self._ahead = next(self._batches)

    def __next__(self) -> Batch:
        """The next one."""
        batch = self._ahead if self._ahead is not None else next(self._batches)
        self._ahead = None
        self._num_wanted -= 1
        return batch
