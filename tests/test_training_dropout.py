"""Seeded dropout: its statistics, and that its masks depend on the seed only."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mergesfl.errors import ConfigError, MergeSFLError
from mergesfl.training.dropout import SeededDropout, replace_dropout, seed_dropout, seed_dropout_groups

torch.set_num_threads(1)


def masks(seed: int, num_masks: int = 3) -> list[torch.Tensor]:
    layer = SeededDropout(0.5)
    layer.reseed(seed)
    return [layer(torch.ones(64)) for _ in range(num_masks)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_zeros_and_scale(p: float) -> None:
    layer = SeededDropout(p)
    layer.reseed(0)
    n = 100_000
    y = layer(torch.ones(n))
    zeros = int((y == 0).sum())
    # Binomial(n, p): five standard deviations; the rest is scaled by 1 / (1 - p).
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))


@pytest.mark.parametrize(("mask", "own_dims"), [("element", 4), ("channel", 2), ("sample", 1), ("batch", 0)])
def test_what_is_dropped_together(mask: str, own_dims: int) -> None:
    layer = SeededDropout(0.5, mask)
    layer.reseed(1)
    y = layer(torch.ones(8, 8, 4, 4))  # values 0 or 2
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    groups = y.flatten(own_dims) if own_dims < 4 else y.unsqueeze(-1)
    assert torch.equal(groups.amin(-1), groups.amax(-1))  # one draw for each group
    if own_dims:
        assert 0 < float(y.mean()) < 2  # and not one for all


def test_masks_are_a_function_of_the_seed_and_the_count() -> None:
    first, again, other = masks(7), masks(7), masks(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = masks(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(7), strict=True))


def test_evaluation_and_p_zero_are_the_identity_even_without_a_seed() -> None:
    x = torch.randn(5)
    assert SeededDropout(0.5).eval()(x) is x
    assert SeededDropout(0.0)(x) is x


def test_p_one_drops_all() -> None:
    layer = SeededDropout(1.0)
    layer.reseed(0)
    assert layer(torch.ones(9)).tolist() == [0.0] * 9


def test_unseeded_training_is_an_error() -> None:
    with pytest.raises(MergeSFLError, match="seed_dropout"):
        SeededDropout(0.5)(torch.ones(2))


def test_the_gradient_passes_through_the_same_mask() -> None:
    layer = SeededDropout(0.5)
    layer.reseed(0)
    x = torch.ones(50, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_layers_have_streams_of_their_own_by_name() -> None:
    net = nn.Sequential(SeededDropout(0.5), SeededDropout(0.5))
    seed_dropout(net, 3)
    x = torch.ones(200)
    a, b = net[0](x), net[1](x)
    assert not torch.equal(a, b)
    part = nn.Sequential()
    part.add_module("1", SeededDropout(0.5))  # the same name in another module: the same stream
    seed_dropout(part, 3)
    assert torch.equal(part(x), b)
    seed_dropout(net, 3)
    assert torch.equal(net[0](x), a)


def test_a_copy_continues_the_stream() -> None:
    layer = SeededDropout(0.5)
    unseeded = copy.deepcopy(layer)
    layer.reseed(0)
    x = torch.ones(100)
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), twin(x))
    with pytest.raises(MergeSFLError):
        unseeded(x)


def test_another_device_starts_the_stream_of_the_same_seed() -> None:
    layer = SeededDropout(0.5)
    layer.reseed(4)
    if torch.cuda.is_available():
        x = torch.ones(100, device="cuda")
        a = layer.to("cuda")(x)
        layer.reseed(4)
        assert torch.equal(layer(x), a)
        layer.cpu()
    assert torch.equal(layer(torch.ones(64)), masks(4)[0])


def test_replacement_keeps_p_kind_and_mode() -> None:
    net = nn.Sequential(
        nn.Dropout(0.1), nn.Sequential(nn.Dropout1d(0.2), nn.Dropout2d(0.3)), nn.Dropout3d(0.4), nn.Linear(2, 2)
    ).eval()
    assert replace_dropout(net) is net
    kinds = [(m.p, m.mask, m.training) for m in net.modules() if isinstance(m, SeededDropout)]
    assert kinds == [(0.1, "element", False), (0.2, "channel", False), (0.3, "channel", False), (0.4, "channel", False)]
    assert not any(isinstance(m, nn.modules.dropout._DropoutNd) for m in net.modules())
    assert isinstance(replace_dropout(nn.Dropout(0.3)), SeededDropout)
    assert "p=0.1, mask=element" in repr(net)


def test_what_cannot_be_seeded_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer '0' is a AlphaDropout"):
        replace_dropout(nn.Sequential(nn.AlphaDropout()))
    with pytest.raises(ConfigError, match=r"1.5 is outside \[0, 1\]"):
        SeededDropout(1.5)
    with pytest.raises(ConfigError, match="'row' is unknown"):
        SeededDropout(0.5, "row")


@pytest.mark.parametrize("mask", ["element", "channel", "sample", "batch"])
def test_rows_of_a_batch_get_the_masks_of_the_batch(mask: str) -> None:
    whole, part = SeededDropout(0.5, mask), SeededDropout(0.5, mask)
    x = torch.randn(7, 3, 4, 4)
    for layer in (whole, part):
        layer.reseed(5)
    expected = [whole(x), whole(x)]
    part.take_rows(2, 5, 7)
    assert all(torch.equal(part(x[2:5]), y[2:5]) for y in expected)
    with pytest.raises(MergeSFLError, match="got 4 rows, its shard of the batch has 3"):
        part(x[:4])
    part.take_all_rows()
    assert torch.equal(part(x), whole(x))


def test_an_unused_seed_can_be_handed_on() -> None:
    layer = SeededDropout(0.5)
    with pytest.raises(MergeSFLError, match="missing"):
        layer.unused_seed()
    layer.reseed(2**64 - 1)
    assert layer.unused_seed() == 2**64 - 1
    layer(torch.ones(2))
    with pytest.raises(MergeSFLError, match="used up"):
        layer.unused_seed()


@pytest.mark.parametrize("mask", ["element", "channel", "sample", "batch"])
def test_each_group_of_a_batch_gets_the_masks_that_it_gets_alone(mask: str) -> None:
    groups = [(5, 2), (2**64 - 1, 1), (7, 4)]
    together, alone = SeededDropout(0.5, mask), SeededDropout(0.5, mask)
    x = torch.randn(7, 3, 4, 4)
    together.reseed_groups(groups)
    first, twin = together(x), copy.deepcopy(together)
    second = together(x)
    assert torch.equal(twin(x), second)
    assert not torch.equal(first, second)
    begin = 0
    for seed, rows in groups:
        alone.reseed(seed)
        part = slice(begin, begin + rows)
        assert torch.equal(alone(x[part]), first[part])
        assert torch.equal(alone(x[part]), second[part])
        begin += rows
    with pytest.raises(MergeSFLError, match="got 6 rows of groups with 7"):
        together(x[:6])
    with pytest.raises(MergeSFLError, match="used up"):
        together.unused_seed()
    together.reseed_groups(groups)
    with pytest.raises(MergeSFLError, match="missing"):  # of all rows there is none
        together.unused_seed()


def test_groups_seed_layers_by_name_as_one_seed_does() -> None:
    net = nn.Sequential(SeededDropout(0.5), SeededDropout(0.5))
    x = torch.ones(6, 50)
    seed_dropout_groups(net, [(3, 2), (4, 4)])
    y = net(x)
    for seed, part in ((3, slice(0, 2)), (4, slice(2, 6))):
        seed_dropout(net, seed)
        assert torch.equal(net(x[part]), y[part])
