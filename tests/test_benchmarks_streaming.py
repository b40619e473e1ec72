"""The pairs of the streaming benchmark: what differs between them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.micro.streaming import CONFIG, jittery_fleet, mean_of, with_values
from mergesfl.config import config_values, load_config
from mergesfl.errors import ConfigError
from mergesfl.runtime.profiles import load_profile


def test_a_jittery_fleet_differs_in_the_jitter_of_its_links_alone(tmp_path: Path) -> None:
    fleet = jittery_fleet({"jetson-tx2": 3, "jetson-agx-xavier": 1}, 0.4, tmp_path / "profiles")
    assert list(fleet.values()) == [3, 1]
    for path, name in zip(fleet, ("jetson-tx2", "jetson-agx-xavier"), strict=True):
        profile = load_profile(path)
        assert profile.link_jitter == 0.4
        assert profile.model_copy(update={"link_jitter": 0.1}) == load_profile(name)


def test_an_unknown_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jetson-tx3"):
        jittery_fleet({"jetson-tx3": 1}, 0.4, tmp_path)


def test_two_runs_of_a_pair_differ_in_the_policy_and_the_name_alone() -> None:
    config = load_config(CONFIG)
    one, other = (
        config_values(with_values(config, merge, merge, False, {"jetson-tx2": 1})) for merge in ("barrier", "streaming")
    )
    assert one["training"].pop("merge") == "barrier" and other["training"].pop("merge") == "streaming"
    assert one.pop("name") != other.pop("name")
    assert one == other
    assert one["method"]["regulation"] is False


def test_a_run_in_parts_differs_in_their_number_too() -> None:
    config = load_config(CONFIG)
    one, other = (
        config_values(with_values(config, "a", "streaming", True, {"jetson-tx2": 1}, parts)) for parts in (1, 4)
    )
    assert (one["training"].pop("parts_per_step"), other["training"].pop("parts_per_step")) == (1, 4)
    assert one == other


def test_the_first_round_is_left_out() -> None:
    assert mean_of([{"round_seconds": 100.0}, {"round_seconds": 1.0}, {"round_seconds": 2.0}], "round_seconds") == 1.5
