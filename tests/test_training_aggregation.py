"""The weighted mean of states, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergesfl.errors import RemoteProtocolError
from mergesfl.training.aggregation import weighted_mean


def test_by_hand() -> None:
    # weights 1 and 3: (1 * 4 + 3 * 8) / 4 = 7 and (1 * 0 + 3 * -4) / 4 = -3; the counter is the first one's.
    first = {"w": torch.tensor([4.0, 0.0]), "count": torch.tensor(5), "flag": torch.tensor(True)}
    second = {"w": torch.tensor([8.0, -4.0]), "count": torch.tensor(9), "flag": torch.tensor(False)}
    mean = weighted_mean([first, second], [1, 3])
    assert mean["w"].tolist() == [7.0, -3.0]
    assert mean["count"].item() == 5 and mean["flag"].item() is True
    assert list(mean) == ["w", "count", "flag"]


def test_inputs_are_neither_changed_nor_shared() -> None:
    states = [{"w": torch.ones(3, requires_grad=True), "n": torch.tensor(1)} for _ in range(2)]
    mean = weighted_mean(states, [2.0, 2.0])
    mean["w"].add_(1)
    mean["n"].add_(1)
    assert all(torch.equal(s["w"].detach(), torch.ones(3)) and s["n"].item() == 1 for s in states)
    assert not mean["w"].requires_grad
    alone = weighted_mean(states[:1], [1.0])
    alone["w"].add_(1)
    assert torch.equal(states[0]["w"].detach(), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [1.0, 0.1, 7.0, 1e-300])
def test_one_state_comes_back_to_the_bit(dtype: torch.dtype, weight: float) -> None:
    state = {"w": torch.randn(1000).to(dtype)}
    mean = weighted_mean([state], [weight])
    assert mean["w"].dtype == dtype
    assert torch.equal(mean["w"], state["w"])


def test_half_precision_is_accumulated_in_float32() -> None:
    """4096 states of 1.0: a float16 sum of 2**-12 stops at 0.5, where its spacing is 2**-11 (ties go to even)."""
    states = [{"w": torch.ones(1, dtype=torch.float16)}] * 4096
    naive = torch.zeros(1, dtype=torch.float16)
    for state in states:
        naive += state["w"] / 4096
    assert naive.item() == 0.5
    assert weighted_mean(states, [1.0] * 4096)["w"].item() == 1.0


def test_weight_zero_adds_nothing_even_if_broken() -> None:
    states = [{"w": torch.tensor([float("nan")])}, {"w": torch.tensor([2.5])}]
    assert weighted_mean(states, [0.0, 4.0])["w"].item() == 2.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(-1e3, 1e3)), min_size=1, max_size=8))
def test_against_exact_fractions(rows: list[tuple[int, float]]) -> None:
    from fractions import Fraction

    states = [{"w": torch.tensor([value], dtype=torch.float64)} for _, value in rows]
    mean = weighted_mean(states, [weight for weight, _ in rows])["w"].item()
    exact = sum(Fraction(w) * Fraction(v) for w, v in rows) / sum(w for w, _ in rows)
    assert mean == pytest.approx(float(exact), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, "state 1 lacks 'w'"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "state 1 has the unknown tensor 'v'"),
        ({"w": torch.zeros(3)}, r"state 1 has 'w' as \(3,\) torch.float32, expected \(2,\)"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "torch.float64, expected"),
    ],
)
def test_different_states_are_refused(second: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        weighted_mean([{"w": torch.zeros(2)}, second], [1.0, 1.0])


@pytest.mark.parametrize("weights", [[], [1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_illegal_weights_are_refused(weights: list[float]) -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="weight"):
        weighted_mean([state, state], weights)
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean([], [])
