"""The survey on the virtual clock: how long it takes, by hand, and how well it tells what a round will take.

One device without jitter; its figures are those of test_simulation_run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.memory_cluster import FEATURE_BYTES, checkpoint_of, journal_of
from tests.test_simulation_run import (
    BOTTOM_BACKWARD_FLOPS,
    BOTTOM_FORWARD_FLOPS,
    FLOPS_PER_SECOND,
    FULL_FLOPS,
    LATENCY_SECONDS,
    OVERHEAD_SECONDS,
    RATE_BYTES_PER_SECOND,
    config_of,
    play,
)

EVERY = "control.survey_every_rounds=1"
NUM_PARAMETERS = (9 + 1) * 12 + (12 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (256 + 1) * 1024 + (1024 + 1) * 3  # of the cnn
HEADER_BYTES = 100  # at most, of a Probe or an Echo


@pytest.mark.parametrize(
    ("method", "flops_per_sample", "num_probe_samples", "bytes_per_sample"),
    [
        ("adasfl", BOTTOM_FORWARD_FLOPS + BOTTOM_BACKWARD_FLOPS, 8, FEATURE_BYTES),
        ("pyramidfl", FULL_FLOPS, 1, 4 * NUM_PARAMETERS / (2 * 8)),  # tau = 2, d = 8
    ],
)
def test_a_survey_by_hand(
    tmp_path: Path, method: str, flops_per_sample: float, num_probe_samples: int, bytes_per_sample: float
) -> None:
    """Survey down, one stretch over 8 samples, probe up, echo down, report up. Survey and report are too small to be
    carried by the link. The plan that follows believes in it."""
    config = config_of(tmp_path, f"method.name={method}", "training.num_rounds=1", EVERY, num_workers=1)
    play(config)
    (line,) = journal_of(config)
    compute_seconds = OVERHEAD_SECONDS + 8 * flops_per_sample / FLOPS_PER_SECOND
    transfer_seconds = 2 * LATENCY_SECONDS + 2 * num_probe_samples * bytes_per_sample / RATE_BYTES_PER_SECOND
    slack_seconds = 2 * HEADER_BYTES / RATE_BYTES_PER_SECOND
    assert line["survey_seconds"] == pytest.approx(
        compute_seconds + transfer_seconds + 2 * LATENCY_SECONDS, abs=slack_seconds
    )
    predicted_seconds = 2 * 8 * (compute_seconds / 8 + transfer_seconds / num_probe_samples)
    assert line["predicted_seconds"][0] == pytest.approx(predicted_seconds, abs=2 * 8 * slack_seconds)


def test_a_federated_survey_tells_what_the_round_then_shows(tmp_path: Path) -> None:
    """The only difference is the latency, which a probe for one of 16 samples pays 16 times as often: 0.3 s."""
    config = config_of(tmp_path, "method.name=pyramidfl", "training.num_rounds=1", EVERY, num_workers=1)
    play(config)
    (line,) = journal_of(config)
    excess_seconds = line["predicted_seconds"][0] - line["observed_seconds"][0]
    assert excess_seconds == pytest.approx(15 * 2 * LATENCY_SECONDS, abs=0.05)
    assert line["observed_seconds"][0] > 15.0


def test_a_split_survey_tells_what_the_round_then_shows(tmp_path: Path) -> None:
    """The round begins and ends with half a step: one stretch, and its overhead, more than steps. Labels are small."""
    config = config_of(tmp_path, "method.name=adasfl", "training.num_rounds=1", EVERY, num_workers=1)
    play(config)
    (line,) = journal_of(config)
    assert line["observed_seconds"][0] - line["predicted_seconds"][0] == pytest.approx(OVERHEAD_SECONDS, abs=0.005)


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("mbit_per_second", [1.0, 30.0])
def test_a_survey_in_parts_tells_what_the_round_then_shows(
    tmp_path: Path, num_parts: int, mbit_per_second: float
) -> None:
    """As above, on a link that is slower than the device and on one that is faster: what one hides of the other is in
    the survey's figures as it is in the round's. The batch of 16 is surveyed as a whole."""
    settings = ("training.merge=streaming", f"training.parts_per_step={num_parts}", "training.batch_size=16")
    world = ("simulation.ps_flops_per_second=1e15", "training.num_rounds=1", EVERY)
    link = (mbit_per_second, mbit_per_second)
    config = config_of(tmp_path, "method.name=mergesfl", *settings, *world, num_workers=1, mbit_per_second=link)
    play(config)
    (line,) = journal_of(config)
    assert line["batch_sizes"] == [16]
    assert line["observed_seconds"][0] - line["predicted_seconds"][0] == pytest.approx(OVERHEAD_SECONDS, abs=0.01)


def test_a_fleet_too_large_for_the_servers_link_is_surveyed_as_far_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve workers, a server of 0.1 Mb/s: a probe or an echo takes 0.33 s of its link, so that at once all twelve are
    through with both after 8 s, and none before 6 s. Two at a time each takes twice as long as alone and its computing,
    1.7 s at most, so that after 6 s at least the sixth has reported."""
    monkeypatch.setattr("ps.survey.MAX_BYTES_AT_ONCE", 1)
    slow = ("method.name=adasfl", "control.participants_per_round=1", "simulation.ps_link_mbit_per_second=0.1", EVERY)
    num_known = {}
    for num_at_once in (100, 2):
        monkeypatch.setattr("ps.survey.MIN_WORKERS_AT_ONCE", num_at_once)
        settings = (f"name=by-{num_at_once}", "control.survey_deadline_seconds=6.0", "training.num_rounds=1")
        config = config_of(tmp_path, *slow, *settings, num_workers=12)
        play(config)
        assert journal_of(config)[0]["survey_seconds"] == pytest.approx(6.0)
        num_known[num_at_once] = len(checkpoint_of(config).state["fleet"]["estimates"]["workers"])
    assert num_known[100] == 1  # the one that took part in the round
    assert num_known[2] >= 6


def test_the_speeds_of_those_who_were_never_chosen_are_known(tmp_path: Path) -> None:
    """Three rounds of one worker each, in a fleet of six."""
    every = ("method.name=adasfl", "control.participants_per_round=1")
    known = {}
    for name, survey in (("plain", "control.survey_every_rounds=0"), ("surveyed", EVERY)):
        config = config_of(
            tmp_path,
            *every,
            survey,
            f"name={name}",
            "training.num_rounds=3",
            num_workers=6,
            mbit_per_second=(1.0, 30.0),
        )
        play(config)
        known[name] = checkpoint_of(config).state["fleet"]["estimates"]["workers"]
        lines = journal_of(config)
        assert all(len(line["worker_ids"]) == 1 for line in lines)
    assert len(known["plain"]) <= 3 and len(known["surveyed"]) == 6
