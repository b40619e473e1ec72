"""Speech Commands: a folder of wav files and an archive, both written by the tests."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesfl.data import load_dataset
from mergesfl.data.scale import IDENTITY, SOUND
from mergesfl.errors import DataError

SOUND_OF = {
    "yes/bob_nohash_0.wav": np.arange(16000) - 8000,
    "yes/bob_nohash_1.wav": np.arange(100),  # short: padded
    "yes/amy_nohash_0.wav": np.full(16000, -32768),
    "no/amy_nohash_0.wav": np.arange(20000) % 1000,  # long: cut
    "no/cid_nohash_0.wav": np.full(16000, 7),
    "no/dan_nohash_0.wav": np.full(16000, 9),
}


def write_wav(path: Path, values: Any, channels: int = 1, hertz: int = 16000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(hertz)
        file.writeframes(np.asarray(values).astype("<i2").tobytes())


def write_folder(root: Path) -> Path:
    for name, values in SOUND_OF.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        write_wav(root / name, values)
    (root / "_background_noise_").mkdir()
    write_wav(root / "_background_noise_" / "hum.wav", np.zeros(64000))
    (root / "testing_list.txt").write_text("yes/amy_nohash_0.wav\nno/amy_nohash_0.wav\n\n")
    (root / "validation_list.txt").write_text("no/dan_nohash_0.wav\n")
    return root


def test_the_folder_by_hand(tmp_path: Path) -> None:
    data = load_dataset("speech", write_folder(tmp_path / "speech"))
    assert data.class_names == ("no", "yes") and data.sample_shape == (1, 16000) and data.scale is SOUND
    # Training: no/cid, yes/bob 0, yes/bob 1; the validation clip no/dan is in neither split.
    assert data.train.x.shape == (3, 1, 16000) and data.train.x.dtype == np.int16
    assert data.train.y.tolist() == [0, 1, 1] and data.test.y.tolist() == [0, 1]
    assert data.train.groups is not None and data.test.groups is not None
    assert data.train.groups.tolist() == [2, 1, 1] and data.test.groups.tolist() == [0, 0]  # amy, bob, cid
    assert np.array_equal(data.train.x[1, 0], SOUND_OF["yes/bob_nohash_0.wav"])
    assert np.array_equal(data.train.x[2, 0], np.append(np.arange(100), np.zeros(15900)))
    assert np.array_equal(data.test.x[0, 0], SOUND_OF["no/amy_nohash_0.wav"][:16000])
    assert (data.scale.to_input(data.test.x[1:]) == -1.0).all()


def truncated(root: Path) -> str:
    path = root / "yes" / "bob_nohash_0.wav"
    path.write_bytes(path.read_bytes()[:-1000])
    return str(path)


def headless(root: Path) -> str:
    (root / "yes" / "bob_nohash_0.wav").write_bytes(b"RIFF")
    return str(root / "yes" / "bob_nohash_0.wav")


def stereo(root: Path) -> str:
    write_wav(root / "no" / "cid_nohash_0.wav", np.zeros(100), channels=2)
    return str(root / "no" / "cid_nohash_0.wav")


def slow(root: Path) -> str:
    write_wav(root / "no" / "cid_nohash_0.wav", np.zeros(100), hertz=8000)
    return str(root / "no" / "cid_nohash_0.wav")


def unlisted(root: Path) -> str:
    (root / "testing_list.txt").unlink()
    return str(root / "testing_list.txt")


def listed_twice(root: Path) -> str:
    (root / "yes" / "amy_nohash_0.wav").unlink()
    return str(root / "testing_list.txt")


def wordless(root: Path) -> str:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return str(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "ends after 31000 bytes of sound, expected 32000"),
        (headless, "damaged"),
        (stereo, r"\(2, 2, 16000\), expected \(1, 2, 16000\)"),
        (slow, r"\(1, 2, 8000\), expected"),
        (unlisted, "cannot be read"),
        (listed_twice, "names 1 clips that are not there, first: yes/amy_nohash_0.wav"),
        (wordless, "no word folders"),
    ],
)
def test_a_damaged_folder_names_the_path(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    root = write_folder(tmp_path / "speech")
    path = damage(root)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("speech", root)
    assert path in str(caught.value)


@pytest.mark.parametrize(("dtype", "scale"), [(np.int16, SOUND), (np.float32, IDENTITY)])
@pytest.mark.parametrize("shape", [(16000,), (1, 16000)])
def test_the_archive(tmp_path: Path, dtype: Any, scale: Any, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(-99, 99, size=(4, *shape)).astype(dtype)
    speakers: Any = {"speaker_train": np.array([5, 5, 2, 1]), "speaker_test": np.array([3, 3])}
    path = tmp_path / "s.npz"
    np.savez(path, X_train=x, y_train=[0, 1, 2, 1], X_test=x[:2], y_test=[2, 0], **speakers)
    data = load_dataset("speech", path)
    assert data.sample_shape == (1, 16000) and data.num_classes == 3 and data.scale is scale
    assert np.array_equal(data.train.x, x.reshape(4, 1, 16000)) and data.train.x.dtype == dtype
    assert data.train.groups is not None and data.train.groups.tolist() == [5, 5, 2, 1]


def test_archives_of_the_wrong_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, X_train=np.zeros((2, 8000)), y_train=[0, 1], X_test=np.zeros((2, 8000)), y_test=[0, 1])
    with pytest.raises(DataError, match=r"\(1, 8000\), expected \(1, 16000\)"):
        load_dataset("speech", path)
    images = np.zeros((2, 16000), np.uint8)
    np.savez(path, X_train=images, y_train=[0, 1], X_test=images, y_test=[0, 1])
    with pytest.raises(DataError, match="expected both int16 or both float32"):
        load_dataset("speech", path)


def test_a_worker_brings_a_folder_of_its_own(tmp_path: Path) -> None:
    """Without lists all clips train; lists of the whole data set may name clips that this worker does not hold."""
    root = write_folder(tmp_path / "speech")
    (root / "yes" / "amy_nohash_0.wav").unlink()
    whole = load_dataset("speech", root, train_only=True)
    assert whole.train.y.tolist() == [0, 1, 1] and whole.test.num_samples == 0
    for name in ("testing_list.txt", "validation_list.txt"):
        (root / name).unlink()
    assert load_dataset("speech", root, train_only=True).train.y.tolist() == [0, 0, 0, 1, 1]
    wordless(root)
    assert load_dataset("speech", root, train_only=True).class_names == ()


def test_only_the_chosen_clips_are_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "speech")
    truncated(root)  # yes/bob 0, row 1
    data = load_dataset("speech", root, train_only=True, choose=lambda labels: np.array([0, 2]))
    assert data.train.y.tolist() == [0, 1] and (data.train.x[0] == 7).all()
    assert data.train.groups is not None and len(data.train.groups) == 2
    with pytest.raises(DataError, match="ends after"):
        load_dataset("speech", root, train_only=True)


def test_a_worker_brings_an_archive_without_a_test_part(tmp_path: Path) -> None:
    x = np.arange(4, dtype=np.int16)[:, None] * np.ones(16000, np.int16)
    np.savez(tmp_path / "s.npz", X_train=x, y_train=[0, 1, 2, 1])
    data = load_dataset("speech", tmp_path / "s.npz", train_only=True, choose=lambda labels: np.array([1, 3]))
    assert data.train.y.tolist() == [1, 1] and data.train.x[:, 0, 0].tolist() == [1, 3] and data.num_classes == 3
