"""What a loader is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergesfl.data.dataset import IntArray, Split

IMAGE_SIZE_PIXELS = 144  # IMAGE-100 of the paper's experiments: 3 x 144 x 144 [code]


@dataclass(frozen=True)
class Request:
    """One data set to load.

    Attributes:
        root: the file or folder that holds it.
        download: whether it may be fetched from the network.
        image_size_pixels: height and width that images of any size are brought to (folder only).
        train_only: what a worker brings: the test split is not looked for and is empty; the training split may be empty
            (npz, folder, speech).
        choose: from the labels of all training samples (n,) to the rows that are wanted; None: all of them.
    """

    root: Path
    download: bool = False
    image_size_pixels: int = IMAGE_SIZE_PIXELS
    train_only: bool = False
    choose: Callable[[IntArray], IntArray] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The splits to read."""
        return ("train",) if self.train_only else ("train", "test")

    def rows(self, labels: IntArray) -> IntArray:
        """Which of the training samples with these labels (n,) are wanted, as row numbers."""
        return np.arange(len(labels)) if self.choose is None else self.choose(labels)

    def share_of(self, train: Split) -> Split:
        """The wanted samples of a training split that was read whole."""
        return train if self.choose is None else train.take(self.choose(train.y))
