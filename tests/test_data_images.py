"""MNIST-like idx files, CIFAR-10 and folders of images, written by the tests; the real Fashion-MNIST where it is."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesfl.data import load_dataset
from mergesfl.data.idx import read_idx
from mergesfl.errors import ConfigError, DataError

REAL_FASHION = Path(__file__).resolve().parents[2] / "shared" / "data" / "fashion-mnist"
DRAWS = np.random.default_rng(0)
IDX = {
    "train-images-idx3-ubyte": DRAWS.integers(0, 256, size=(12, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte": (np.arange(12) % 10).astype(np.uint8),
    "t10k-images-idx3-ubyte": DRAWS.integers(0, 256, size=(4, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": np.array([9, 3, 3, 0], dtype=np.uint8),
}
CIFAR = {name: DRAWS.integers(0, 256, size=(2, 3, 32, 32), dtype=np.uint8) for name in
         [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]}  # fmt: skip


def idx_bytes(values: Any) -> bytes:
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + bytes(values.tobytes())


def write_idx(raw: Path, packed: bool) -> None:
    raw.mkdir(parents=True)
    for name, values in IDX.items():
        content = idx_bytes(values)
        (raw / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_packed_and_through_torchvision(name: str, folder: str, packed: bool, tmp_path: Path) -> None:
    if not packed:
        pytest.importorskip("torchvision")
    write_idx(tmp_path / folder / "raw", packed)
    data = load_dataset(name, tmp_path)
    assert np.array_equal(data.train.x[:, 0], IDX["train-images-idx3-ubyte"]) and data.train.x.dtype == np.uint8
    assert data.train.y.tolist() == IDX["train-labels-idx1-ubyte"].tolist() and data.test.y.tolist() == [9, 3, 3, 0]
    assert np.array_equal(data.test.x[:, 0], IDX["t10k-images-idx3-ubyte"])
    assert data.sample_shape == (1, 28, 28) and data.num_classes == len(data.class_names) == 10 and data.name == name


def test_packed_files_need_no_torchvision_and_may_lie_in_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    write_idx(tmp_path / "raw", packed=True)
    assert load_dataset("mnist", tmp_path / "raw").train.num_samples == 12
    write_idx(tmp_path / "MNIST" / "raw", packed=False)
    with pytest.raises(ConfigError, match=r"mergesfl\[vision\]"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx_bytes(IDX["train-images-idx3-ubyte"]))[:-500], "damaged"),
        (b"", "begins with"),
        (b"not gzip", "damaged"),
        (gzip.compress(b"\x00\x00\x08"), "begins with"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)), "begins with"),
        (gzip.compress(b"\x00\x00\x08\x03" + bytes(8)), "begins with"),
        (gzip.compress(idx_bytes(IDX["train-images-idx3-ubyte"])[:-1]), "9407 values, expected 9408"),
        (gzip.compress(idx_bytes(IDX["train-images-idx3-ubyte"]) + b"x"), "9409 values, expected 9408"),
        (gzip.compress(idx_bytes(IDX["train-images-idx3-ubyte"][:11])), "11 samples and labels"),
        (gzip.compress(idx_bytes(IDX["train-images-idx3-ubyte"][:, 1:])), "expected"),
    ],
    # gzip writes the time of day into its header: ids of the bytes would differ from process to process
    ids=[
        "cut short",
        "empty",
        "not gzip",
        "header of 3 bytes",
        "type double",
        "header without sizes",
        "one byte missing",
        "one byte too many",
        "fewer images than labels",
        "27 rows",
    ],
)
def test_damaged_packed_files_name_the_path(tmp_path: Path, content: bytes, message: str) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, packed=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("mnist", tmp_path)
    assert str(raw) in str(caught.value)


def test_a_missing_packed_file_and_a_label_out_of_range(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, packed=True)
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array([1, 10, 2, 3], dtype=np.uint8))))
    with pytest.raises(DataError, match="label 10 in row 1"):
        load_dataset("mnist", tmp_path)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: no such file"):
        load_dataset("mnist", tmp_path)


def test_damaged_unpacked_files_name_the_path(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, packed=False)
    (raw / "train-images-idx3-ubyte").write_bytes(idx_bytes(IDX["train-images-idx3-ubyte"])[:-100])
    with pytest.raises(DataError, match="torchvision cannot read it") as caught:
        load_dataset("mnist", tmp_path)
    assert str(raw) in str(caught.value)


@pytest.mark.skipif(not REAL_FASHION.is_dir(), reason="the real Fashion-MNIST is not at ../shared/data/fashion-mnist")
def test_the_real_fashion_mnist_is_read_without_writing() -> None:
    before = sorted(path.name for path in (REAL_FASHION / "FashionMNIST" / "raw").iterdir())
    data = load_dataset("fashion-mnist", REAL_FASHION)
    assert data.train.label_counts(10) == (6000,) * 10 and data.test.label_counts(10) == (1000,) * 10  # published
    assert data.class_names[data.train.y[0]] == "Ankle boot"  # the first training image, as its authors show it
    pixels = data.train.x / 255.0
    assert abs(pixels.mean() - data.scale.mean[0]) < 1e-4 and abs(pixels.std() - data.scale.std[0]) < 1e-4
    assert sorted(path.name for path in (REAL_FASHION / "FashionMNIST" / "raw").iterdir()) == before


def cifar_labels(name: str) -> list[int]:
    return [8, 1] if name == "test_batch" else [int(name[-1]), 0]


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small cifar-10-batches-py as published; torchvision is told the MD5s of these files."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    md5 = {}
    contents: dict[str, Any] = {
        name: {"data": images.reshape(-1, 3072), "labels": cifar_labels(name)} for name, images in CIFAR.items()
    }
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    for name, content in contents.items():
        packed = pickle.dumps(content, 2)
        (folder / name).write_bytes(packed)
        md5[name] = hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5[name]] for name in CIFAR if name != "test_batch"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


def test_cifar10_batches_and_archive_are_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    data = load_dataset("cifar10", tmp_path)
    images = np.concatenate([CIFAR[f"data_batch_{index}"] for index in range(1, 6)])
    assert np.array_equal(data.train.x, images) and data.train.y.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert np.array_equal(data.test.x, CIFAR["test_batch"]) and data.test.y.tolist() == [8, 1]
    assert data.scale.flip and data.scale.crop_padding_pixels == 4 and data.sample_shape == (3, 32, 32)
    assert data.class_names[8] == "ship"
    arrays = {"X_train": images.transpose(0, 2, 3, 1), "y_train": data.train.y.astype(np.uint8),
              "X_test": CIFAR["test_batch"], "y_test": data.test.y}  # fmt: skip
    (tmp_path / "archive").mkdir()
    np.savez(tmp_path / "archive" / "cifar10.npz", **arrays)
    for root in (tmp_path / "archive", tmp_path / "archive" / "cifar10.npz"):
        again = load_dataset("cifar10", root)
        assert np.array_equal(again.train.x, images) and np.array_equal(again.test.x, data.test.x)
        assert np.array_equal(again.train.y, data.train.y) and again.scale == data.scale


def test_a_changed_cifar10_batch_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cifar(tmp_path, monkeypatch)
    witness = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    (folder / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="torchvision cannot read it") as caught:
        load_dataset("cifar10", tmp_path)
    assert str(folder) in str(caught.value) and not witness.exists()


def test_cifar10_without_torchvision_and_archives_of_the_wrong_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ConfigError, match=r"mergesfl\[vision\]"):
        load_dataset("cifar10", tmp_path)
    path = tmp_path / "c.npz"
    images, labels = np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, int)
    np.savez(path, X_train=images, y_train=labels, X_test=images, y_test=labels)
    with pytest.raises(DataError, match="expected uint8"):
        load_dataset("cifar10", path)
    images = np.zeros((2, 28, 28, 3), np.uint8)
    np.savez(path, X_train=images, y_train=labels, X_test=images, y_test=labels)
    with pytest.raises(DataError, match=r"\(3, 28, 28\), expected \(3, 32, 32\)"):
        load_dataset("cifar10", path)


def write_images(root: Path, test_name: str = "test") -> None:
    """Two classes of plain colours; cats are red and 20 x 10 with a blue left quarter, dogs are grey and 8 x 8."""
    image_module = pytest.importorskip("PIL.Image")
    cat = np.zeros((10, 20, 3), np.uint8)
    cat[:, :, 0] = 200
    cat[:, :5] = (0, 0, 255)
    for part, num in (("train", 3), (test_name, 1)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
        for index in range(num):
            image_module.fromarray(cat).save(root / part / "cat" / f"{index}.png")
            image_module.fromarray(np.full((8, 8), 77, np.uint8)).save(root / part / "dog" / f"{index}.PNG")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_folder_of_class_folders(tmp_path: Path, test_name: str) -> None:
    write_images(tmp_path, test_name)
    data = load_dataset("folder", tmp_path, image_size_pixels=10)
    assert data.class_names == ("cat", "dog") and data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.x.shape == (6, 3, 10, 10) and data.train.x.dtype == np.uint8 and data.test.num_samples == 2
    # The centre 10 x 10 of a cat is columns 5 to 14: all red, the blue quarter is cut away. A dog is grey everywhere.
    assert (data.train.x[0] == np.array([200, 0, 0])[:, None, None]).all() and (data.train.x[5] == 77).all()


def test_image_100_is_144_pixels_by_default(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert load_dataset(f"folder:{tmp_path}").sample_shape == (3, 144, 144)


def test_damaged_folders_of_images_name_the_path(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(ConfigError, match="image_size_pixels is 0"):
        load_dataset("folder", tmp_path, image_size_pixels=0)
    broken = tmp_path / "train" / "dog" / "1.PNG"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        load_dataset("folder", tmp_path)
    assert str(broken) in str(caught.value)
    broken.unlink()
    (tmp_path / "test" / "eel").mkdir()
    with pytest.raises(DataError, match="only in test: eel"):
        load_dataset("folder", tmp_path)


def test_folders_without_classes_or_without_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_dataset("folder", tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir()
    with pytest.raises(DataError, match="no samples"):
        load_dataset("folder", tmp_path)


def test_an_idx_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_idx(tmp_path / "x.gz")


def test_a_worker_brings_a_folder_without_a_test_part_and_decodes_its_share_only(tmp_path: Path) -> None:
    write_images(tmp_path)
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no folder train and test"):
        load_dataset("folder", tmp_path, image_size_pixels=10)
    seen = []

    def choose(labels: Any) -> Any:
        seen.append(labels.tolist())
        return np.array([0, 4])

    data = load_dataset("folder", tmp_path, image_size_pixels=10, train_only=True, choose=choose)
    assert seen == [[0, 0, 0, 1, 1, 1]]  # the labels of all, though only two are decoded
    assert data.train.y.tolist() == [0, 1] and data.test.num_samples == 0
    assert (data.train.x[0, 0] == 200).all() and (data.train.x[1] == 77).all()
    with pytest.raises(DataError, match="cannot be decoded"):
        load_dataset("folder", tmp_path, image_size_pixels=10, train_only=True)


def test_a_worker_may_bring_a_folder_without_images_but_not_without_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder train, expected one"):
        load_dataset("folder", tmp_path, train_only=True)
    (tmp_path / "train").mkdir()
    assert load_dataset("folder", tmp_path, train_only=True).class_names == ()
    (tmp_path / "train" / "cat").mkdir()
    data = load_dataset("folder", tmp_path, train_only=True)
    assert (data.class_names, data.train.x.shape) == (("cat",), (0, 3, 144, 144))
