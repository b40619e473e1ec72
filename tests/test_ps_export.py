"""Exports: a process that knows only torch loads the program and gets the model's own logits, for any batch size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergesfl.errors import CheckpointError
from mergesfl.models import build_model
from mergesfl.training.split import SplitModel
from ps import export
from ps.export import METADATA_FILE, ExportedModel, export_model

safetensors = pytest.importorskip("safetensors")
SAMPLE_SHAPE = (1, 8, 8)
CLASS_NAMES = [f"digit {number}" for number in range(10)]

# Runs far from the repository, isolated (-I) and with our packages forbidden: what plain torch can do.
READER = """
import json, sys
for name in ("mergesfl", "ps", "workers"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
kind, program, inputs, outputs = sys.argv[1:]
extra = {"mergesfl.json": ""}
if kind == "torch.export":
    model = torch.export.load(program, extra_files=extra).module()
else:
    model = torch.jit.load(program, _extra_files=extra)
with torch.no_grad():
    logits = [model(x) for x in torch.load(inputs)]
torch.save(logits, outputs)
facts = extra["mergesfl.json"]
print(facts if isinstance(facts, str) else facts.decode())
"""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_elsewhere(model: ExportedModel, inputs: list[torch.Tensor], folder: Path) -> tuple[list[torch.Tensor], Any]:
    """Logits and metadata as a process with nothing but torch sees them."""
    folder.mkdir()
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-I", "-c", READER, model.program_kind, str(model.program)]
    command += [str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    logits: list[torch.Tensor] = torch.load(folder / "outputs.pt")
    return logits, json.loads(result.stdout)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *SAMPLE_SHAPE, generator=generator) for size in sizes]  # (n, 1, 8, 8) each


def logits_of(split: SplitModel, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    split.eval()
    with torch.no_grad():
        logits = [split(x) for x in inputs]  # (n, 10) each
    split.train()
    return logits


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_plain_torch_loads_the_program(tmp_path: Path) -> None:
    split = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=0).train()  # has dropout: eval mode must be in the program
    exported = export_model(tmp_path / "export", split, SAMPLE_SHAPE, CLASS_NAMES, {"scale": "x / 16"})
    assert (exported.program_kind, exported.program_note, exported.program.name) == ("torch.export", "", "joined.pt2")
    assert all(module.training for module in split.modules())  # left as it was
    inputs = batches(1, 7, 2)
    logits, facts = read_elsewhere(exported, inputs, tmp_path / "elsewhere")
    assert_equal(logits, logits_of(split, inputs))
    assert facts["scale"] == "x / 16"
    assert json.loads(facts["class_names"]) == CLASS_NAMES
    assert json.loads(facts["sample_shape"]) == [1, 8, 8]


def test_the_safetensors_are_the_model(tmp_path: Path) -> None:
    split = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=0)
    exported = export_model(tmp_path, split, SAMPLE_SHAPE, CLASS_NAMES, {"run": "r1"})
    parts = {"bottom": split.bottom.state_dict(), "top": split.top.state_dict(), "joined": split.joined_state_dict()}
    for part, state in parts.items():
        with safetensors.safe_open(str(getattr(exported, part)), framework="pt") as file:
            assert set(file.keys()) == set(state)
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())
            metadata = file.metadata()
        assert (metadata["part"], metadata["run"]) == (part, "r1")
        assert json.loads(metadata["class_names"]) == CLASS_NAMES
    assert set(parts["bottom"]) | set(parts["top"]) == set(parts["joined"])
    # The joined file is enough to build the model again.
    other = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=1)
    other.load_joined_state_dict(safetensors.torch.load_file(exported.joined))
    inputs = batches(3)
    assert_equal(logits_of(other, inputs), logits_of(split, inputs))


def test_torchscript_where_torch_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=0)
    export_model(tmp_path / "export", split, SAMPLE_SHAPE, CLASS_NAMES, {})  # an earlier export lies there

    def fail(*_: object) -> bytes:
        raise RuntimeError("cannot trace this\nlong explanation")

    monkeypatch.setattr(export, "_torch_export", fail)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.mul_(1.5)  # trained on
    exported = export_model(tmp_path / "export", split, SAMPLE_SHAPE, CLASS_NAMES, {"scale": "none"})
    assert exported.program.name == "joined.torchscript.pt"
    assert exported.program_note == "torch.export: RuntimeError: cannot trace this"
    assert not (tmp_path / "export" / "joined.pt2").exists()  # it would hold the parameters of before
    inputs = batches(1, 7)
    logits, facts = read_elsewhere(exported, inputs, tmp_path / "elsewhere")
    assert_equal(logits, logits_of(split, inputs))
    assert facts["scale"] == "none"

    monkeypatch.setattr(export, "_torchscript", fail)
    with pytest.raises(CheckpointError, match=r"no program .*torch\.export: RuntimeError.*torchscript: RuntimeError"):
        export_model(tmp_path / "other", split, SAMPLE_SHAPE, CLASS_NAMES, {})
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "bottom.safetensors",
        "joined.safetensors",
        "top.safetensors",
    ]


def test_a_program_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: the exporter is given another network than the one it is compared with."""
    split = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=0)
    wrong = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=1).eval()
    real = export._torch_export
    monkeypatch.setattr(export, "_torch_export", lambda _, example, facts: real(wrong, example, facts))
    exported = export_model(tmp_path, split, SAMPLE_SHAPE, CLASS_NAMES, {})
    assert exported.program_kind == "torchscript"
    assert exported.program_note.startswith("torch.export: AssertionError: Tensor-likes are not close!")


def test_double_precision_and_mixed_modes_stay_as_they_were(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    split = SplitModel(net, "2")
    split.train()
    split.bottom.eval()
    modes = [module.training for module in split.modules()]
    parameters = [id(parameter) for parameter in split.parameters()]
    exported = export_model(tmp_path, split, SAMPLE_SHAPE, CLASS_NAMES, {})
    assert [module.training for module in split.modules()] == modes
    assert [id(parameter) for parameter in split.parameters()] == parameters
    module: Any = torch.export.load(exported.program).module()
    x = batches(5)[0].double()  # (5, 1, 8, 8)
    assert_equal([module(x)], logits_of(split, [x]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    split = build_model("cnn", None, SAMPLE_SHAPE, 10, seed=0)
    with pytest.raises(CheckpointError, match=r"cannot be exported to .*file.*checkpoint is intact"):
        export_model(tmp_path / "file" / "export", split, SAMPLE_SHAPE, CLASS_NAMES, {})

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_torch_export", full)  # a full disk is no reason to try TorchScript
    with pytest.raises(CheckpointError, match="No space left"):
        export_model(tmp_path / "export", split, SAMPLE_SHAPE, CLASS_NAMES, {})


def test_the_metadata_file_name_is_what_the_reader_asks_for() -> None:
    assert f'"{METADATA_FILE}"' in READER
