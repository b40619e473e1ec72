"""The load benchmark at a tiny size: live workers that replay features through a whole run of the real server."""

from __future__ import annotations

import pytest

from benchmarks.micro.load import Load, Served, measure


def test_every_replayed_worker_takes_part_in_every_step() -> None:
    load = Load(num_workers=3, batch_size=2, num_steps=4, num_rounds=2)
    served = measure(load)
    assert served.num_samples_trained == 3 * 2 * 4 * 2
    assert len(served.step_seconds) == 2 * (4 - 1)  # between the steps of a round, not between rounds
    assert served.peak_bytes > 0 and served.cpu_seconds > 0 and served.pure_seconds > 0


def test_figures_by_hand() -> None:
    """Four steps in 4 s, 2 CPU seconds, the top alone needs 0.4 s per step: 1.6 of 2."""
    served = Served((0.5, 0.5, 0.5, 2.5), 2.0, 0.4, 3 << 20, 0)
    assert served.pure_share == pytest.approx(0.8)
    cells = [cell.strip() for cell in served.cells().split("|")]
    assert cells == ["1.0", "500", "2440", "3", "500.0", "400.0", "0.80"]
