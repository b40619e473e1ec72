"""CIFAR-10 (A. Krizhevsky, 2009): through torchvision's own class, or from one numpy archive of uint8 images.

Training images are mirrored and cropped with a padding of 4 [code].
"""

from __future__ import annotations

import numpy as np

from mergesfl.data.dataset import Array, Dataset, Scale, make_split
from mergesfl.data.npz import channels_first, members, read_npz
from mergesfl.data.optional import require
from mergesfl.data.request import Request
from mergesfl.errors import DataError

SAMPLE_SHAPE = (3, 32, 32)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Mean and deviation of pixel / 255 per channel over the 50,000 training images.
SCALE = Scale(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), flip=True, crop_padding_pixels=4)
FOLDER_NAME = "cifar-10-batches-py"
ARCHIVE_NAME = "cifar10.npz"


def load_cifar10(request: Request) -> Dataset:
    """CIFAR-10. Raises DataError, or ConfigError when torchvision is needed and missing.

    torchvision checks the MD5 of every pickled batch before it reads it, so a changed file is refused, not unpickled.
    """
    root = request.root
    path = root if root.is_file() else root / ARCHIVE_NAME
    if path.is_file():
        arrays = read_npz(path, members(request))
        parts = {part: (channels_first(arrays[f"X_{part}"]), arrays[f"y_{part}"]) for part in request.parts}
        for part, (images, _) in parts.items():
            if images.dtype != np.uint8:
                raise DataError(f"{path}: X_{part} of type {images.dtype}, expected uint8 pixels")
    else:
        path = root / FOLDER_NAME
        if not path.is_dir() and not request.download:
            raise DataError(f"{path}: no such folder")
        parts = {part: _through_torchvision(part == "train", request) for part in request.parts}
    splits = {
        part: make_split(f"{path}, {part}", images, labels, None, len(CLASSES), SAMPLE_SHAPE)
        for part, (images, labels) in parts.items()
    }
    train = splits["train"]
    return Dataset("cifar10", train, splits.get("test", train.take(())), len(CLASSES), CLASSES, SAMPLE_SHAPE, SCALE)


def _through_torchvision(train: bool, request: Request) -> tuple[Array, Array]:
    dataset_class = require("torchvision.datasets", "vision").CIFAR10
    try:
        dataset = dataset_class(str(request.root), train=train, download=request.download)
    except Exception as error:  # torchvision names no types: RuntimeError for a wrong MD5, URLError, pickle errors
        raise DataError(f"{request.root / FOLDER_NAME}: torchvision cannot read it: {error}") from error
    return dataset.data.transpose(0, 3, 1, 2), np.asarray(dataset.targets, dtype=np.int64)  # (n, 3, 32, 32), (n,)
