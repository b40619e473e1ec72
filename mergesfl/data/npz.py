"""Any numpy archive with X_train, y_train, X_test, y_test; and the careful reading of archives that others share.

Optional members: group_* / subject_* / speaker_* (who a sample comes from), classes (names in label order) and
num_classes (for a worker's own archive, which may not hold every class). A worker's own archive needs no test part.
Legend: n samples, C classes, K channels, H x W pixels.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mergesfl.data.dataset import Array, Dataset, make_split, scale_of
from mergesfl.data.request import Request
from mergesfl.errors import DataError

GROUP_PREFIXES = ("group_", "groups_", "subject_", "speaker_")

# What zipfile, its decompressors and numpy's header reader raise for bytes that are not what they should be.
DAMAGE = (
    OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    struct.error,
)  # fmt: skip


def read_npz(path: Path, required: tuple[str, ...]) -> dict[str, Array]:
    """All arrays of an archive; never unpickles. Raises DataError for a missing, damaged or incomplete file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a numpy archive with {', '.join(required)}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):  # a lone .npy: np.load gives the array itself
            raise ValueError("holds a single array")
        with archive:
            arrays: dict[str, Array] = {name: np.asarray(archive[name]) for name in archive.files}
    except DAMAGE as error:
        raise DataError(f"{path}: damaged, expected a numpy archive with {', '.join(required)}: {error}") from error
    missing = [name for name in required if name not in arrays]
    if missing:
        raise DataError(f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; missing: {', '.join(missing)}")
    return arrays


def members(request: Request) -> tuple[str, ...]:
    """The members that must be there for the splits to read."""
    return tuple(f"{kind}_{part}" for part in request.parts for kind in "Xy")


def group_members(arrays: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
    """The groups of the training and of the test split, (n,) each; names become numbers common to both splits."""
    for prefix in GROUP_PREFIXES:
        train, test = arrays.get(prefix + "train"), arrays.get(prefix + "test")
        named = [part for part in (train, test) if part is not None and part.dtype.kind in "US"]
        if named:
            names = np.unique(np.concatenate([part.ravel() for part in named]))
            numbered = [None if p is None else np.searchsorted(names, p) if p.dtype.kind in "US" else p
                        for p in (train, test)]  # fmt: skip
            return numbered[0], numbered[1]
        if train is not None or test is not None:
            return train, test
    return None, None


def class_members(request: Request, arrays: Mapping[str, Array]) -> tuple[int, tuple[str, ...]]:
    """The number of classes and their names: from the archive if it tells them, else from the largest label."""
    path = request.root
    if "classes" in arrays:
        names = tuple(str(name) for name in arrays["classes"].ravel())
        return len(names), names
    if "num_classes" in arrays:
        declared = arrays["num_classes"]
        if declared.size != 1 or declared.dtype.kind not in "iu" or int(declared.ravel()[0]) < 1:
            raise DataError(f"{path}: num_classes is {declared}, expected one whole number of at least 1")
        num_classes = int(declared.ravel()[0])
    else:
        labels = [arrays[f"y_{part}"] for part in request.parts]
        if any(part.dtype.kind not in "iu" if part.size else not request.train_only for part in labels):
            raise DataError(f"{path}: y_train and y_test must hold whole numbers, at least one each")
        num_classes = max((int(part.max()) for part in labels if part.size), default=-1) + 1
    return num_classes, tuple(str(label) for label in range(num_classes))


def channels_first(x: Array) -> Array:
    """uint8 images as (n, K, H, W): (n, H, W) gets one channel, (n, H, W, 1 or 3) is turned; all else stays."""
    if x.dtype != np.uint8:
        return x
    if x.ndim == 3:
        return x[:, None]  # (n, 1, H, W)
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        turned: Array = x.transpose(0, 3, 1, 2)  # (n, K, H, W)
        return turned
    return x


def load_npz(request: Request) -> Dataset:
    """The data set in one archive. Raises DataError when it is missing or damaged."""
    path = request.root
    arrays = read_npz(path, members(request))
    num_classes, names = class_members(request, arrays)
    groups = dict(zip(("train", "test"), group_members(arrays), strict=True))
    x = {part: channels_first(arrays[f"X_{part}"]) for part in request.parts}
    if x["train"].ndim < 2:
        raise DataError(f"{path}: X_train of shape {x['train'].shape}, expected (samples, ...)")
    if x["train"].dtype != x[request.parts[-1]].dtype:
        raise DataError(f"{path}: X_train is {x['train'].dtype} and X_test {x['test'].dtype}, expected the same type")
    shape = x["train"].shape[1:]
    splits = {
        part: make_split(
            f"{path}, {part}", x[part], arrays[f"y_{part}"], groups[part], num_classes, shape, request.train_only
        )
        for part in request.parts
    }
    train = splits["train"]
    test = splits.get("test", train.take(()))
    return Dataset("npz", train, test, num_classes, names, shape, scale_of(train.x.dtype))
