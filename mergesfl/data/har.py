"""UCI HAR: nine inertial signals of a smartphone, 128 steps of 2.56 s, six activities, 30 subjects.

Origin: Anguita, Ghio, Oneto, Parra, Reyes-Ortiz, ESANN 2013. Read from the original folder of text files or from one
numpy archive with X_train (n, 9, 128), y_train 0..5, subject_train and the same for test.
Legend: n windows, 9 signals, 128 steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mergesfl.data.dataset import IDENTITY, Array, Dataset, make_split
from mergesfl.data.npz import group_members, members, read_npz
from mergesfl.data.request import Request
from mergesfl.errors import DataError

# Order of the channels: the file names of "Inertial Signals", sorted, as in every published archive of the data.
SIGNALS = (
    "body_acc_x", "body_acc_y", "body_acc_z", "body_gyro_x", "body_gyro_y", "body_gyro_z",
    "total_acc_x", "total_acc_y", "total_acc_z",
)  # fmt: skip
# Labels 1..6 of the original activity_labels.txt, stored here as 0..5.
ACTIVITIES = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
NUM_STEPS = 128
SAMPLE_SHAPE = (1, NUM_STEPS, len(SIGNALS))  # one "image" of steps x signals [code]
FOLDER_NAME = "UCI HAR Dataset"
ARCHIVE_NAME = "uci_har.npz"


def load_har(request: Request) -> Dataset:
    """UCI HAR with subjects as groups. Raises DataError when it is missing or damaged."""
    root = request.root
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if root.is_file() or (root / ARCHIVE_NAME).is_file():
        path = root if root.is_file() else root / ARCHIVE_NAME
        parts = _read_archive(path, request)
    else:
        path = root / FOLDER_NAME if (root / FOLDER_NAME).is_dir() else root
        parts = {part: _read_text_part(path, part) for part in request.parts}
    splits = {}
    for part, (x, y, subjects) in parts.items():
        where = f"{path}, {part}"
        if x.ndim != 3 or x.shape[1:] != (len(SIGNALS), NUM_STEPS):
            raise DataError(f"{where}: signals of shape {x.shape}, expected (windows, {len(SIGNALS)}, {NUM_STEPS})")
        windows = x.transpose(0, 2, 1)[:, None]  # (n, 1, 128, 9)
        splits[part] = make_split(where, windows, y, subjects, len(ACTIVITIES), SAMPLE_SHAPE)
    train = splits["train"]
    test = splits.get("test", train.take(()))
    return Dataset("har", train, test, len(ACTIVITIES), ACTIVITIES, SAMPLE_SHAPE, IDENTITY)


def _read_archive(path: Path, request: Request) -> dict[str, tuple[Array, Array, Array | None]]:
    arrays = read_npz(path, members(request))
    groups = dict(zip(("train", "test"), group_members(arrays), strict=True))
    return {part: (arrays[f"X_{part}"], arrays[f"y_{part}"], groups[part]) for part in request.parts}


def _read_text_part(folder: Path, part: str) -> tuple[Array, Array, Array]:
    """Signals (n, 9, 128) float32, labels (n,) 0..5 and subjects (n,) of "train" or "test"."""
    labels_path = folder / part / f"y_{part}.txt"
    labels = _read_columns(labels_path, num_columns=1, num_rows=None)[:, 0]  # (n,)
    num_rows = len(labels)
    subjects = _read_columns(folder / part / f"subject_{part}.txt", 1, num_rows)[:, 0]  # (n,)
    signals = [
        _read_columns(folder / part / "Inertial Signals" / f"{signal}_{part}.txt", NUM_STEPS, num_rows)
        for signal in SIGNALS
    ]
    x = np.stack(signals, axis=1).astype(np.float32)  # (n, 9, 128)
    return x, _whole(labels_path, labels) - 1, _whole(folder / part / f"subject_{part}.txt", subjects)


def _read_columns(path: Path, num_columns: int, num_rows: int | None) -> Array:
    """A text table (rows, columns) float64; num_rows None accepts any number from one up."""
    expected = f"{'rows' if num_rows is None else f'{num_rows} rows'} of {num_columns} numbers"
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a text file with {expected}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty, expected {expected}")
    try:
        table = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged, expected {expected}: {error}") from error
    if table.shape[1] != num_columns or (num_rows is not None and len(table) != num_rows):
        raise DataError(f"{path}: {table.shape[0]} rows of {table.shape[1]} numbers, expected {expected}")
    return table


def _whole(path: Path, values: Array) -> Array:
    whole = np.nan_to_num(values).astype(np.int64)
    if not np.array_equal(whole, values):
        raise DataError(f"{path}: holds numbers that are not whole, expected whole numbers")
    return whole
