"""Any folder of class folders of images: train/CLASS/*.jpg and test/CLASS/*.jpg (or val/). IMAGE-100 is read this way.

Images are decoded once and held as uint8: IMAGE-100 at 144 pixels takes 62,208 bytes per image, 8 GB in all; a worker
decodes its own share only.
Legend: n images, s x s pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mergesfl.data.dataset import Array, Dataset, Scale, make_split
from mergesfl.data.optional import require
from mergesfl.data.request import Request
from mergesfl.errors import ConfigError, DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision
# ImageNet's mean and deviation per channel, as in torchvision's references; mirrored in training. [ours]
SCALE = Scale(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), flip=True)


def load_folder(request: Request) -> Dataset:
    """The images, each scaled and centre-cropped to s x s. [ours] Of the training images only the rows asked for.

    Raises:
        DataError: a folder is missing, the classes of the two splits differ, or an image cannot be decoded.
        ConfigError: Pillow is not installed, or the size is not positive.
    """
    root, size = request.root, request.image_size_pixels
    if size < 1:
        raise ConfigError(f"image_size_pixels is {size}, expected at least 1")
    folders = _part_folders(request)
    classes = _class_folders(folders["train"])
    if not classes and not request.train_only:
        raise DataError(f"{root / 'train'}: no class folders")
    shape = (3, size, size)
    splits = {}
    for part, folder in folders.items():
        paths = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
        y = np.array([label for _, label in paths], dtype=np.int64)  # (n,)
        rows = request.rows(y) if part == "train" else np.arange(len(y))
        x = np.empty((len(rows), *shape), dtype=np.uint8)  # (n, 3, s, s), n = len(rows) from here on
        for place, row in enumerate(rows):
            x[place] = read_image(paths[row][0], size)
        splits[part] = make_split(folder, x, y[rows], None, len(classes), shape, request.train_only)
    train = splits["train"]
    return Dataset("folder", train, splits.get("test", train.take(())), len(classes), classes, shape, SCALE)


def read_image(path: Path, size_pixels: int) -> Array:
    """One image as RGB, uint8 (3, s, s). Raises DataError when it cannot be decoded."""
    image_module: Any = require("PIL.Image", "vision")
    ops_module: Any = require("PIL.ImageOps", "vision")
    try:
        with image_module.open(path) as image:
            fitted = ops_module.fit(image.convert("RGB"), (size_pixels, size_pixels), image_module.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise DataError(f"{path}: cannot be decoded, expected an image: {error}") from error
    pixels: Array = np.asarray(fitted, dtype=np.uint8)  # (s, s, 3)
    return np.moveaxis(pixels, 2, 0)  # (3, s, s)


def _part_folders(request: Request) -> dict[str, Path]:
    """The folder of each split to read; their class folders are the same."""
    root, train = request.root, request.root / "train"
    if request.train_only:
        if not train.is_dir():
            raise DataError(f"{root}: no folder train, expected one, with one folder per class")
        return {"train": train}
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(f"{root}: no folder train and test (or val), expected both, with one folder per class")
    odd = sorted(set(_class_folders(train)) ^ set(_class_folders(test)))
    if odd:
        raise DataError(f"{root}: classes that are only in train or only in {test.name}: {', '.join(odd)}")
    return {"train": train, "test": test}


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
