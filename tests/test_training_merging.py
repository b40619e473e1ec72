"""Feature merging: the three identities of the method in float64, and what is refused.

Legend: D merged samples, d_i samples of worker i.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.errors import RemoteProtocolError
from mergesfl.training.aggregation import weighted_mean
from mergesfl.training.merging import joined, merge_features, merged_step, single_step
from mergesfl.training.schedule import make_sgd
from mergesfl.training.split import SplitModel

torch.set_num_threads(1)

SIZES = (1, 3, 7, 2, 16)  # d_i, unequal; D = 29
RATE = 0.3
ATOL = 1e-12


def small_cnn() -> nn.Sequential:
    torch.manual_seed(0)
    below = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    above = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    return nn.Sequential(below, above).double()


def batches() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(d, 1, 8, 8, generator=generator, dtype=torch.float64) for d in SIZES]
    ys = [torch.randint(0, 3, (d,), generator=generator) for d in SIZES]
    return xs, ys


def test_identity_a_raw_slices_are_the_joint_gradient_at_the_cut() -> None:
    """dL/dZ of the joint network over all D samples, by autograd on the whole network."""
    net = small_cnn()
    xs, ys = batches()
    z = net[0](torch.cat(xs)).detach().requires_grad_()  # (D, 4, 4, 4)
    functional.cross_entropy(net[1](z), torch.cat(ys)).backward()
    model = SplitModel(copy.deepcopy(net), "0")
    step = merged_step(model.top, make_sgd(model.top.parameters(), RATE), [net[0](x).detach() for x in xs], ys)
    raw = torch.cat([g * (d / sum(SIZES)) for g, d in zip(step.gradients, SIZES, strict=True)])
    assert z.grad is not None and z.grad.abs().max() > 1e-4
    assert torch.allclose(raw, z.grad, rtol=0, atol=ATOL)


def test_identity_b_a_scaled_slice_is_the_gradient_of_the_workers_own_mean_loss() -> None:
    net = small_cnn()
    xs, ys = batches()
    model = SplitModel(copy.deepcopy(net), "0")
    step = merged_step(model.top, make_sgd(model.top.parameters(), RATE), [net[0](x).detach() for x in xs], ys)
    own_losses = []
    for x, y, gradient in zip(xs, ys, step.gradients, strict=True):
        z = net[0](x).detach().requires_grad_()  # (d_i, 4, 4, 4)
        loss = functional.cross_entropy(net[1](z), y)  # net[1] has not stepped: the gradient is the one before the step
        loss.backward()
        own_losses.append(float(loss.detach()) * len(y))
        assert z.grad is not None
        assert torch.allclose(gradient, z.grad, rtol=0, atol=ATOL)
    assert step.loss_nats == pytest.approx(sum(own_losses) / sum(SIZES), abs=ATOL)


def largest_deviation_from_joint_sgd(share_of_scaling: float) -> float:
    """One round, tau = 1, five workers, against one SGD step of the joint network on the merged batch."""
    net = small_cnn()
    xs, ys = batches()
    joint = copy.deepcopy(net)
    sgd = make_sgd(joint.parameters(), RATE)
    functional.cross_entropy(joint(torch.cat(xs)), torch.cat(ys)).backward()
    sgd.step()
    expected = joint.state_dict()
    assert (
        min(float((net.state_dict()[key] - value).abs().max()) for key, value in expected.items()) > 1e-4
    )  # all moved

    model = SplitModel(copy.deepcopy(net), "0")
    bottoms = [copy.deepcopy(model.bottom) for _ in SIZES]
    features = [bottom(x) for bottom, x in zip(bottoms, xs, strict=True)]  # (d_i, 4, 4, 4)
    step = merged_step(model.top, make_sgd(model.top.parameters(), RATE), features, ys)
    for bottom, z, gradient, d in zip(bottoms, features, step.gradients, SIZES, strict=True):
        worker_sgd = make_sgd(bottom.parameters(), RATE)
        z.backward(gradient * (d / sum(SIZES)) ** (1.0 - share_of_scaling))
        worker_sgd.step()
    model.bottom.load_state_dict(weighted_mean([bottom.state_dict() for bottom in bottoms], SIZES))
    return max(float((value - expected[key]).abs().max()) for key, value in model.joined_state_dict().items())


def test_identity_c_one_round_of_one_step_is_one_joint_sgd_step() -> None:
    assert largest_deviation_from_joint_sgd(share_of_scaling=1.0) < ATOL


def test_without_the_dispatch_scaling_identity_c_fails() -> None:
    """A planted fault: raw slices instead of slices times D / d_i."""
    assert largest_deviation_from_joint_sgd(share_of_scaling=0.0) > 1e-4


def test_merging_keeps_the_plan_order() -> None:
    features = [torch.full((d, 2), float(i)) for i, d in enumerate((2, 1, 3))]
    labels = [torch.full((d,), i) for i, d in enumerate((2, 1, 3))]
    merged, targets = merge_features(features, labels)
    assert targets.tolist() == [0, 0, 1, 2, 2, 2]
    assert merged[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 2.0, 2.0]
    assert merged.data_ptr() != features[0].data_ptr()


def test_slices_of_one_tensor_are_joined_without_a_copy() -> None:
    whole = torch.arange(48.0).reshape(6, 2, 4)
    parts = list(torch.split(whole, [2, 1, 3]))
    assert torch.equal(joined(parts), whole) and joined(parts).data_ptr() == whole.data_ptr()
    assert joined(parts[1:]).data_ptr() == parts[1].data_ptr()
    assert torch.equal(joined(parts[1:]), whole[2:])


def test_gradients_leave_as_slices_of_one_buffer() -> None:
    """What a worker is sent needs no copy: each slice begins where the one before ends."""
    model = SplitModel(small_cnn(), "0")
    xs, ys = batches()
    features = [model.bottom(x).detach() for x in xs]
    gradients = merged_step(model.top, make_sgd(model.top.parameters(), RATE), features, ys).gradients
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    for one, following in itertools.pairwise(gradients):
        assert following.storage_offset() == one.storage_offset() + one.numel()


@pytest.mark.parametrize("order", [(0, 2), (1, 0), (0, 0), (2, 1)])
def test_slices_in_another_order_or_with_gaps_are_copied(order: tuple[int, int]) -> None:
    parts = torch.split(torch.arange(48.0).reshape(6, 8), 2)
    chosen = [parts[index] for index in order]
    assert torch.equal(joined(chosen), torch.cat(chosen))
    assert joined(chosen).data_ptr() not in [part.data_ptr() for part in parts]
    columns = list(torch.split(torch.arange(48.0).reshape(6, 8), 4, dim=1))
    assert torch.equal(joined(columns), torch.cat(columns))


def test_a_step_on_slices_of_one_tensor_equals_one_on_copies_to_the_bit() -> None:
    torch.manual_seed(0)
    whole, labels = torch.randn(sum(SIZES), 16), torch.randint(0, 3, (sum(SIZES),))
    top, twin = nn.Linear(16, 3), nn.Linear(16, 3)
    twin.load_state_dict(top.state_dict())
    slices, targets = torch.split(whole, SIZES), torch.split(labels, SIZES)
    one = merged_step(top, make_sgd(top.parameters(), RATE), slices, targets)
    two = merged_step(twin, make_sgd(twin.parameters(), RATE), [z.clone() for z in slices], targets)
    assert torch.equal(top.weight, twin.weight) and one.loss_nats == two.loss_nats
    assert all(torch.equal(g, h) for g, h in zip(one.gradients, two.gradients, strict=True))
    assert not whole.requires_grad


def test_by_hand_in_float32() -> None:
    """Top = identity weights, 2 classes, two workers of 1 and 2 samples, all features zero: softmax is (1/2, 1/2).

    dL/dlogits of a sample is (softmax - onehot) / D = (-1/2, 1/2) / 3 for label 0; scaled by D / d_i: / 1 and / 2.
    The loss is ln 2. The bias steps by -1 * sum over samples: labels 0, 0, 1 give (-1/2 - 1/2 + 1/2) / 3 = -1/6.
    """
    top = nn.Linear(2, 2)
    with torch.no_grad():
        top.weight.copy_(torch.eye(2))
        top.bias.zero_()
    step = merged_step(
        top,
        make_sgd(top.parameters(), 1.0),
        [torch.zeros(1, 2), torch.zeros(2, 2)],
        [torch.tensor([0]), torch.tensor([0, 1])],
    )
    assert step.gradients[0].dtype == torch.float32
    assert torch.allclose(step.gradients[0], torch.tensor([[-0.5, 0.5]]))
    assert torch.allclose(step.gradients[1], torch.tensor([[-0.25, 0.25], [0.25, -0.25]]))
    assert step.loss_nats == pytest.approx(0.6931471805599453, abs=1e-6)
    assert torch.allclose(top.bias, torch.tensor([1 / 6, -1 / 6]))


def test_old_gradients_of_the_top_do_not_count() -> None:
    top, twin = nn.Linear(2, 2), nn.Linear(2, 2)
    twin.load_state_dict(top.state_dict())
    top.weight.grad = torch.ones(2, 2) * 100
    z, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    merged_step(top, make_sgd(top.parameters(), 0.1), [z], [y])
    merged_step(twin, make_sgd(twin.parameters(), 0.1), [z], [y])
    assert torch.equal(top.weight, twin.weight)


def test_single_step_is_a_merge_of_one() -> None:
    top = nn.Linear(3, 2).double()
    twin = copy.deepcopy(top)
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    one = single_step(top, make_sgd(top.parameters(), 0.1), z, y)
    leaf = z.clone().requires_grad_()
    loss = functional.cross_entropy(twin(leaf), y)
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(one.gradient, leaf.grad)
    assert one.loss_nats == float(loss.detach())
    assert not z.requires_grad


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([], [], "0 feature tensors and 0 label tensors"),
        ([torch.zeros(2, 3)], [], "1 feature tensors and 0 label"),
        ([torch.zeros(0, 3)], [torch.zeros(0, dtype=torch.int64)], "d >= 1"),
        ([torch.zeros(2, 3)], [torch.zeros(3, dtype=torch.int64)], r"features \(2, 3\) with labels \(3,\)"),
        ([torch.zeros(2, 3)], [torch.zeros(2)], "torch.float32, expected"),
        (
            [torch.zeros(2, 3), torch.zeros(1, 4)],
            [torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)],
            r"worker 1 .* samples \(4,\) torch.float32 at the cut, expected \(3,\)",
        ),
        (
            [torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.float64)],
            [torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)],
            "torch.float64 at the cut",
        ),
    ],
)
def test_illegal_features_are_refused(features: list[Tensor], labels: list[Tensor], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        merge_features(features, labels)
