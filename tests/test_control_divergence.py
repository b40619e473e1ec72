"""Label divergence, times and priorities: Eq. 7, 11, 12, 13 and W by hand, and what is known of KL in general."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergesfl.control.divergence import (
    idle_seconds,
    kl_nats,
    kl_of_masses,
    label_distributions,
    log_reference,
    mean_distribution,
    mixture,
    priorities,
    round_seconds,
)


def test_distributions_and_their_mean() -> None:
    distributions = label_distributions([[3, 1], [0, 0], [0, 5]])
    assert distributions.tolist() == [[0.75, 0.25], [0.0, 0.0], [0.0, 1.0]]
    assert mean_distribution(distributions).tolist() == [0.375, 0.625]  # of the two workers that have samples
    with pytest.raises(ValueError, match="none of 1 workers"):
        mean_distribution(np.zeros((1, 2)))


def test_mixture_by_hand() -> None:
    # (3 * [.75, .25] + 1 * [0, 1]) / 4
    assert mixture(np.array([3, 1]), np.array([[0.75, 0.25], [0.0, 1.0]])).tolist() == [0.5625, 0.4375]


def test_kl_by_hand() -> None:
    # 1/2 ln((1/2) / (1/4)) + 1/2 ln((1/2) / (3/4)) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)
    assert kl_nats(np.array([0.5, 0.5]), np.array([0.25, 0.75])) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert kl_nats(np.array([1.0, 0.0]), np.array([0.25, 0.75])) == pytest.approx(math.log(4))  # 0 ln 0 = 0


def test_kl_of_a_missing_reference_label_is_huge_but_finite_and_ordered() -> None:
    q = np.array([1.0, 0.0])
    some, more = kl_nats(np.array([0.9, 0.1]), q), kl_nats(np.array([0.5, 0.5]), q)
    assert 2 < some < more < 30


def test_kl_identities() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        p, q, r = generator.dirichlet(np.ones(5), size=3)
        assert kl_nats(p, p) == pytest.approx(0, abs=1e-14)
        assert kl_nats(p, q) >= 0.5 * np.abs(p - q).sum() ** 2 - 1e-12  # Pinsker
        # convex in p; the same after a permutation of the labels; masses need no normalisation
        assert kl_nats((p + r) / 2, q) <= (kl_nats(p, q) + kl_nats(r, q)) / 2 + 1e-12
        assert kl_nats(p[::-1], q[::-1]) == pytest.approx(kl_nats(p, q), abs=1e-14)
        assert kl_of_masses(37 * p[None], log_reference(q))[0] == pytest.approx(float(np.sum(p * np.log(p / q))))
    assert kl_of_masses(np.zeros((1, 2)), log_reference(np.array([0.5, 0.5])))[0] == 0


def test_times_by_hand() -> None:
    # tau 10: t = 10 * (4 * .5, 2 * .25, 1 * 1) = 20, 5, 10; W = (0 + 15 + 10) / 3
    seconds = round_seconds(np.array([4, 2, 1]), np.array([0.5, 0.25, 1.0]), 10)
    assert seconds.tolist() == [20.0, 5.0, 10.0]
    assert idle_seconds(seconds) == pytest.approx(25 / 3)
    assert idle_seconds(np.array([3.0])) == 0
    assert idle_seconds(np.array([])) == 0


def test_priorities_by_hand() -> None:
    # K = 0, 1, 3: sum (K + 1) = 1 + 2 + 4 = 7
    assert priorities([0, 1, 3]).tolist() == [7.0, 3.5, 1.75]
