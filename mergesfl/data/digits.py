"""The handwritten digits bundled with scikit-learn: 1,797 real images of 8 x 8, the data set that needs no download.

Origin: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, its test part.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergesfl.data.dataset import Dataset, Scale, make_split
from mergesfl.data.optional import require
from mergesfl.data.request import Request

FloatArray = NDArray[np.float64]

# Ink is counted 0..16. Mean and deviation of ink / 16 over the training split below. [ours]
SCALE = Scale(divisor=16.0, mean=(0.3058,), std=(0.3762,))


def _table() -> FloatArray:
    """(1797, 65) ink of 64 pixels, and the digit.

    Read from scikit-learn's file where it lies: importing scikit-learn takes a second, for each of ten workers.
    """
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            return np.loadtxt(path, delimiter=",")
    bunch = require("sklearn.datasets", "ps").load_digits()
    return np.column_stack([bunch.data, bunch.target])


def load_digits(request: Request) -> Dataset:
    """Every fifth sample of the list sorted by label (file order within a label) tests: 1,437 train, 360 test. [ours]

    That is stratified to within one sample and the same on every machine. Writers are in both splits, as in a random
    split. Raises ConfigError when scikit-learn is not installed.
    """
    table = _table()  # (1797, 65)
    x = table[:, :64].reshape(-1, 1, 8, 8).astype(np.uint8)  # (1797, 1, 8, 8)
    y = table[:, 64].astype(np.int64)  # (1797,)
    by_label = np.argsort(y, kind="stable")
    is_test = np.zeros(len(y), dtype=bool)
    is_test[by_label[::5]] = True
    where, shape = "scikit-learn's digits", (1, 8, 8)
    train = make_split(where, x[~is_test], y[~is_test], None, 10, shape)
    test = make_split(where, x[is_test], y[is_test], None, 10, shape)
    return Dataset("digits", train, test, 10, tuple("0123456789"), shape, SCALE)
