"""Checkpoints: everything comes back to the bit, and whatever happens while one is written the one before loads."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.runtime import checkpoint
from mergesfl.runtime.checkpoint import load_checkpoint, save_checkpoint, save_tensors


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it on the way."""


def tensors_of(round_num: int) -> dict[str, torch.Tensor]:
    return {"top/fc.weight": torch.full((2, 3), float(round_num)), "steps": torch.tensor(round_num)}


def save(folder: Path, round_num: int) -> Path:
    return save_checkpoint(folder, round_num, tensors_of(round_num), {"rounds": list(range(round_num))})


def assert_is(folder: Path, round_num: int) -> str | None:
    loaded = load_checkpoint(folder)
    assert loaded.round_num == round_num
    assert loaded.state == {"rounds": list(range(round_num))}
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors_of(round_num).items())
    return loaded.warning


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "bottom/conv1.weight": base,
        "shared with it": base,
        "a view of it/odd rows": base[1::2],
        "transposed.1": base.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "num_batches_tracked": torch.tensor(42, dtype=torch.int64),
        "scalar": torch.tensor(-0.0, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "half": torch.tensor([1.0, -2.5, float("inf"), float("nan")], dtype=torch.bfloat16),
        "half16": torch.tensor([0.1], dtype=torch.float16),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0))),
        "channels_last": torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        "generator": torch.Generator().manual_seed(3).get_state(),
    }
    save_checkpoint(tmp_path, 5, tensors, {})
    loaded = load_checkpoint(tmp_path)
    assert (loaded.round_num, loaded.warning) == (5, None)
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        back = loaded.tensors[name]
        assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8))
    loaded.tensors["shared with it"].zero_()  # own memory: nothing else changes
    assert torch.equal(loaded.tensors["bottom/conv1.weight"], base)


