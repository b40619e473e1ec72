"""The trained model as files for others: safetensors of both halves and of the whole, and one runnable program.

Legend: n samples of a batch, C classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mergesfl.errors import CheckpointError
from mergesfl.runtime.checkpoint import save_tensors
from mergesfl.runtime.files import write_atomic
from mergesfl.training.split import SplitModel

METADATA_FILE = "mergesfl.json"  # inside the program file: torch.export.load(path, extra_files={METADATA_FILE: ""})


@dataclass(frozen=True)
class ExportedModel:
    """Where an export lies.

    Attributes:
        bottom: safetensors of the workers' half.
        top: safetensors of the PS's half.
        joined: safetensors of the whole network, by the network's own parameter names.
        program: the whole network for plain torch: (n, *sample_shape) -> logits (n, C), any n >= 1, eval mode.
        program_kind: "torch.export" (torch.export.load(program).module()) or "torchscript" (torch.jit.load(program)).
        program_note: empty, or why torch.export could not be used.
    """

    bottom: Path
    top: Path
    joined: Path
    program: Path
    program_kind: str
    program_note: str = ""


def export_model(
    folder: Path,
    split: SplitModel,
    sample_shape: Sequence[int],
    class_names: Sequence[str],
    metadata: Mapping[str, str],
) -> ExportedModel:
    """Writes bottom.safetensors, top.safetensors, joined.safetensors and joined.pt2 (or joined.torchscript.pt).

    The program is loaded again and must give the model's own logits before it gets its name. The model itself is left
    as it was (device, training mode). Inputs are what the network takes, scaled; put the scale into the metadata.

    Args:
        folder: made if missing.
        split: the model; its top(bottom(x)) is exported.
        sample_shape: of one sample, without the batch.
        class_names: (C,) in the order of the logits.
        metadata: stored in every file next to sample_shape and class_names.

    Raises CheckpointError when the disk refuses, or when neither torch.export nor TorchScript can express the model.
    """
    facts = {
        "sample_shape": json.dumps([int(size) for size in sample_shape]),
        "class_names": json.dumps(list(class_names)),
        **metadata,
    }
    paths = {part: folder / f"{part}.safetensors" for part in ("bottom", "top", "joined")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _frozen_on_cpu(split):
            save_tensors(paths["bottom"], split.bottom.state_dict(), {"part": "bottom", **facts})
            save_tensors(paths["top"], split.top.state_dict(), {"part": "top", **facts})
            save_tensors(paths["joined"], split.joined_state_dict(), {"part": "joined", **facts})
            program, kind, note = _write_program(folder, split, tuple(sample_shape), json.dumps(facts))
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be exported to {folder} ({error.strerror or error}); the checkpoint is intact: "
            "free space or fix the permissions and export again"
        ) from error
    return ExportedModel(program=program, program_kind=kind, program_note=note, **paths)


def _write_program(folder: Path, model: nn.Module, sample_shape: tuple[int, ...], facts: str) -> tuple[Path, str, str]:
    """(path, kind, note) of the first kind that gives the model's own logits when it is loaded again."""
    kinds: tuple[
        tuple[str, str, Callable[[nn.Module, torch.Tensor, str], bytes], Callable[[bytes], nn.Module]], ...
    ] = (
        ("torch.export", "joined.pt2", _torch_export, _load_torch_export),
        ("torchscript", "joined.torchscript.pt", _torchscript, _load_torchscript),
    )
    # Three batch sizes, all unlike the example's 2; one sample is what a device classifies. A fixed wave, not chance.
    dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    inputs = [_wave((num_samples, *sample_shape), dtype) for num_samples in (1, 3, 7)]  # (n, *sample_shape) each
    failures: list[str] = []
    for kind, name, write, load in kinds:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = write(model, _wave((2, *sample_shape), dtype), facts)
                loaded = load(data)
                for x in inputs:
                    torch.testing.assert_close(loaded(x), model(x))  # logits (n, C)
        except OSError:
            raise
        except Exception as error:  # whatever torch's tracers raise: there is a second way, and then a clear error
            failures.append(
                f"{kind}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            continue
        write_atomic(folder / name, data)
        for _, other, _, _ in kinds:
            if other != name:
                (folder / other).unlink(missing_ok=True)  # of an earlier export: it holds other parameters
        return folder / name, kind, "; ".join(failures)
    raise CheckpointError(
        f"no program of the model could be made ({'; '.join(failures)}); the safetensors files in {folder} are "
        "complete: load them into the network's own code"
    )


def _torch_export(model: nn.Module, example: torch.Tensor, facts: str) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: facts})
    return buffer.getvalue()


def _load_torch_export(data: bytes) -> nn.Module:
    module: nn.Module = torch.export.load(io.BytesIO(data)).module()
    return module


def _torchscript(model: nn.Module, example: torch.Tensor, facts: str) -> bytes:
    traced = torch.jit.trace(model, example)  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA_FILE: facts})
    return buffer.getvalue()


def _load_torchscript(data: bytes) -> nn.Module:
    module: nn.Module = torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]
    return module


def _wave(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fixed values in [-1, 1] that differ from sample to sample."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, dtype=dtype)).reshape(shape)  # (n, *sample_shape)


@contextlib.contextmanager
def _frozen_on_cpu(model: nn.Module) -> Iterator[None]:
    """The model in eval mode on the CPU; afterwards as it was. Parameters stay the same objects, for optimisers."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    model.to("cpu").eval()
    try:
        yield
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training
