"""Speech Commands v2 (P. Warden, arXiv 1804.03209): one-second words at 16 kHz, 35 of them, 2,618 speakers.

Read from the published folder (one folder of wav files per word) or from one archive with X_train (n, 16000).
Legend: n clips.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from mergesfl.data.dataset import Array, Dataset, make_split, scale_of
from mergesfl.data.npz import class_members, group_members, members, read_npz
from mergesfl.data.request import Request
from mergesfl.errors import DataError

RATE_HERTZ = 16_000
NUM_SAMPLES = 16_000  # one second; shorter clips are padded with silence, longer ones cut
SAMPLE_SHAPE = (1, NUM_SAMPLES)
SPEAKER_MARK = "_nohash_"  # <speaker>_nohash_<take>.wav


def load_speech(request: Request) -> Dataset:
    """Speech Commands with speakers as groups. Raises DataError when it is missing or damaged.

    testing_list.txt is the test split; validation_list.txt is left out of both, as the data set's authors ask. A folder
    with fewer words is accepted: the words found are the classes. The lists of a worker's own folder may be missing or
    name clips that it does not hold. Of the training clips only the rows asked for are read.
    """
    root = request.root
    if root.is_file():
        return _load_archive(request)
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder")
    words = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))))
    if not words and not request.train_only:
        raise DataError(f"{root}: no word folders")
    testing, validation = (
        set() if request.train_only and not (root / name).exists() else _read_list(root / name)
        for name in ("testing_list.txt", "validation_list.txt")
    )
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for word in words:
        for path in sorted((root / word).glob("*.wav")):
            clip = f"{word}/{path.name}"
            if clip in testing:
                parts["test"].append(clip)
            elif clip not in validation:
                parts["train"].append(clip)
    absent = sorted(testing - set(parts["test"]))
    if absent and not request.train_only:
        raise DataError(
            f"{root / 'testing_list.txt'}: names {len(absent)} clips that are not there, first: {absent[0]}"
        )
    speakers = sorted({_speaker(clip) for clips in parts.values() for clip in clips})
    number = {speaker: index for index, speaker in enumerate(speakers)}
    splits = {}
    for part in request.parts:
        clips = parts[part]
        y = np.array([words.index(clip.partition("/")[0]) for clip in clips], dtype=np.int64)  # (n,)
        groups = np.array([number[_speaker(clip)] for clip in clips], dtype=np.int64)  # (n,)
        rows = request.rows(y) if part == "train" else np.arange(len(y))
        x = np.zeros((len(rows), *SAMPLE_SHAPE), dtype=np.int16)  # (n, 1, 16000), n = len(rows) from here on
        for place, row in enumerate(rows):
            sound = read_wav(root / clips[row])
            x[place, 0, : len(sound)] = sound
        where = f"{root}, {part}"
        splits[part] = make_split(where, x, y[rows], groups[rows], len(words), SAMPLE_SHAPE, request.train_only)
    train, scale = splits["train"], scale_of(np.dtype(np.int16))
    return Dataset("speech", train, splits.get("test", train.take(())), len(words), words, SAMPLE_SHAPE, scale)


def read_wav(path: Path) -> Array:
    """At most one second of 16-bit mono sound, int16 (samples,). Raises DataError for any other kind of file."""
    try:
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            num_frames = min(file.getnframes(), NUM_SAMPLES)
            content = file.readframes(num_frames)
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path}: damaged, expected a wav file: {error or 'it ends too early'}") from error
    if kind != (1, 2, RATE_HERTZ):
        raise DataError(f"{path}: channels, bytes per sample, hertz are {kind}, expected (1, 2, {RATE_HERTZ})")
    if len(content) != 2 * num_frames:
        raise DataError(f"{path}: ends after {len(content)} bytes of sound, expected {2 * num_frames}")
    return np.frombuffer(content, dtype="<i2")


def _read_list(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read, expected one word/clip.wav per line: {error}") from error
    return {line.strip() for line in lines if line.strip()}


def _speaker(clip: str) -> str:
    return clip.partition("/")[2].partition(SPEAKER_MARK)[0]


def _load_archive(request: Request) -> Dataset:
    path = request.root
    arrays = read_npz(path, members(request))
    num_classes, words = class_members(request, arrays)
    groups = dict(zip(("train", "test"), group_members(arrays), strict=True))
    splits = {}
    for part in request.parts:
        x = arrays[f"X_{part}"]
        if x.ndim == 2:
            x = x[:, None]  # (n, 1, 16000)
        where = f"{path}, {part}"
        splits[part] = make_split(
            where, x, arrays[f"y_{part}"], groups[part], num_classes, SAMPLE_SHAPE, request.train_only
        )
    train = request.share_of(splits["train"])
    test = splits.get("test", train.take(()))
    if train.x.dtype != test.x.dtype or train.x.dtype == np.uint8:
        raise DataError(
            f"{path}: X_train is {train.x.dtype}, X_test {test.x.dtype}; expected both int16 or both float32"
        )
    return Dataset("speech", train, test, num_classes, words, SAMPLE_SHAPE, scale_of(train.x.dtype))
