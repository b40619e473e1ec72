"""Checkpoints: tensors as safetensors, everything else as JSON, no pickle; a crash leaves the last one whole.

A checkpoint of round r is two files, written in this order, each under a temporary name, fsynced, then renamed:

    checkpoint-00000012-1f0c9a3b5d7e8f20.safetensors     named after its content, so it never overwrites another one's
    checkpoint-00000012.json                             names the first with its size and SHA-256: this rename commits

Files that no kept JSON names are leftovers of a crash; the next save removes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.runtime.files import publish, write_atomic

FORMAT_VERSION = 1
_JSON_NAME = re.compile(r"checkpoint-(\d+)\.json")
_OWN_NAME = re.compile(r"checkpoint-\d+(-[0-9a-f]+)?\.(safetensors|json)(\.tmp)?|checkpoint\.tensors\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """One loaded checkpoint.

    Attributes:
        round_num: the number that was given to save_checkpoint.
        tensors: name -> tensor, on the CPU, owned by the caller.
        state: the JSON part; tuples have become lists.
        warning: None, or why a newer checkpoint could not be used.
    """

    round_num: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    warning: str | None = None


def save_checkpoint(
    folder: Path, round_num: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes one checkpoint and returns its JSON file; on return it survives a power failure.

    The newest `keep` checkpoints up to round_num stay. Those of later rounds go: they belong to a branch of the run
    that was left when it was resumed from before them.

    Args:
        folder: made if missing.
        round_num: >= 0, of the round to go on with, or of the last one done: the caller's choice.
        tensors: any dtype and device, also non-contiguous, shared or 0-dim; any names.
        state: strings, numbers (finite), booleans, None, lists and mappings with string keys.
        keep: how many checkpoints stay, >= 1.

    Raises CheckpointError when the state has no JSON form or the disk refuses; the previous checkpoint is intact then.
    """
    _check_json(state, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "checkpoint.tensors.tmp"
        _write_tensors(temporary, tensors, {})
        digest, num_bytes = _sha256(temporary)
        tensors_file = f"checkpoint-{round_num:08d}-{digest[:16]}.safetensors"
        publish(temporary, folder / tensors_file)
        body = {
            "round_num": round_num,
            "tensors_file": tensors_file,
            "tensors_bytes": num_bytes,
            "tensors_sha256": digest,
            "state": state,
        }
        text = json.dumps(body, sort_keys=True, allow_nan=False, default=dict)  # default: mappings that are no dict
        document = {"format_version": FORMAT_VERSION, "body_sha256": hashlib.sha256(text.encode()).hexdigest()}
        path = folder / f"checkpoint-{round_num:08d}.json"
        write_atomic(path, json.dumps({**document, "body": json.loads(text)}, indent=1).encode())
        _remove_old(folder, round_num, keep)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint of round {round_num} cannot be written to {folder} ({error.strerror or error}); the previous "
            "one is intact: free space or fix the permissions, then go on with --resume"
        ) from error
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest intact checkpoint of a folder; its `warning` says which newer ones are damaged.

    Raises CheckpointError when there is none, or when the newest was written by a later version of this package.
    """
    found = _list(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {folder}; expected checkpoint-<round>.json there: check the path of the run, "
            "or start it without --resume"
        )
    damages: list[str] = []
    for _, path in found:
        try:
            loaded = _read(path)
        except _DamagedError as damage:
            damages.append(f"{path.name}: {damage}")
            continue
        warning = f"fell back to {path.name}, newer checkpoints are damaged ({'; '.join(damages)})" if damages else None
        return Checkpoint(loaded.round_num, loaded.tensors, loaded.state, warning)
    raise CheckpointError(
        f"no intact checkpoint in {folder} ({'; '.join(damages)}); restore these files from a copy, or start the run "
        "again without --resume"
    )


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file atomically. Raises OSError, and ConfigError without safetensors."""
    temporary = path.with_name(f"{path.name}.tmp")
    _write_tensors(temporary, tensors, metadata)
    publish(temporary, path)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    # Clones: safetensors refuses tensors that share memory, and views that are not contiguous.
    own = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    _safetensors().save_file(own, str(path), metadata={"format": "pt", **metadata})
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _DamagedError(Exception):
    """One checkpoint cannot be used: the next older one may."""


def _read(path: Path) -> Checkpoint:
    try:
        document = json.loads(path.read_bytes())
        version, body, digest = document["format_version"], document["body"], document["body_sha256"]
    except OSError as error:
        raise _DamagedError(f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError("is not a complete JSON checkpoint") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this package reads up to {FORMAT_VERSION}; "
            "install the mergesfl that wrote it, or start the run again without --resume"
        )
    if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != digest:
        raise _DamagedError("its content does not match its SHA-256")
    tensors_path = path.parent / body["tensors_file"]
    try:
        data = tensors_path.read_bytes()
    except OSError as error:
        raise _DamagedError(f"{tensors_path.name} cannot be read ({error.strerror})") from error
    if len(data) != body["tensors_bytes"]:
        raise _DamagedError(f"{tensors_path.name} has {len(data)} bytes, expected {body['tensors_bytes']}")
    if hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
        raise _DamagedError(f"{tensors_path.name} does not match its SHA-256")
    return Checkpoint(body["round_num"], _safetensors().load(data), body["state"])


def _list(folder: Path) -> list[tuple[int, Path]]:
    """(round, JSON file) of every checkpoint in the folder, the newest first."""
    if not folder.is_dir():
        return []
    matches = [(_JSON_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _remove_old(folder: Path, round_num: int, keep: int) -> None:
    """Removes old and abandoned checkpoints and leftovers of a crash; a JSON goes before its tensors."""
    kept_names: set[str] = set()
    for path in [path for number, path in _list(folder) if number <= round_num][: max(1, keep)]:
        kept_names.add(path.name)
        try:
            kept_names.add(str(json.loads(path.read_bytes())["body"]["tensors_file"]))
        except (ValueError, KeyError, TypeError):  # damaged: its tensors are of no use
            continue
    ours = [path for path in folder.iterdir() if _OWN_NAME.fullmatch(path.name) and path.name not in kept_names]
    for path in sorted(ours, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> tuple[str, int]:
    """Digest and size in bytes of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            num_bytes += len(chunk)
    return digest.hexdigest(), num_bytes


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{where} has the key {key!r} ({type(key).__name__}); JSON keys are str: convert it"
                )
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif not (value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))):
        raise CheckpointError(
            f"{where} is {value!r} ({type(value).__name__}); a checkpoint's state holds None, bool, int, str, finite "
            "float, lists and mappings: convert it, or put arrays among the tensors"
        )


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            "checkpoints and exports need safetensors, which is not installed: pip install mergesfl[ps]"
        ) from error
    return safetensors.torch
