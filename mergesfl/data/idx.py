"""MNIST and Fashion-MNIST: through torchvision's own classes, or straight from the published .gz files.

torchvision reads only unpacked files and unpacks next to the packed ones; a folder that cannot be written to, with the
packed files alone, is therefore read here. Legend: n images of 28 x 28.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mergesfl.data.dataset import Array, Dataset, Scale, make_split
from mergesfl.data.optional import require
from mergesfl.data.request import Request
from mergesfl.errors import DataError

SAMPLE_SHAPE = (1, 28, 28)
PREFIXES = {"train": "train", "test": "t10k"}
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Mean and deviation of pixel / 255 over the 60,000 training images.
MNIST_SCALE = Scale(divisor=255.0, mean=(0.1307,), std=(0.3081,))
FASHION_SCALE = Scale(divisor=255.0, mean=(0.2860,), std=(0.3530,))


def load_mnist(request: Request) -> Dataset:
    """MNIST (LeCun, Cortes, Burges). Raises DataError, or ConfigError when torchvision is needed and missing."""
    return _load("mnist", "MNIST", DIGITS, MNIST_SCALE, request)


def load_fashion_mnist(request: Request) -> Dataset:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017). Raises as load_mnist does."""
    return _load("fashion-mnist", "FashionMNIST", CLOTHES, FASHION_SCALE, request)


def _load(name: str, torchvision_name: str, classes: tuple[str, ...], scale: Scale, request: Request) -> Dataset:
    raw = request.root / torchvision_name / "raw"
    unpacked = (raw / "train-images-idx3-ubyte").is_file()
    packed = next((f for f in (raw, request.root) if (f / "train-images-idx3-ubyte.gz").is_file()), None)
    splits = {}
    for part in request.parts:
        if packed is not None and not unpacked:
            where = packed / f"{PREFIXES[part]}-*.gz"
            images = read_idx(packed / f"{PREFIXES[part]}-images-idx3-ubyte.gz")  # (n, 28, 28)
            labels = read_idx(packed / f"{PREFIXES[part]}-labels-idx1-ubyte.gz")  # (n,)
        else:
            where = raw
            images, labels = _through_torchvision(torchvision_name, part == "train", raw, request)
        splits[part] = make_split(where, images[:, None], labels, None, len(classes), SAMPLE_SHAPE)
    train = splits["train"]
    return Dataset(name, train, splits.get("test", train.take(())), len(classes), classes, SAMPLE_SHAPE, scale)


def _through_torchvision(torchvision_name: str, train: bool, raw: Path, request: Request) -> tuple[Array, Array]:
    dataset_class = getattr(require("torchvision.datasets", "vision"), torchvision_name)
    try:
        dataset = dataset_class(str(request.root), train=train, download=request.download)
    except Exception as error:  # torchvision names no types: assertions, struct and torch errors all mean damage
        raise DataError(f"{raw}: torchvision cannot read it: {error or type(error).__name__}") from error
    return dataset.data.numpy(), dataset.targets.numpy()


def read_idx(path: Path) -> Array:
    """One gzipped IDX file of bytes: magic 0, 0, 8, number of axes; big-endian 32-bit axes; then the bytes.

    Raises DataError for a missing file, one that is cut, or one of another kind.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a gzipped IDX file")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: damaged, expected a gzipped IDX file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path}: begins with {content[:4]!r}, expected the header of an IDX file of bytes")
    num_axes = content[3]
    shape = struct.unpack(f">{num_axes}I", content[4 : 4 + 4 * num_axes])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_axes)
    if values.size != math.prod(shape):
        raise DataError(
            f"{path}: {values.size} values, expected {math.prod(shape)} for the shape {shape} of its header"
        )
    return values.reshape(shape)
