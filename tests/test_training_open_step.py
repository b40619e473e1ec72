"""A merged step fed in parts: equal to the merged step in float64, whatever the parts; by hand when a worker is lost.

Legend: D merged samples, d_i samples of worker i, F features of a sample, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.training.merging import OpenStep, merged_step
from mergesfl.training.momentum import make_momentum_sgd
from mergesfl.training.schedule import make_sgd

torch.set_num_threads(1)

SIZES = (1, 3, 7, 2, 16)  # d_i; D = 29
RATE = 0.3
ATOL = 1e-12


def small_top() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def step_data(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    zs = [torch.randn(d, 5, generator=generator, dtype=torch.float64).to(dtype) for d in SIZES]  # (d_i, F)
    return zs, [torch.randint(0, 3, (d,), generator=generator) for d in SIZES]  # (d_i,)


def play(
    top: nn.Module, groups: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64, in_order: bool = False
) -> tuple[list[Tensor], float]:
    """One step of SGD in these groups of workers; the gradients by worker, the loss."""
    zs, ys = step_data(dtype)
    step = OpenStep(top, make_sgd(top.parameters(), RATE), sum(SIZES), in_order)
    gradients: list[Tensor] = [torch.empty(0)] * len(SIZES)
    fed: list[int] = []
    for group in groups:
        for i, gradient in zip(group, step.feed([zs[i] for i in group], [ys[i] for i in group]), strict=True):
            gradients[i] = gradient
        fed.append(group[0])
    return gradients, step.close(sorted(range(len(fed)), key=fed.__getitem__))


@st.composite
def groupings(draw: st.DrawFn) -> list[list[int]]:
    """The workers in any order, cut into groups anywhere."""
    order = draw(st.permutations(range(len(SIZES))))
    cuts = sorted(draw(st.sets(st.integers(1, len(SIZES) - 1))))
    return [list(order[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(SIZES)], strict=True)]


@settings(deadline=None)
@given(groups=groupings(), momentum=st.sampled_from([0.0, 0.9]))
def test_any_grouping_in_any_order_is_the_merged_step(groups: list[list[int]], momentum: float) -> None:
    """Gradients, loss and two steps of the top, also with momentum."""
    one, other = small_top(), small_top()
    sgds = [make_momentum_sgd(top.parameters(), RATE, momentum) for top in (one, other)]
    zs, ys = step_data()
    for _ in range(2):
        expected = merged_step(one, sgds[0], zs, ys)
        step = OpenStep(other, sgds[1], sum(SIZES))
        for group in groups:
            gradients = step.feed([zs[i] for i in group], [ys[i] for i in group])
            for i, gradient in zip(group, gradients, strict=True):
                assert torch.allclose(gradient, expected.gradients[i], rtol=0, atol=ATOL)
        assert step.close() == pytest.approx(expected.loss_nats, abs=ATOL)
    assert_close(one, other)


def assert_close(one: nn.Module, other: nn.Module) -> None:
    moved = small_top().state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, rtol=0, atol=ATOL), name
        assert (tensor - moved[name]).abs().max() > 1e-3, name


def test_in_order_is_the_merged_step_too() -> None:
    one, other = small_top(), small_top()
    zs, ys = step_data()
    expected = merged_step(one, make_sgd(one.parameters(), RATE), zs, ys)
    gradients, loss_nats = play(other, [[3], [0], [4], [1], [2]], in_order=True)
    for gradient, merged in zip(gradients, expected.gradients, strict=True):
        assert torch.allclose(gradient, merged, rtol=0, atol=ATOL)
    assert loss_nats == pytest.approx(expected.loss_nats, abs=ATOL)
    assert_close(one, other)


def test_one_group_of_all_is_the_former_merged_step_to_the_bit() -> None:
    """In float32, against the step written out: forward, mean loss, backward, step, slices times D / d_i."""
    top, twin = small_top().float(), small_top().float()
    zs, ys = step_data(torch.float32)
    gradients, loss_nats = play(top, [range(len(SIZES))], torch.float32)
    sgd = make_sgd(twin.parameters(), RATE)
    merged = torch.cat(zs).requires_grad_()  # (D, F)
    loss = functional.cross_entropy(twin(merged), torch.cat(ys))
    loss.backward()  # type: ignore[no-untyped-call]
    sgd.step()
    assert merged.grad is not None
    for gradient, raw, d in zip(gradients, torch.split(merged.grad, SIZES), SIZES, strict=True):
        assert torch.equal(gradient, raw * (sum(SIZES) / d))
    assert loss_nats == float(loss.detach())
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in top.state_dict().items())


def test_in_order_the_order_of_arrival_leaves_no_bit() -> None:
    """In float32; fed as they come, not in order, the sums do differ."""
    orders = [[[0], [1], [2], [3], [4]], [[4], [2], [0], [3], [1]], [[3], [4], [1], [0], [2]]]
    kept, loose = [], []
    for order in orders:
        for in_order, results in ((True, kept), (False, loose)):
            top = small_top().float()
            gradients, loss_nats = play(top, order, torch.float32, in_order)
            results.append((*top.state_dict().values(), *gradients, torch.tensor(loss_nats, dtype=torch.float64)))
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(loose[0], loose[1], strict=True))


@pytest.mark.parametrize("in_order", [False, True])
def test_a_lost_worker_by_hand(in_order: bool) -> None:
    """Top = one linear layer of zeros, 2 classes; d = (1, 2, 3), D = 6, and the third worker never comes.

    A logit's gradient is softmax - onehot = (-1/2, 1/2) for label 0. Over the three samples that were fed, labels 0,
    0, 1, the mean is (-1/6, 1/6): that is the bias' gradient, weights 1/3 and 2/3. Without renormalising it would be
    half of it, and the loss (ln 2) / 2.
    """
    top = nn.Linear(2, 2).double()
    nn.init.zeros_(top.weight)
    nn.init.zeros_(top.bias)
    step = OpenStep(top, make_sgd(top.parameters(), 1.0), num_samples=6, in_order=in_order)
    (first,) = step.feed([torch.zeros(1, 2, dtype=torch.float64)], [torch.tensor([0])])
    (second,) = step.feed([torch.zeros(2, 2, dtype=torch.float64)], [torch.tensor([0, 1])])
    assert torch.equal(top.bias, torch.zeros(2, dtype=torch.float64))  # not yet
    assert step.close() == pytest.approx(0.6931471805599453, abs=ATOL)
    assert torch.allclose(top.bias, torch.tensor([1 / 6, -1 / 6], dtype=torch.float64), atol=ATOL)
    assert first.shape == (1, 2) and second.shape == (2, 2)


def test_a_gradient_that_was_sent_does_not_change_when_a_worker_is_lost() -> None:
    """It is that of the worker's own mean loss: D does not enter."""
    zs, ys = step_data()
    top = small_top()
    merged = merged_step(copy.deepcopy(top), make_sgd(top.parameters(), RATE), zs[:2], ys[:2])
    step = OpenStep(top, make_sgd(top.parameters(), RATE), sum(SIZES))
    for i in range(2):
        (gradient,) = step.feed([zs[i]], [ys[i]])
        assert torch.allclose(gradient, merged.gradients[i], rtol=0, atol=ATOL)


