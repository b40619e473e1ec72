"""The benchmark of the transport at a tiny size, and its figures by hand."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from benchmarks.micro.peers import BARE, BATCH_SIZE, CONTESTANTS, NUM_IN_FLIGHT
from benchmarks.micro.roundtrips import Times, compare, connected, num_round_trips, rows


def test_figures_by_hand() -> None:
    """1 MB each way: single trips in 1 s and 3 s, two bursts of 8 in 16 s: 32 MB. Bare pyzmq takes 1/2 and 1/4."""
    mine, bare = Times(10**6, (1.0, 3.0), (12.0, 4.0)), Times(10**6, (0.5, 1.5), (1.0, 3.0))
    assert mine.megabytes_per_second == pytest.approx(2.0)
    assert mine.microseconds(50) == pytest.approx(2e6)
    row, _ = rows({10**6: {"ours": [mine], BARE: [bare]}})
    assert [cell.strip() for cell in row.split("|")] == ["976", "ours", "2", "2000000", "2980000", "0.25", "2.00"]


def brought(back: Any) -> bytes:
    """The gradient's bytes, whatever they came in."""
    if isinstance(back, dict):
        back = np.asarray(back["gradient"])
    return bytes(back[1] if isinstance(back, list) else back)


def test_small_messages_are_sent_more_often_than_large_ones() -> None:
    assert [num_round_trips(size) for size in (4 << 10, 1 << 20, 16 << 20)] == [400, 256, 20]


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_every_contestant_brings_the_features_back(transport: str) -> None:
    if transport == "tcp":
        pytest.importorskip("grpc")
    names = list(CONTESTANTS) if transport == "tcp" else ["ours", BARE]
    features = np.arange(BATCH_SIZE * 64, dtype=np.float32).reshape(BATCH_SIZE, 64)
    labels = np.zeros(BATCH_SIZE, np.int64)
    for name in names:
        with connected(name, transport) as client:
            answers = [client.exchange(features, labels) for _ in range(2)]
            bursts = [client.burst(features, labels) for _ in range(2)]
        assert [len(burst) for burst in bursts] == [NUM_IN_FLIGHT] * 2
        assert {brought(back) for back in chain(answers, *bursts)} == {features.tobytes()}, name


def test_contestants_take_turns() -> None:
    times = compare(["ours", BARE], "ipc", [4096], num_repeats=2)
    assert {name: len(repeats) for name, repeats in times[4096].items()} == {"ours": 2, BARE: 2}
