"""Endless batches of exactly d samples from a worker's own data, reproducible and resumable.

Legend: n samples of the worker, d samples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mergesfl.data.dataset import Array, IntArray, Scale
from mergesfl.errors import CheckpointError, ConfigError


class Batches(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """Batch after batch, without end; every epoch is a fresh permutation of the worker's samples.

    A batch that reaches the end of an epoch is filled from the next one, so every batch holds exactly d samples, also
    when the worker has fewer than d: then samples repeat within it, each about equally often.
    """

    def __init__(
        self,
        split_x: Array,
        split_y: IntArray,
        batch_size: int,
        generator: np.random.Generator,
        scale: Scale,
        augment: bool,
    ) -> None:
        """Takes over the generator: every draw of order and augmentation comes from it.

        Args:
            split_x: (n, *sample_shape) stored samples, see Split.x.
            split_y: (n,) int64 labels.
            batch_size: d in samples, at least 1.
            generator: the only source of chance.
            scale: how stored numbers become input.
            augment: whether to apply the scale's augmentation (training) or not.

        Raises:
            ConfigError: no samples, a batch size below 1, or counts that differ.
        """
        if batch_size < 1:
            raise ConfigError(f"batch size is {batch_size}, expected at least 1")
        if len(split_y) == 0:
            raise ConfigError("no batches can be drawn from 0 samples: leave this worker out of the plan")
        if len(split_x) != len(split_y):
            raise ConfigError(f"{len(split_x)} samples and {len(split_y)} labels, expected one label per sample")
        self._x = split_x
        self._y = split_y
        self._batch_size = batch_size
        self._generator = generator
        self._scale = scale
        self._augment = augment and scale.augments
        self._rest: IntArray = np.empty(0, dtype=np.int64)  # rows of the present epoch that are still to come

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Input (d, *sample_shape) float32 and labels (d,) int64, both owning their memory."""
        rows = self._next_rows()  # (d,)
        stored = self._x[rows]  # (d, *sample_shape), a copy
        if self._augment:
            stored = self._scale.augmented(stored, self._generator)
        return self._scale.to_input(stored), torch.from_numpy(np.array(self._y[rows], dtype=np.int64))

    def _next_rows(self) -> IntArray:
        pieces: list[IntArray] = []
        num_missing = self._batch_size
        while num_missing > 0:
            if len(self._rest) == 0:
                self._rest = self._generator.permutation(len(self._y)).astype(np.int64)
            pieces.append(self._rest[:num_missing])
            self._rest = self._rest[num_missing:]
            num_missing -= len(pieces[-1])
        return np.concatenate(pieces)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain numbers and lists, fit for JSON with numpy's default bit generator."""
        return {
            "num_samples": len(self._y),
            "rest": [int(row) for row in self._rest],
            "generator": copy.deepcopy(dict(self._generator.bit_generator.state)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; the batches that follow are the same to the bit.

        Raises CheckpointError when the state is incomplete, or of other data or another kind of generator.
        """
        try:
            num_samples, rest = int(state["num_samples"]), np.array(state["rest"], dtype=np.int64).reshape(-1)
            generator = dict(state["generator"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"state of a batch stream is damaged ({error!r}): start from another") from error
        if num_samples != len(self._y):
            raise CheckpointError(f"state of a batch stream over {num_samples} samples, but this has {len(self._y)}")
        if len(np.unique(rest)) != len(rest) or (rest < 0).any() or (rest >= num_samples).any():
            raise CheckpointError(f"state of a batch stream: rows outside 0..{num_samples - 1} or twice")
        try:
            self._generator.bit_generator.state = copy.deepcopy(generator)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"state of a batch stream: its generator does not fit ({error!r})") from error
        self._rest = rest