def test_old_gradients_of_the_top_do_not_count() -> None:
    one, other = small_top(), small_top()
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    play(one, [[0, 1, 2, 3, 4]])
    play(other, [[0, 1, 2, 3, 4]])
    assert_close(one, other)


# A worker's batch in parts.


@st.composite
def parts_in_groups(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Every worker's rows cut anywhere, fed in any order, in groups cut anywhere: (worker, begin, end)."""
    pieces = []
    for worker, size in enumerate(SIZES):
        cuts = sorted(draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=3))) if size > 1 else []
        pieces += [(worker, begin, end) for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]
    order = draw(st.permutations(pieces))
    cuts = sorted(draw(st.sets(st.integers(1, len(order) - 1))))
    return [list(order[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]


@settings(deadline=None)
@given(groups=parts_in_groups(), momentum=st.sampled_from([0.0, 0.9]), in_order=st.booleans())
def test_batches_in_parts_are_the_merged_step(
    groups: list[list[tuple[int, int, int]]], momentum: float, in_order: bool
) -> None:
    """Each part gets its rows of the gradient of its worker's mean loss over all d_i; the top steps alike, twice."""
    one, other = small_top(), small_top()
    sgds = [make_momentum_sgd(top.parameters(), RATE, momentum) for top in (one, other)]
    zs, ys = step_data()
    for _ in range(2):
        expected = merged_step(one, sgds[0], zs, ys)
        step = OpenStep(other, sgds[1], sum(SIZES), in_order)
        for group in [[piece] for pieces in groups for piece in pieces] if in_order else groups:
            gradients = step.feed(
                [zs[i][begin:end] for i, begin, end in group],
                [ys[i][begin:end] for i, begin, end in group],
                batch_sizes=[SIZES[i] for i, _, _ in group],
            )
            for (i, begin, end), gradient in zip(group, gradients, strict=True):
                assert torch.allclose(gradient, expected.gradients[i][begin:end], rtol=0, atol=ATOL)
        assert step.close() == pytest.approx(expected.loss_nats, abs=ATOL)
    assert_close(one, other)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_worker_that_is_lost_between_its_parts_by_hand(in_order: bool) -> None:
    """Top = one linear layer of zeros, 2 classes; d = (1, 4), D = 5, and of the four samples only the first two come.

    Fed are labels 0, 0, 1: as above the mean of the bias' gradient is (-1/6, 1/6), whatever the others would have been.
    What was sent back before is of the mean over all four: a logit's gradient -1/2 * weight ... with unit weights
    (row 0: 1, row 1: 0) dz = (p - onehot) W / 4 = ((1/2 - 1) / 4) = -1/8 for label 0 and +1/8 for label 1.
    """
    top = nn.Linear(1, 2).double()
    with torch.no_grad():
        top.weight.copy_(torch.tensor([[1.0], [0.0]]))
        top.bias.zero_()
    step = OpenStep(top, make_sgd(top.parameters(), 1.0), num_samples=5, in_order=in_order)
    step.feed([torch.zeros(1, 1, dtype=torch.float64)], [torch.tensor([0])], batch_sizes=[1])
    (part,) = step.feed([torch.zeros(2, 1, dtype=torch.float64)], [torch.tensor([0, 1])], batch_sizes=[4])
    assert torch.allclose(part, torch.tensor([[-1 / 8], [1 / 8]], dtype=torch.float64), atol=ATOL)
    assert step.close() == pytest.approx(0.6931471805599453, abs=ATOL)
    assert torch.allclose(top.bias, torch.tensor([1 / 6, -1 / 6], dtype=torch.float64), atol=ATOL)