def test_state_comes_back_and_a_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    generator.random(5)
    state = {
        "generator": generator.bit_generator.state,
        "mu": {"w1": 0.1, "w2": 1 / 3},
        "ids": ("a", "ü"),
        "none": None,
    }
    save_checkpoint(tmp_path, 1, {}, state)
    expected = generator.random(4)
    loaded = load_checkpoint(tmp_path).state
    again = np.random.default_rng()
    again.bit_generator.state = loaded["generator"]
    assert np.array_equal(again.random(4), expected)
    assert (loaded["mu"], loaded["ids"], loaded["none"]) == ({"w1": 0.1, "w2": 1 / 3}, ["a", "ü"], None)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, float("nan")]}}, r"state\.a\.b\[1\] is nan"),
        ({"a": np.float64(1.0)}, r"state\.a is .*\(float64\)"),
        ({"a": {3: 1}}, r"state\.a has the key 3 \(int\)"),
        ({"a": torch.zeros(1)}, r"state\.a is tensor.*\(Tensor\)"),
    ],
)
def test_state_without_a_json_form_is_named_before_anything_is_written(
    tmp_path: Path, state: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(tmp_path, 1, {}, state)
    assert files(tmp_path) == []


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for round_num in (1, 2, 10):
        save(tmp_path, round_num)
    (tmp_path / "notes.txt").write_text("mine")  # not ours: never touched
    save(tmp_path, 11)
    names = files(tmp_path)
    assert [name[:19] for name in names if name.endswith(".json")] == ["checkpoint-00000010", "checkpoint-00000011"]
    assert [name[:19] for name in names if name.endswith(".safetensors")] == [
        "checkpoint-00000010",
        "checkpoint-00000011",
    ]
    assert len(names) == 5
    assert assert_is(tmp_path, 11) is None
    save_checkpoint(tmp_path, 12, {}, {}, keep=1)
    assert len(files(tmp_path)) == 3


def test_saving_an_earlier_round_ends_the_abandoned_branch(tmp_path: Path) -> None:
    for round_num in (1, 2, 3):
        save(tmp_path, round_num)
    save(tmp_path, 2)
    assert assert_is(tmp_path, 2) is None
    assert len(files(tmp_path)) == 2  # round 3 is of the old branch, round 1 went when 3 was saved


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("same_round", [False, True])
def test_killed_at_any_point_the_one_before_or_the_new_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, same_round: bool
) -> None:
    """Ends the process at the k-th call for every k, then checks the folder and that the next save cleans up.

    A save calls replace 2 times, fsync 4 times (file, folder, file, folder), unlink 2 times (when a third is saved).
    """
    owner, num_calls = {"replace": (os, 2), "fsync": (os, 4), "unlink": (Path, 2)}[call]
    real = getattr(owner, call)
    if same_round and call == "unlink":
        num_calls = 1  # only the replaced tensors go
    for deadly in range(num_calls + 1):
        folder = tmp_path / f"{deadly}"
        save(folder, 1)
        save(folder, 2)
        seen = [0]

        def kill(*args: Any, deadly: int = deadly, seen: list[int] = seen, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == deadly + 1:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(owner, call, kill)
        new_round, new_state = (2, {"again": True}) if same_round else (3, {"rounds": [0, 1, 2]})
        new_tensors = {"other": torch.ones(1)} if same_round else tensors_of(3)
        if deadly < num_calls:
            with pytest.raises(Killed):
                save_checkpoint(folder, new_round, new_tensors, new_state)
        else:
            save_checkpoint(folder, new_round, new_tensors, new_state)
            assert seen[0] == num_calls  # the loop above met every call
        monkeypatch.setattr(owner, call, real)
        loaded = load_checkpoint(folder)
        assert loaded.warning is None
        if loaded.state == new_state:
            assert loaded.round_num == new_round and set(loaded.tensors) == set(new_tensors)
            assert deadly >= {"replace": 2, "fsync": 3, "unlink": 0}[call]  # after the rename that commits
        else:
            assert assert_is(folder, 2) is None
        save(folder, 4)
        assert assert_is(folder, 4) is None
        assert len(files(folder)) == 4  # two checkpoints, no leftovers


def test_sigkill_of_the_writer_leaves_what_it_said_it_saved(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom mergesfl.runtime.checkpoint import save_checkpoint\n"
        "for r in range(1, 10000):\n"
        "    save_checkpoint(Path(sys.argv[1]), r, {'x': torch.full((1000,), float(r))}, {'r': r})\n"
        "    print(r, flush=True)\n"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        said = 0
        while said < 20:
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        said = max([said, *map(int, process.stdout.read().split())])  # what it said before it died
    loaded = load_checkpoint(tmp_path)
    assert loaded.round_num >= said
    assert loaded.state == {"r": loaded.round_num}
    assert torch.equal(loaded.tensors["x"], torch.full((1000,), float(loaded.round_num)))


def newest(folder: Path, suffix: str) -> Path:
    return max(folder.glob(f"checkpoint-*{suffix}"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda folder: flip(newest(folder, ".safetensors"), -1), "does not match its SHA-256"),
        (lambda folder: flip(newest(folder, ".safetensors"), 12), "does not match its SHA-256"),
        (lambda folder: os.truncate(newest(folder, ".safetensors"), 30), "has 30 bytes, expected"),
        (lambda folder: newest(folder, ".safetensors").unlink(), "cannot be read (No such file"),
        (lambda folder: os.truncate(newest(folder, ".json"), 100), "is not a complete JSON checkpoint"),
        (lambda folder: os.truncate(newest(folder, ".json"), 0), "is not a complete JSON checkpoint"),
        (lambda folder: newest(folder, ".json").write_text("[]"), "is not a complete JSON checkpoint"),
        (
            lambda folder: newest(folder, ".json").write_text(
                newest(folder, ".json").read_text().replace('"rounds"', '"sounds"')
            ),
            "its content does not match its SHA-256",
        ),
        (
            lambda folder: (
                newest(folder, ".json").unlink(),
                newest(folder, ".json").with_name("checkpoint-00000003.json").mkdir(),
            ),
            "cannot be read (Is a directory)",
        ),
    ],
)
def test_a_damaged_newest_one_falls_back_and_says_so(tmp_path: Path, fault: Any, words: str) -> None:
    save(tmp_path, 2)
    save(tmp_path, 3)
    fault(tmp_path)
    warning = assert_is(tmp_path, 2)
    assert warning is not None
    assert words in warning
    assert "fell back to checkpoint-00000002.json" in warning


def test_all_damaged_or_none_there_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere; expected"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
    for round_num in (2, 3):
        save(tmp_path, round_num)
    for path in tmp_path.glob("*.safetensors"):
        flip(path, -1)
    with pytest.raises(CheckpointError, match=r"no intact checkpoint .*00000003\.json: .*00000002\.json: .*--resume"):
        load_checkpoint(tmp_path)


def test_after_a_fall_back_the_damaged_one_goes(tmp_path: Path) -> None:
    for round_num in (2, 3):
        save(tmp_path, round_num)
    newest(tmp_path, ".json").write_text("{")
    save(tmp_path, 3)
    assert assert_is(tmp_path, 3) is None
    newest(tmp_path, ".json").write_text("{")
    save(tmp_path, 4)  # keeps the damaged 3 as one of two, but not its tensors
    assert assert_is(tmp_path, 4) is None
    assert len(files(tmp_path)) == 3


def test_a_later_format_is_not_silently_skipped(tmp_path: Path) -> None:
    for round_num in (2, 3):
        save(tmp_path, round_num)
    path = newest(tmp_path, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2, this package reads up to 1"):
        load_checkpoint(tmp_path)


def test_the_json_tells_the_digest_of_the_tensors(tmp_path: Path) -> None:
    body = json.loads(save(tmp_path, 3).read_text())["body"]
    data = (tmp_path / body["tensors_file"]).read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (body["tensors_sha256"], body["tensors_bytes"])


def test_a_disk_that_refuses_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match=r"round 2 cannot be written .*No space left.*previous one is intact"):
            save(tmp_path, 2)
    assert assert_is(tmp_path, 1) is None


def test_save_tensors_keeps_metadata(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    save_tensors(tmp_path / "x.safetensors", {"a.b": torch.ones(2, 2).t()}, {"class_names": '["ä"]'})
    with safetensors.safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "class_names": '["ä"]'}
        assert torch.equal(file.get_tensor("a.b"), torch.ones(2, 2))
    assert files(tmp_path) == ["x.safetensors"]


def test_without_safetensors_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"pip install mergesfl\[ps\]"):
        checkpoint.save_checkpoint(tmp_path, 1, {}, {})
