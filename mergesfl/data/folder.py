"""Any folder of class folders of images: train/CLASS/*.jpg and test/CLASS/*.jpg (or val/). IMAGE-100 is read this way.

All images are decoded once and held as uint8: IMAGE-100 at 144 pixels takes 62,208 bytes per image, 8 GB in all.
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
    """The images, each scaled and centre-cropped to s x s. [ours]

    Raises:
        DataError: a folder is missing, the classes of the two splits differ, or an image cannot be decoded.
        ConfigError: Pillow is not installed, or the size is not positive.
    """
    root, size = request.root, request.image_size_pixels
    if size < 1:
        raise ConfigError(f"image_size_pixels is {size}, expected at least 1")
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise DataError(f"{root}: no folder train and test (or val), expected both, with one folder per class")
    classes = _class_folders(root / "train")
    if _class_folders(test_root) != classes:
        odd = sorted(set(classes) ^ set(_class_folders(test_root)))
        raise DataError(f"{root}: classes that are only in train or only in {test_root.name}: {', '.join(odd)}")
    if not classes:
        raise DataError(f"{root / 'train'}: no class folders")
    shape = (3, size, size)
    splits = {}
    for part, folder in (("train", root / "train"), ("test", test_root)):
        paths = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
        x = np.empty((len(paths), *shape), dtype=np.uint8)  # (n, 3, s, s)
        for row, (path, _) in enumerate(paths):
            x[row] = read_image(path, size)
        y = np.array([label for _, label in paths], dtype=np.int64)  # (n,)
        splits[part] = make_split(folder, x, y, None, len(classes), shape)
    return Dataset("folder", splits["train"], splits["test"], len(classes), classes, shape, SCALE)


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


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
