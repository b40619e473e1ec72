"""Devices: names, descriptions and threads; a machine with GPUs is pretended where there is none."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergesfl.errors import ConfigError
from mergesfl.runtime import devices
from mergesfl.runtime.devices import describe_device, local_thread_plan, resolve_device, set_threads, usable_cores


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["Orin", "Other"][device.index])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a driver that torch cannot use


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_names_with_gpus(name: str, expected: str) -> None:
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.usefixtures("two_gpus")
def test_an_index_beyond_the_last_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"'cuda:2' .*torch {re.escape(torch.__version__)}.* reports 2 usable"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_names_without_gpu() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ConfigError, match=rf"torch {re.escape(torch.__version__)} .*reports 0 usable CUDA devices; use device = auto"
    ):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "CPU", "cuda:-1", "auto:1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="legal: auto, cpu, cuda, cuda:<index>"):
        resolve_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = tmp_path / "model"
    board.write_bytes(b"NVIDIA Jetson AGX Orin\0")
    nothing = tmp_path / "none"
    assert describe_device(torch.device("cuda:0"), board) == "cuda: Orin (NVIDIA Jetson AGX Orin)"
    assert describe_device(torch.device("cuda:1"), nothing) == "cuda: Other"
    monkeypatch.setattr(devices, "usable_cores", lambda: 6)
    assert describe_device(torch.device("cpu"), nothing) == f"cpu: {platform.machine()}, 6 cores"
    monkeypatch.setattr(devices, "usable_cores", lambda: 1)
    board.write_bytes(b"\0")
    assert describe_device(torch.device("cpu"), board) == f"cpu: {platform.machine()}, 1 core"


def test_usable_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_threads_of_a_fresh_process() -> None:
    """In a process of its own: torch lets the inter-op number be set once, and other tests share this process."""
    script = (
        "import os, torch\nfrom mergesfl.runtime.devices import set_threads\n"
        "all_cores = set_threads(None)\nassert all_cores == len(os.sched_getaffinity(0)) == torch.get_num_threads()\n"
        "assert torch.get_num_interop_threads() == 1\n"
        "assert set_threads(3) == torch.get_num_threads() == 3\nassert set_threads(1) == 1\nprint('done')\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert result.stdout == "done\n", result.stderr


def test_threads_too_late_or_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()

    def too_late(_: int) -> None:
        raise RuntimeError("cannot set number of interop threads after parallel work has started")

    monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_interop_threads", too_late)
    try:
        assert set_threads(2) == 2
        with pytest.raises(ConfigError, match="num_threads is 0, expected at least 1"):
            set_threads(0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_local_thread_plan_by_hand() -> None:
    assert local_thread_plan(10, 2) == (2, 1)  # more workers than cores: one thread each
    assert local_thread_plan(10, 32) == (32, 3)  # 32 // 10
    assert local_thread_plan(1, 8) == (8, 8)
    assert local_thread_plan(4, 4) == (4, 1)
    for num_workers in range(1, 20):
        for num_cores in range(num_workers, 40):
            ps_threads, worker_threads = local_thread_plan(num_workers, num_cores)
            assert max(ps_threads, num_workers * worker_threads) <= num_cores
    with pytest.raises(ConfigError, match="num_workers 0 and num_cores 4"):
        local_thread_plan(0, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_found_and_named() -> None:
    device = resolve_device("auto")
    assert torch.zeros(1, device=device).device == device
    assert describe_device(device).startswith(f"cuda: {torch.cuda.get_device_name(0)}")
