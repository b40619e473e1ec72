"""Endless batches: epochs by hand, resuming, and every worker that is too small for its batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergesfl.data import Batches, Scale
from mergesfl.data.scale import IDENTITY
from mergesfl.errors import CheckpointError, ConfigError


def stream(num_samples: int, batch_size: int, seed: int = 0, **more: Any) -> Batches:
    """Sample i is the number 10 i with the label i, so that a batch shows which rows it holds."""
    x = 10 * np.arange(num_samples, dtype=np.float32)[:, None]
    y = np.arange(num_samples, dtype=np.int64)
    return Batches(
        x, y, batch_size, np.random.default_rng(seed), more.get("scale", IDENTITY), more.get("augment", False)
    )


def rows(batches: Batches, num_batches: int) -> list[int]:
    return [int(label) for _ in range(num_batches) for label in next(batches)[1]]


def test_batches_are_the_generators_permutations_one_after_the_other() -> None:
    # n = 5, d = 3: five batches are 15 rows, that is three epochs, cut as 3, 2+1, 3, 1+2, 3.
    generator = np.random.default_rng(7)
    expected = np.concatenate([generator.permutation(5) for _ in range(3)])
    assert rows(stream(5, 3, seed=7), 5) == expected.tolist()


def test_inputs_belong_to_their_labels_and_have_the_promised_types() -> None:
    x, y = next(stream(9, 4))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (4, 1) and y.shape == (4,)
    assert torch.equal(x[:, 0], 10.0 * y)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_every_epoch_holds_every_sample_once_whatever_the_batch_size(n: int, d: int, seed: int) -> None:
    drawn = rows(stream(n, d, seed), n)  # n batches of d: exactly d epochs
    assert all(sorted(drawn[epoch * n : epoch * n + n]) == list(range(n)) for epoch in range(d))


def test_fewer_samples_than_the_batch_repeat_evenly() -> None:
    drawn = rows(stream(3, 8), 1)  # two whole epochs and two samples of the third
    assert sorted(drawn.count(row) for row in range(3)) == [2, 3, 3]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 7))
def test_resuming_is_continuing(n: int, d: int, num_before: int) -> None:
    one = stream(n, d, seed=3)
    rows(one, num_before)
    state = json.loads(json.dumps(one.state_dict()))
    two = stream(n, d, seed=99)
    two.load_state_dict(state)
    assert rows(two, 6) == rows(one, 6)


def test_resuming_continues_the_augmentation_too() -> None:
    scale = Scale(255.0, (0.5,), (0.5,), flip=True, crop_padding_pixels=2)
    x = np.random.default_rng(0).integers(0, 256, size=(7, 1, 6, 6), dtype=np.uint8)
    y = np.zeros(7, dtype=np.int64)
    one, two = (Batches(x, y, 4, np.random.default_rng(seed), scale, True) for seed in (1, 2))
    next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(4):
        assert torch.equal(next(one)[0], next(two)[0])


def test_a_state_is_a_snapshot() -> None:
    one = stream(6, 4)
    state = one.state_dict()
    first = rows(one, 3)
    one.load_state_dict(state)
    assert rows(one, 3) == first


def test_augmentation_happens_only_when_asked_for() -> None:
    scale = Scale(flip=True, crop_padding_pixels=3)
    x = np.arange(1, 73, dtype=np.uint8).reshape(2, 1, 6, 6)
    y = np.array([0, 1])
    plain = Batches(x, y, 2, np.random.default_rng(0), scale, False)
    inputs, labels = next(plain)
    assert np.array_equal(inputs.numpy(), x[labels.numpy()].astype(np.float32))
    changed = Batches(x, y, 2, np.random.default_rng(0), scale, True)
    assert any(
        not np.array_equal(a.numpy(), x[b.numpy()].astype(np.float32)) for a, b in (next(changed) for _ in "12345")
    )


def test_writing_into_a_batch_leaves_the_data_alone() -> None:
    x, y = np.ones((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64)
    inputs, labels = next(Batches(x, y, 4, np.random.default_rng(0), IDENTITY, False))
    inputs += 5
    labels += 5
    assert (x == 1).all() and (y == 0).all()


def test_global_randomness_is_not_touched() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    before_numpy, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    rows(stream(5, 3), 4)
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # type: ignore[index]
    assert torch.equal(before_torch, torch.get_rng_state())


def test_no_samples_no_batch_and_unequal_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 samples"):
        stream(0, 4)
    with pytest.raises(ConfigError, match="batch size is 0"):
        stream(4, 0)
    with pytest.raises(ConfigError, match="3 samples and 2 labels"):
        Batches(np.zeros((3, 1), np.float32), np.zeros(2, np.int64), 1, np.random.default_rng(0), IDENTITY, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 6}, "over 6 samples, but this has 5"),
        ({"rest": [0, 5]}, "rows outside 0..4"),
        ({"rest": [1, 1]}, "twice"),
        ({"rest": "x"}, "damaged"),
        ({"generator": {"bit_generator": "MT19937"}}, "generator does not fit"),
        ({"generator": None}, "damaged"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    batches = stream(5, 2)
    with pytest.raises(CheckpointError, match=message):
        batches.load_state_dict({**batches.state_dict(), **change})
    with pytest.raises(CheckpointError, match="num_samples"):
        batches.load_state_dict({})
