"""The benchmark of encoding beside computing: its figures by hand, and one run so small that only the bits count."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from benchmarks.micro.answers import Way
from benchmarks.micro.overlap import Case, Times, cases_of, connected, fitting_steps, row
from workers import timing
from workers.sender import FEWEST_NUMBERS_BESIDE

CASE = Case("har", "int8", batch_size=16, num_parts=4, megabits_per_second=0.0, num_steps=2)


def test_the_first_step_does_not_count_and_the_others_do_as_their_mean() -> None:
    """Three steps in two parts: 9 s, then 1 s and 3 s. First parts 0.5 and 1 s, last parts 0.75 and 2 s after."""
    times = Times.of([0.0, 9.0, 10.0, 13.0], [1.0, 2.0, 9.5, 9.75, 11.0, 12.0])
    assert times == Times(step_seconds=2.0, first_out_seconds=0.75, last_out_seconds=1.375)


def test_a_row_by_hand() -> None:
    """Ratios of two repeats: steps 0.5 and 1, first parts 1 and 0.5, last parts 0.25 and 0.75; 2 and 4 s a step."""
    pairs = [(Times(2.0, 1.0, 2.0), Times(1.0, 1.0, 0.5)), (Times(4.0, 1.0, 2.0), Times(4.0, 0.5, 1.5))]
    cells = [cell.strip() for cell in row(CASE, pairs).split("|")]
    assert cells == ["har", "int8", "16", "4", "no limit", "3000.00", "0.750 (0.625 to 0.875)", "0.750", "0.500"]


def test_a_way_carries_one_message_after_the_other() -> None:
    """8 Mb/s are 10^6 bytes/s: 2 MB sent at 1 s are there at 3 s, 1 MB sent at 2 s at 4 s; sent at 10 s, at 11 s."""
    way = Way(8.0)
    assert [way.carry(1.0, 2_000_000), way.carry(2.0, 10**6), way.carry(10.0, 10**6)] == pytest.approx([3, 4, 11])
    assert Way(0.0).carry(1.0, 10**6) == 1.0


def test_a_round_over_a_slow_link_has_fewer_steps() -> None:
    """0.5 s at 16 Mb/s are 10^6 bytes: five steps of 200 kB, and never fewer than four."""
    assert [fitting_steps(200_000, rate, 20) for rate in (0.0, 160.0, 16.0, 1.0)] == [20, 20, 5, 4]
    cases = list(cases_of("har", ["bf16", "topk(0.1)"], [64], 4, [16.0], 20))
    assert [case.num_steps for case in cases] == [4, 4]  # fp16 gradients: 64 * 2048 * 2 bytes either way


def test_with_and_without_the_thread_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps in four parts the second has three parts for the thread, where no slow answer holds it up."""
    monkeypatch.setattr(timing, "HELD_UP_SHARE", math.inf)
    assert CASE.batch_size // CASE.num_parts * 2048 >= FEWEST_NUMBERS_BESIDE
    own_thread = threading.get_ident()
    with connected(CASE) as worker:
        _, alone = worker.play(has_thread=False)
        assert worker.link.threads == [own_thread] * 8
        times, beside = worker.play(has_thread=True)
        are_own = [thread == own_thread for thread in worker.link.threads]
    assert are_own == [True] * 4 + [False] * 3 + [True]
    assert 0 < times.first_out_seconds < times.last_out_seconds < times.step_seconds
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
