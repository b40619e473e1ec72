"""What a loader is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_SIZE_PIXELS = 144  # IMAGE-100 of the paper's experiments: 3 x 144 x 144 [code]


@dataclass(frozen=True)
class Request:
    """One data set to load.

    Attributes:
        root: the file or folder that holds it.
        download: whether it may be fetched from the network.
        image_size_pixels: height and width that images of any size are brought to (folder only).
    """

    root: Path
    download: bool = False
    image_size_pixels: int = IMAGE_SIZE_PIXELS
