"""Clusters of emulated devices: who gets which profile, and a throttled cluster against a lower bound by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import RunConfig, load_config, parse_config
from mergesfl.errors import ConfigError
from mergesfl.processes import profile_names, start_worker
from mergesfl.runtime.process import StopFlag
from mergesfl.runtime.profiles import known_profiles
from tests.processes import SMALL, journal


def fleet(num_workers: int, **counts: int) -> RunConfig:
    return parse_config({"cluster": {"num_workers": num_workers}, "simulation": {"fleet": counts}})


def steady_profile(folder: Path) -> Path:
    """0.8 Mb/s = 100,000 bytes per second, 0.02 s per stretch, and nothing left to chance."""
    text = known_profiles()["jetson-tx2"].read_text()
    for old, new in (
        ("[1.0, 30.0]", "[0.8, 0.8]"),
        ("[1.0, 0.2654, 0.0705, 0.0187]", "[1.0]"),
        ("step_overhead_seconds = 0.006", "step_overhead_seconds = 0.02"),
        ("compute_jitter = 0.05", "compute_jitter = 0.0"),
        ("link_jitter = 0.1", "link_jitter = 0.0"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "steady.toml"
    path.write_text(text)
    return path


def play(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """Two workers, two rounds of three steps with eight samples; the journal."""
    every = [
        *SMALL,
        f"output.folder={folder}",
        "name=throttled",
        "cluster.num_workers=2",
        "training.num_rounds=2",
        "data.partition=iid",
        "method.regulation=false",
        *settings,
    ]
    run_cluster(load_config(None, every), False, False, Console(quiet=True), StopFlag())
    return journal(folder / "throttled")


def test_profiles_follow_the_order_of_the_fleet() -> None:
    assert profile_names(fleet(4, b=1, a=3)) == ["b", "a", "a", "a"]
    assert profile_names(parse_config({})) == []


def test_a_fleet_of_another_size_keeps_its_proportions() -> None:
    """30 : 40 : 10 of ten are 3.75, 5 and 1.25: the largest remainder gets the one that is left. Of 160: twice each."""
    assert profile_names(fleet(10, t=30, n=40, a=10)) == ["t"] * 4 + ["n"] * 5 + ["a"]
    assert profile_names(fleet(160, t=30, n=40, a=10)) == ["t"] * 60 + ["n"] * 80 + ["a"] * 20
    assert profile_names(fleet(1, t=1, n=1)) == ["t"]


def test_a_started_worker_is_told_its_profile_and_the_seed_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **details: commands.append(command))
    config = fleet(2, **{"jetson-tx2": 1, "raspberry-pi-5": 1}).model_copy(update={"seed": 7})
    start_worker(config, "tcp://127.0.0.1:1", tmp_path, 1, 1)
    start_worker(parse_config({}), "tcp://127.0.0.1:1", tmp_path, 1, 1)
    with_fleet, without = commands
    place = with_fleet.index("--profile")
    assert with_fleet[place : place + 4] == ["--profile", "raspberry-pi-5", "--emulation-seed", "7"]
    assert "--profile" not in without


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("simulation.fleet={jetson-tx3=2}", "unknown device profile 'jetson-tx3': did you mean 'jetson-tx2'"),
        ("cluster.slowdowns=[1.0,2.0]", "simulation.fleet says how fast the workers are"),
    ],
)
def test_a_wrong_fleet_is_refused_before_anything_starts(tmp_path: Path, setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        play(tmp_path, "simulation.fleet={jetson-tx2=2}", setting)
    assert not (tmp_path / "throttled").exists()


@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_a_round_of_a_throttled_cluster_takes_at_least_what_its_devices_need(tmp_path: Path, transport: str) -> None:
    """Bottom of the digits: 3,608 parameters = 14,432 bytes, down and up: 2 * 0.1443 s. A step: 8 samples of 512 bytes
    up (4,096) and the same down, 2 * 0.041 s; and 3 forward, 3 backward in 4 stretches of 0.02 s. 0.61 s, more with
    headers, labels and what this machine adds."""
    lines = play(tmp_path, f"cluster.transport={transport}", f"simulation.fleet={{'{steady_profile(tmp_path)}'=2}}")
    assert [line["batch_sizes"] for line in lines] == [[8, 8], [8, 8]]
    for line in lines:
        assert line["round_seconds"] >= 2 * 0.1443 + 3 * 2 * 0.041 + 4 * 0.02
        # What the workers report is their stretches (0.08 s) and their exchanges (0.24 s), without the two states.
        assert min(line["observed_seconds"]) >= 3 * 2 * 0.041 + 4 * 0.02


def test_a_throttled_cluster_in_parts_takes_at_least_what_its_links_need(tmp_path: Path) -> None:
    """Over real sockets, batches of 32 in two parts of 8,192 bytes each way: 0.082 s. In every step both go up one
    after the other, and then the last comes down; what comes down while a part goes up is heard and kept."""
    parts = ("training.merge=streaming", "training.parts_per_step=2", "training.batch_size=32")
    lines = play(tmp_path, "cluster.transport=tcp", f"simulation.fleet={{'{steady_profile(tmp_path)}'=2}}", *parts)
    assert [line["batch_sizes"] for line in lines] == [[32, 32], [32, 32]]
    for line in lines:
        assert line["dropped"] == [] and line["samples_trained"] == 3 * 64
        assert line["round_seconds"] >= 2 * 0.1443 + 3 * 3 * 0.0819 + 4 * 0.02
        assert min(line["observed_seconds"]) >= 3 * 3 * 0.0819 + 4 * 0.02
