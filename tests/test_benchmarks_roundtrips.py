"""The benchmark of the transport at a tiny size, and its figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.micro.peers import BARE, BATCH_SIZE, CONTESTANTS
from benchmarks.micro.roundtrips import Times, compare, connected, num_round_trips, rows


def test_figures_by_hand() -> None:
    """Two round trips of 1 MB each way in 1 s and 3 s: 4 MB in 4 s; bare pyzmq twice as fast."""
    mine, bare = Times(10**6, (1.0, 3.0)), Times(10**6, (0.5, 1.5))
    assert mine.megabytes_per_second == pytest.approx(1.0)
    assert mine.microseconds(50) == pytest.approx(2e6)
    row, _ = rows({10**6: {"ours": [mine], BARE: [bare]}})
    assert [cell.strip() for cell in row.split("|")] == ["976", "ours", "1", "2000000", "2980000", "0.50", "2.00"]


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
            for _ in range(2):
                back = client.exchange(features, labels)
            if isinstance(back, dict):
                back = back["gradient"]
            assert bytes(back[1] if isinstance(back, list) else back) == features.tobytes(), name


def test_contestants_take_turns() -> None:
    times = compare(["ours", BARE], "ipc", [4096], num_repeats=2)
    assert {name: len(repeats) for name, repeats in times[4096].items()} == {"ours": 2, BARE: 2}
