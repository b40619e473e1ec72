"""The mean of states that come one by one: by hand, against exact fractions, in every order, and what it keeps."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergesfl.errors import RemoteProtocolError
from mergesfl.training.state_mean import CHUNK_ELEMENTS, MAX_WEIGHT, StateMean

torch.set_num_threads(1)


def mean_of(states: list[dict[str, Tensor]], weights: list[int], order: list[int] | None = None) -> dict[str, Tensor]:
    """Of these states, added in this order."""
    mean = StateMean(states[0])
    for place in order or range(len(states)):
        mean.add(states[place], weights[place], place)
    return mean.close()


def test_by_hand() -> None:
    # Weights 1 and 3: (1 * 4 + 3 * 8) / 4 = 7 and (1 * 0 + 3 * -4) / 4 = -3; the counter is the first one's.
    first = {"w": torch.tensor([4.0, 0.0]), "count": torch.tensor(5), "flag": torch.tensor(True)}
    second = {"w": torch.tensor([8.0, -4.0]), "count": torch.tensor(9), "flag": torch.tensor(False)}
    for order in ([0, 1], [1, 0]):
        mean = mean_of([first, second], [1, 3], order)
        assert mean["w"].tolist() == [7.0, -3.0]
        assert mean["count"].item() == 5 and mean["flag"].item() is True
        assert list(mean) == ["w", "count", "flag"]


def test_a_tensor_is_averaged_over_those_that_sent_it() -> None:
    """w: (1 * 2 + 3 * 6) / 4 = 5 from both; b: 8 from the second alone; c: nobody sent it, it stays 7."""
    previous = {name: torch.tensor([value]) for name, value in (("w", 0.0), ("b", 0.0), ("c", 7.0))}
    mean = StateMean(previous)
    mean.add({"w": torch.tensor([2.0])}, 1, 0)
    mean.add({"w": torch.tensor([6.0]), "b": torch.tensor([8.0])}, 3, 1)
    result = mean.close()
    assert {name: tensor.item() for name, tensor in result.items()} == {"w": 5.0, "b": 8.0, "c": 7.0}
    assert result["c"] is not previous["c"]


MAGNITUDES = st.floats(2.0**-17, 2.0**17, width=32)
VALUES = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda value: -value))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, MAX_WEIGHT), VALUES), min_size=1, max_size=5))
def test_it_is_the_exact_mean_and_the_same_in_every_order(rows: list[tuple[int, float]]) -> None:
    """All 120 orders give the same bits. Rounded twice, to float64 and to float32: half a unit and 2**-29 of one."""
    states = [{"w": torch.tensor([value], dtype=torch.float32)} for _, value in rows]
    weights = [weight for weight, _ in rows]
    means = {
        mean_of(states, weights, list(order))["w"].numpy().tobytes()
        for order in itertools.permutations(range(len(rows)))
    }
    assert len(means) == 1
    exact = sum(Fraction(weight) * Fraction(value) for weight, value in rows) / sum(weights)
    mean = np.frombuffer(means.pop(), np.float32)[0]
    assert abs(Fraction(float(mean)) - exact) <= Fraction(float(abs(np.spacing(mean)))) * Fraction(50001, 100000)


def test_a_sum_that_float64_does_not_hold_is_exact_still() -> None:
    """2**60 + 1 - 2**60 = 1; in float64 alone the 1 is lost where it comes second."""
    values = [2.0**60, 1.0, -(2.0**60)]
    assert math.fsum(values) == 1.0 and sum(values) == 0.0
    states = [{"w": torch.tensor([value])} for value in values]
    for order in itertools.permutations(range(3)):
        assert mean_of(states, [1, 1, 1], list(order))["w"].tolist() == [torch.tensor(1 / 3).item()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [1, 7, MAX_WEIGHT])
def test_one_state_comes_back_to_the_bit(dtype: torch.dtype, weight: int) -> None:
    state = {"w": torch.randn(1000).to(dtype)}
    mean = mean_of([state], [weight])
    assert mean["w"].dtype == dtype
    assert torch.equal(mean["w"], state["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_states_are_their_own_mean(dtype: torch.dtype) -> None:
    """4096 states of 0.1: a float16 sum of 2**-12 of them would stop growing long before."""
    state = {"w": torch.tensor([0.1, -3.0], dtype=dtype)}
    assert torch.allclose(mean_of([state] * 4096, [3] * 4096)["w"], state["w"], rtol=1e-15, atol=0)


@pytest.mark.parametrize("num_elements", [CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 1])
def test_large_tensors_go_in_chunks(num_elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(num_elements, generator=generator)} for _ in range(3)]
    expected = sum(weight * state["w"].double() for weight, state in zip((2, 5, 9), states, strict=True)) / 16
    assert isinstance(expected, Tensor)
    assert torch.equal(mean_of(states, [2, 5, 9])["w"], expected.float())


@pytest.mark.parametrize("last", [True, False])
def test_it_lies_in_memory_as_the_state_before(last: bool) -> None:
    """Whatever the order of what is added is: the values are those at the same places."""
    shape, order = (4, 3, 2, 5), torch.channels_last if last else torch.contiguous_format
    values = torch.arange(120.0).reshape(shape)
    mean = StateMean({"w": torch.zeros(shape).contiguous(memory_format=order)})
    mean.add({"w": values.contiguous(memory_format=torch.channels_last)}, 1, 0)
    mean.add({"w": values + 2}, 1, 1)
    mean.add({"w": (values + 1).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)}, 1, 2)
    result = mean.close()["w"]
    assert torch.equal(result, values + 1)
    assert result.is_contiguous(memory_format=order)


def test_inputs_are_neither_changed_nor_shared_nor_kept() -> None:
    """With memory for as many states as there are workers, the third of them would be one too many."""
    previous = {"w": torch.ones(3, requires_grad=True), "n": torch.tensor(1)}
    mean = StateMean(previous)
    kept = []
    for place in range(3):
        state = {"w": torch.full((3,), 2.0, requires_grad=True), "n": torch.tensor(place)}
        mean.add(state, 1, place)
        assert state["w"].tolist() == [2.0] * 3
        kept += [weakref.ref(tensor.untyped_storage()) for tensor in state.values()]
        del state
    gc.collect()
    assert all(reference() is None for reference in kept)
    result = mean.close()
    assert not result["w"].requires_grad
    result["w"].add_(1)
    result["n"].add_(1)
    assert previous["w"].tolist() == [1.0] * 3 and previous["n"].item() == 1


@pytest.mark.parametrize("state", [{"v": torch.zeros(1)}, {"w": torch.zeros(2)}, {"w": torch.zeros(1).double()}])
def test_a_tensor_that_the_state_before_has_not_is_refused_and_nothing_added(state: dict[str, Tensor]) -> None:
    mean = StateMean({"b": torch.zeros(1), "w": torch.zeros(1)})
    mean.add({"b": torch.ones(1), "w": torch.ones(1)}, 1, 0)
    with pytest.raises(RemoteProtocolError, match=r"the state with place 1 has .*'[vw]'.*: drop this worker's update"):
        mean.add({"b": torch.full((1,), 9.0), **state}, 1, 1)
    assert {name: tensor.item() for name, tensor in mean.close().items()} == {"b": 1.0, "w": 1.0}


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1])
def test_illegal_weights_are_refused(weight: int) -> None:
    with pytest.raises(ValueError, match=f"weight {weight} of the state with place 4: expected 1 to {MAX_WEIGHT}"):
        StateMean({"w": torch.zeros(1)}).add({"w": torch.zeros(1)}, weight, 4)
