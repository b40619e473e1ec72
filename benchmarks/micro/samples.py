"""Data sets by shape: what a step costs does not depend on what the samples show, so most of them are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergesfl.errors import unknown_name


@dataclass(frozen=True)
class Workload:
    """One network and the samples it is made for, at the cut of the table of models."""

    model: str
    sample_shape: tuple[int, ...]
    stored_type: str
    num_classes: int
    file: str = ""  # below the folder of data sets, where there is one; else the samples are drawn


WORKLOADS: Mapping[str, Workload] = {
    "har": Workload("cnn", (1, 128, 9), "float32", 6, "uci-har/uci_har.npz"),
    "m5": Workload("m5", (1, 16_000), "int16", 35),
    "alexnet": Workload("alexnet", (3, 32, 32), "uint8", 10),
}


def find_workload(name: str) -> Workload:
    """The workload of this name. Raises ConfigError."""
    if name not in WORKLOADS:
        raise unknown_name("workload", name, WORKLOADS)
    return WORKLOADS[name]


def dataset_text(workload: Workload, data: Path | None, folder: Path, num_samples: int) -> str:
    """The data set as a configuration names it: the real one below `data` if it is there, else one drawn here."""
    if data is not None and workload.file and (data / workload.file).exists():
        return f"har:{data / workload.file}"
    generator = np.random.default_rng(0)
    stored = np.dtype(workload.stored_type)
    values = generator.standard_normal((num_samples + 10, *workload.sample_shape), dtype=np.float32)
    if stored.kind != "f":  # the middle of the range, three standard deviations to each end
        middle, width = (128, 42) if stored == np.uint8 else (0, 10_000)
        values = np.clip(values * width + middle, np.iinfo(stored).min, np.iinfo(stored).max)
    x = values.astype(stored)  # (num_samples + 10, *sample_shape)
    y = np.arange(num_samples + 10) % workload.num_classes
    path = folder / f"{workload.model}.npz"
    np.savez(
        path, X_train=x[:num_samples], y_train=y[:num_samples], X_test=x[num_samples:], y_test=y[num_samples:],
        num_classes=np.array(workload.num_classes),
    )  # fmt: skip
    return f"npz:{path}"
