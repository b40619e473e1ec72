"""Which device a process computes on, what to call it, and how many threads it may use."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path

import torch

from mergesfl.errors import ConfigError

BOARD_MODEL_PATH = Path("/proc/device-tree/model")  # a Jetson's (any device-tree board's) own name, NUL-terminated


def resolve_device(name: str) -> torch.device:
    """The device of a configuration value; a GPU always with its index, so that it compares equal to tensors' devices.

    Args:
        name: "auto" (the first GPU when torch can use one, else the CPU), "cpu", "cuda" or "cuda:<index>".

    Raises ConfigError for another name, and when a GPU is asked for that torch does not report.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"unknown device '{name}'; legal: auto, cpu, cuda, cuda:<index>")
    index = int(match[1] or 0)
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= num_devices:
        raise ConfigError(
            f"device '{name}' was asked for, but torch {torch.__version__} (built for CUDA {torch.version.cuda}) "
            f"reports {num_devices} usable CUDA devices; use device = auto or cpu, or a torch that matches the driver"
        )
    return torch.device("cuda", index)


def describe_device(device: torch.device, board_model_path: Path = BOARD_MODEL_PATH) -> str:
    """A description for people: "cuda: Orin (NVIDIA Jetson AGX Orin)", "cpu: aarch64, 6 cores"."""
    if device.type == "cuda":
        text = f"cuda: {torch.cuda.get_device_name(device)}"
    else:
        num_cores = usable_cores()
        text = f"{device.type}: {platform.machine()}, {num_cores} core{'s' if num_cores != 1 else ''}"
    with contextlib.suppress(OSError):
        board = board_model_path.read_bytes().rstrip(b"\0\n ").decode("utf-8", errors="replace")
        if board:
            text += f" ({board})"
    return text


def usable_cores() -> int:
    """CPU cores that this process may run on (taskset and containers may allow fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(num_threads: int | None) -> int:
    """Sets torch's threads of this process; call it once, before the first tensor operation.

    One thread between operations (our loops run one operation at a time), num_threads inside one.

    Args:
        num_threads: None: all usable cores.

    Returns the number that torch now uses. Raises ConfigError below 1.
    """
    if num_threads is not None and num_threads < 1:
        raise ConfigError(
            f"num_threads is {num_threads}, expected at least 1; leave it out to use all {usable_cores()} cores"
        )
    torch.set_num_threads(usable_cores() if num_threads is None else num_threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # torch fixes this number at the first parallel work: too late then
            torch.set_num_interop_threads(1)
    return torch.get_num_threads()


def local_thread_plan(num_workers: int, num_cores: int) -> tuple[int, int]:
    """(ps_threads, worker_threads) for one PS and num_workers worker processes on one machine.

    Workers compute at the same time and share the cores. The PS computes while they wait for their gradients (and the
    other way round), so it may use all cores without more threads running than there are cores [ours].

    Raises ConfigError when a number is below 1.
    """
    if num_workers < 1 or num_cores < 1:
        raise ConfigError(f"num_workers {num_workers} and num_cores {num_cores} must both be at least 1")
    return num_cores, max(1, num_cores // num_workers)
