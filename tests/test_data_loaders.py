"""The table of data sets, digits, the npz archive and UCI HAR (text folder, archive, and the real data where it is)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesfl.data import DATASETS, load_dataset
from mergesfl.data.dataset import Dataset, make_split
from mergesfl.data.har import ACTIVITIES, SIGNALS
from mergesfl.data.scale import IDENTITY, PIXELS
from mergesfl.errors import ConfigError, DataError

REAL_HAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "uci-har"


def archive_arrays(num_classes: int = 3, dtype: Any = np.float32) -> dict[str, Any]:
    draws = np.random.default_rng(0)
    return {
        "X_train": draws.normal(size=(12, 4)).astype(dtype), "y_train": np.arange(12) % num_classes,
        "X_test": draws.normal(size=(5, 4)).astype(dtype), "y_test": np.arange(5) % num_classes,
    }  # fmt: skip


def har_arrays() -> dict[str, Any]:
    draws = np.random.default_rng(1)
    arrays: dict[str, Any] = {}
    for part, num in (("train", 7), ("test", 4)):
        arrays[f"X_{part}"] = draws.normal(size=(num, 9, 128)).astype(np.float32)
        arrays[f"y_{part}"] = draws.integers(0, 6, num).astype(np.uint8)
        arrays[f"subject_{part}"] = draws.integers(1, 31, num).astype(np.uint8)
    return arrays


def write_har_text(root: Path, arrays: dict[str, Any]) -> Path:
    folder = root / "UCI HAR Dataset"
    for part in ("train", "test"):
        (folder / part / "Inertial Signals").mkdir(parents=True)
        np.savetxt(folder / part / f"y_{part}.txt", arrays[f"y_{part}"].astype(int) + 1, fmt="%d")
        np.savetxt(folder / part / f"subject_{part}.txt", arrays[f"subject_{part}"], fmt="%d")
        for index, signal in enumerate(SIGNALS):  # nine digits give every float32 back
            path = folder / part / "Inertial Signals" / f"{signal}_{part}.txt"
            np.savetxt(path, arrays[f"X_{part}"][:, index], fmt="%16.8e")
    return folder


def test_digits_are_the_real_ones_and_each_is_in_exactly_one_split() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    data = load_dataset("digits")
    assert data.train.x.shape == (1437, 1, 8, 8) and data.test.x.shape == (360, 1, 8, 8)
    assert data.train.x.dtype == np.uint8 and data.train.groups is None and data.num_classes == 10

    def listed(x: Any, y: Any) -> list[bytes]:
        return sorted(np.append(a.ravel(), b).astype(np.uint8).tobytes() for a, b in zip(x, y, strict=True))

    both = listed(np.concatenate([data.train.x, data.test.x]), np.concatenate([data.train.y, data.test.y]))
    assert both == listed(bunch.images, bunch.target)
    # Stratified: a fifth of every class, to within one sample.
    for test, total in zip(data.test.label_counts(10), np.bincount(bunch.target), strict=True):
        assert abs(test - total / 5) <= 1
    # The fifths by hand: the first and the sixth zero of the file test.
    zeros = np.flatnonzero(bunch.target == 0)
    test_zeros = data.test.x[data.test.y == 0][:, 0]
    assert np.array_equal(data.test.x[0, 0], bunch.images[zeros[0]])
    assert np.array_equal(test_zeros[1], bunch.images[zeros[5]])


def test_the_digits_scale_standardises_the_training_split() -> None:
    pytest.importorskip("sklearn.datasets")
    data = load_dataset("digits")
    x = data.scale.to_input(data.train.x)
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mergesfl\[ps\]"):
        load_dataset("digits")


def test_digits_come_from_scikit_learn_itself_where_its_file_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.datasets")
    direct = load_dataset("digits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loaded = load_dataset("digits")
    assert np.array_equal(loaded.train.x, direct.train.x) and np.array_equal(loaded.test.y, direct.test.y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digitz",), "did you mean 'digits'"),
        (("digits:/x",), "has no path"),
        (("npz",), "needs a path: write npz:PATH"),
        (("npz:",), "names no path"),
        (("npz:/x", Path("/y")), "both name a path"),
        (("har", Path("/x"), True), "cannot be downloaded here: get it from https"),
    ],
)
def test_calls_that_are_not_legal(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataset(*arguments)


@pytest.mark.parametrize("name", [name for name, loader in DATASETS.items() if not loader.bundled])
def test_missing_data_names_the_path_what_belongs_there_and_where_to_get_it(name: str, tmp_path: Path) -> None:
    if DATASETS[name].downloads:
        pytest.importorskip("torchvision")
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message and DATASETS[name].expected in message
    assert DATASETS[name].source in message


def test_without_a_root_the_folder_data_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/UCI HAR Dataset"):
        load_dataset("har")
    (tmp_path / "data" / "uci-har").mkdir(parents=True)
    np.savez(tmp_path / "data" / "uci-har" / "uci_har.npz", **har_arrays())
    assert load_dataset("har").train.num_samples == 7


def test_npz_as_written(tmp_path: Path) -> None:
    arrays = archive_arrays(dtype=np.float64)
    np.savez(tmp_path / "x.npz", **arrays)
    data = load_dataset(f"npz:{tmp_path / 'x.npz'}")
    assert np.array_equal(data.train.x, arrays["X_train"].astype(np.float32)) and data.train.x.dtype == np.float32
    assert data.test.y.tolist() == [0, 1, 2, 0, 1] and data.test.y.dtype == np.int64
    assert (data.num_classes, data.class_names, data.sample_shape) == (3, ("0", "1", "2"), (4,))
    assert data.scale is IDENTITY and data.train.groups is None and data.name == "npz"
    assert data.train.label_counts(4) == (4, 4, 4, 0)
    taken = data.train.take([11, 0])
    assert taken.y.tolist() == [2, 0] and np.array_equal(taken.x, data.train.x[[11, 0]]) and taken.groups is None


def test_npz_optional_members(tmp_path: Path) -> None:
    arrays = archive_arrays(2)
    groups: Any = {"group_train": np.arange(12), "group_test": np.arange(5)}
    np.savez(tmp_path / "x.npz", **arrays, **groups, classes=np.array(["a", "b", "c"]))
    data = load_dataset("npz", tmp_path / "x.npz")
    assert data.class_names == ("a", "b", "c") and data.num_classes == 3
    assert data.train.groups is not None and data.train.groups.tolist() == list(range(12))
    assert data.train.take([3]).groups == np.array([3])
    # A worker's own archive may lack classes; names of speakers become numbers, the same in both splits.
    speakers: Any = {"speaker_train": np.array(["eve", "adam"] * 6), "speaker_test": np.array(["eve"] * 4 + ["zoe"])}
    np.savez(tmp_path / "y.npz", **arrays, **speakers, num_classes=np.array(7))
    data = load_dataset("npz", tmp_path / "y.npz")
    assert data.num_classes == 7 and data.train.groups is not None and data.test.groups is not None
    assert data.train.groups.tolist() == [1, 0] * 6 and data.test.groups.tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("stored", "sample"),
    [
        ((5, 6), (1, 5, 6)),
        ((6, 5, 3), (3, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((6, 5, 4), (6, 5, 4)),
    ],
)
def test_npz_images_get_their_channel_in_front(
    tmp_path: Path, stored: tuple[int, ...], sample: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(4, *stored), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", X_train=images, y_train=np.arange(4), X_test=images, y_test=np.arange(4))
    data = load_dataset("npz", tmp_path / "x.npz")
    assert data.sample_shape == sample and data.scale is PIXELS and data.train.x.flags.c_contiguous
    moved = np.moveaxis(images, 3, 1) if stored[-1] in (1, 3) else images
    assert np.array_equal(data.train.x, moved.reshape(4, *sample))


def changed(**change: Any) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        arrays = {name: value for name, value in {**archive_arrays(), **change}.items() if value is not None}
        np.savez(path, **arrays)

    return damage


def with_value(value: float) -> Any:
    x = archive_arrays()["X_train"].astype(np.float64)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b"nonsense"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: np.save(path.open("wb"), np.arange(3)), "single array"),
        (changed(y_train=None, X_test=None), "missing: y_train, X_test"),
        (changed(y_train=np.arange(11)), "12 samples and labels of shape"),
        (changed(y_train=np.arange(12.0)), "whole numbers"),
        (changed(y_train=np.array([], dtype=int)), "at least one"),
        (changed(y_test=np.array([0, 1, -1, 0, 0])), "label -1 in row 2"),
        (changed(y_train=np.arange(12), num_classes=np.array(3)), "label 3 in row 3"),
        (changed(num_classes=np.array(0)), "num_classes"),
        (changed(X_test=np.zeros((5, 3), np.float32)), "expected"),
        (changed(X_train=np.zeros(12, np.float32)), "expected"),
        (changed(X_test=np.zeros((5, 4), np.uint8)), "the same type"),
        (changed(X_train=with_value(np.nan)), "X_train is float64"),
        (changed(X_train=with_value(np.nan).astype(np.float32)), "row 2 .*not finite"),
        (changed(X_train=with_value(1e300), X_test=np.zeros((5, 4))), "row 2 .*not finite"),
        (changed(X_train=np.array([["a"] * 4] * 12), X_test=np.array([["a"] * 4] * 5)), "of type <U1"),
        (changed(X_train=np.array([[None] * 4] * 12)), "damaged"),
        (changed(group_train=np.arange(11)), "one group per sample"),
        (changed(group_train=np.arange(12.0)), "groups of type float64"),
        (changed(classes=np.array(["a", "b", "a"])), "3 class names, 2 of them distinct, for 3 classes"),
        (changed(classes=np.array(["a", "b", "c\n"])), "class name 'c.n': expected 1 to 255 printable"),
        (changed(classes=np.array(["a", "b", ""])), "class name '': expected 1 to 255 printable"),
        (changed(classes=np.array(["a", "b", "c" * 256])), "expected 1 to 255 printable"),
    ],
)
def test_a_damaged_npz_names_its_path(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **archive_arrays())
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("npz", path)
    assert str(path) in str(caught.value)


def test_any_changed_byte_of_an_archive_is_an_answer_or_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **archive_arrays())
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    num_refused = 0
    for _ in range(400):
        content = bytearray(whole[: draws.integers(1, len(whole))] if draws.random() < 0.3 else whole)
        for place in draws.integers(0, len(content), size=draws.integers(1, 4)):
            content[place] = draws.integers(0, 256)
        path.write_bytes(content)
        try:
            load_dataset("npz", path)
        except DataError:
            num_refused += 1
    assert num_refused > 200


def test_a_worker_brings_an_npz_without_a_test_part(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    changed(X_test=None, y_test=None)(path)
    with pytest.raises(DataError, match="missing: X_test, y_test"):
        load_dataset("npz", path)
    data = load_dataset("npz", path, train_only=True)
    assert data.train.num_samples == 12 and data.class_names == ("0", "1", "2")
    assert (data.test.num_samples, data.test.x.shape) == (0, (0, 4))
    chosen = load_dataset("npz", path, train_only=True, choose=lambda labels: np.flatnonzero(labels == 2))
    assert np.array_equal(chosen.train.x, archive_arrays()["X_train"][2::3])


@pytest.mark.parametrize("labels", [np.array([]), np.array([], np.int64)])
def test_a_worker_may_bring_an_npz_without_samples(tmp_path: Path, labels: Any) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, X_train=np.zeros((0, 1, 8, 8)), y_train=labels)
    data = load_dataset("npz", path, train_only=True)
    assert (data.train.num_samples, data.sample_shape, data.class_names) == (0, (1, 8, 8), ())
    changed(X_train=np.zeros((0, 4)), y_train=labels)(path)
    with pytest.raises(DataError):
        load_dataset("npz", path)
    changed(y_train=np.array(["a"] * 12))(path)
    with pytest.raises(DataError, match="must hold whole numbers"):
        load_dataset("npz", path, train_only=True)


def test_a_worker_brings_har_without_a_test_part(tmp_path: Path) -> None:
    arrays = har_arrays()
    for part in ("X_test", "y_test", "subject_test"):
        del arrays[part]
    np.savez(tmp_path / "har.npz", **arrays)
    data = load_dataset("har", tmp_path / "har.npz", train_only=True)
    assert (data.train.num_samples, data.test.num_samples) == (7, 0)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="here: no samples"):
        make_split("here", np.zeros((0, 2), np.float32), np.zeros(0, np.int64), None, 2, (2,))


def same(one: Dataset, two: Dataset) -> None:
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y)
        assert a.groups is not None and b.groups is not None and np.array_equal(a.groups, b.groups)


def test_har_text_and_archive_are_the_same_data(tmp_path: Path) -> None:
    arrays = har_arrays()
    folder = write_har_text(tmp_path, arrays)
    np.savez(tmp_path / "har.npz", **arrays)
    text, archive = load_dataset("har", tmp_path), load_dataset("har", tmp_path / "har.npz")
    same(text, archive)
    same(text, load_dataset("har", folder))
    assert text.sample_shape == (1, 128, 9) and text.train.x.shape == (7, 1, 128, 9) and text.scale is IDENTITY
    # Step 100 of signal 4 (body_gyro_y) of window 3.
    assert text.train.x[3, 0, 100, 4] == arrays["X_train"][3, 4, 100]
    assert text.train.y.tolist() == arrays["y_train"].tolist() and text.class_names == ACTIVITIES
    assert text.test.groups is not None and text.test.groups.tolist() == arrays["subject_test"].tolist()


def edited(name: str, edit: Callable[[list[str]], list[str]]) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        path = folder / name
        path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
        return path

    return damage


def emptied(folder: Path) -> Path:
    path = folder / "test" / "y_test.txt"
    path.write_bytes(b"")
    return path


def removed(folder: Path) -> Path:
    path = folder / "test" / "Inertial Signals" / "total_acc_z_test.txt"
    path.unlink()
    return path


GYRO = "train/Inertial Signals/body_gyro_x_train.txt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(GYRO, lambda lines: lines[:-1]), "6 rows of 128 numbers, expected 7 rows"),
        (edited(GYRO, lambda lines: [line.rsplit(" ", 1)[0] for line in lines]), "7 rows of 127 numbers"),
        (edited(GYRO, lambda lines: [*lines[:2], lines[2].rsplit(" ", 1)[0], *lines[3:]]), "damaged"),
        (edited(GYRO, lambda lines: [*lines[:2], "x" + lines[2], *lines[3:]]), "damaged"),
        (edited("train/subject_train.txt", lambda lines: lines[1:]), "6 rows of 1 numbers, expected 7"),
        (edited("train/y_train.txt", lambda lines: ["1.5", *lines[1:]]), "not whole"),
        (edited("train/y_train.txt", lambda lines: ["nan", *lines[1:]]), "not whole"),
        (emptied, "empty"),
        (removed, "no such file"),
    ],
)
def test_damaged_har_text_names_the_file(tmp_path: Path, damage: Callable[[Path], Path], message: str) -> None:
    path = damage(write_har_text(tmp_path, har_arrays()))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("har", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited("train/y_train.txt", lambda lines: ["7", *lines[1:]]), "label 6 in row 0"),
        (edited("train/y_train.txt", lambda lines: ["0", *lines[1:]]), "label -1 in row 0"),
        (edited(GYRO, lambda lines: [lines[0].rsplit(" ", 1)[0] + " inf", *lines[1:]]), "not finite"),
    ],
)
def test_har_text_with_illegal_numbers_names_the_folder(
    tmp_path: Path, damage: Callable[[Path], Path], message: str
) -> None:
    damage(write_har_text(tmp_path, har_arrays()))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("har", tmp_path)
    assert str(tmp_path / "UCI HAR Dataset") in str(caught.value)


def test_a_har_archive_of_the_wrong_shape(tmp_path: Path) -> None:
    arrays = har_arrays()
    np.savez(tmp_path / "x.npz", **{**arrays, "X_train": arrays["X_train"].transpose(0, 2, 1)})
    with pytest.raises(DataError, match=r"\(7, 128, 9\), expected \(windows, 9, 128\)"):
        load_dataset("har", tmp_path / "x.npz")


@pytest.mark.skipif(not REAL_HAR.is_dir(), reason="the real UCI HAR is not at ../shared/data/uci-har")
def test_the_real_har() -> None:
    data = load_dataset("har", REAL_HAR)
    assert data.train.x.shape == (7352, 1, 128, 9) and data.test.x.shape == (2947, 1, 128, 9)
    assert data.train.label_counts(6) == (1226, 1073, 986, 1286, 1374, 1407)  # published counts
    assert data.test.label_counts(6) == (496, 471, 420, 491, 532, 537)
    assert data.train.groups is not None and data.test.groups is not None
    subjects = set(data.train.groups.tolist()), set(data.test.groups.tolist())
    assert (len(subjects[0]), len(subjects[1])) == (21, 9) and not subjects[0] & subjects[1]
    # Physics: total_acc_x (channel 6) holds gravity, about 1 g, for one who stands; body_acc_x (channel 0) does not.
    standing = data.train.x[data.train.y == ACTIVITIES.index("STANDING"), 0]
    assert abs(float(standing[:, :, 6].mean()) - 1) < 0.1 and abs(float(standing[:, :, 0].mean())) < 0.05
