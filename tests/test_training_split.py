"""SplitModel against the network it came from: equal to the bit, at every legal cut, in both modes."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.training.dropout import SeededDropout, seed_dropout
from mergesfl.training.merging import merged_step
from mergesfl.training.schedule import make_sgd
from mergesfl.training.split import SplitModel, list_cuts

torch.set_num_threads(1)


class Branchy(nn.Module):
    """All that makes cutting hard: a residual, functional dropout, a bare parameter, buffers, in-place steps."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 1)
        self.mix = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1))
        self.register_buffer("table", torch.arange(4.0).view(4, 1, 1), persistent=False)
        self.drop = SeededDropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(d, 1, 8, 8) -> (d, 3)."""
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = self.left(x) + self.right(x)
        x = self.mix(x)
        x = functional.dropout(x, 0.25, training=self.training)
        x = self.pool(x * self.scale + self.table)
        x += torch.ones(1)
        return self.head(torch.flatten(self.drop(x), 1))


def run_both_modes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in training and in evaluation mode, the same masks each time (also of functional dropout)."""
    seed_dropout(model, 3)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        trained = model(x)
    model.eval()
    return trained, model(x)


def assert_equal_at_every_cut(net: nn.Module, x: Tensor) -> list[str]:
    initial = copy.deepcopy(net.state_dict())
    reference = copy.deepcopy(net)
    expected = run_both_modes(reference, x)
    cuts = list_cuts(net)
    for cut in cuts:
        model = SplitModel(copy.deepcopy(net), cut)
        model.load_joined_state_dict(initial)
        # The halves of a SplitModel keep the qualified names, so seeding each half gives the masks of the whole.
        seed_dropout(model.bottom, 3)
        seed_dropout(model.top, 3)
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            z = model.bottom(x)
            # As on the server: the features are a leaf, an in-place layer above must not fail on it.
            trained = model.top(z.detach().requires_grad_())
        model.eval()
        assert torch.equal(trained, expected[0]), f"{cut} in training mode"
        assert torch.equal(model(x), expected[1]), f"{cut} in evaluation mode"
        joined = model.joined_state_dict()
        assert list(joined) == list(initial)
        assert all(torch.equal(joined[key], value) for key, value in reference.state_dict().items()), cut
        assert not set(model.bottom.state_dict()) & set(model.top.state_dict())
        parameters = [id(p) for half in (model.bottom, model.top) for p in half.parameters()]
        assert len(parameters) == len(set(parameters)) == len(list(net.parameters()))
    return cuts


def chain() -> nn.Sequential:
    body = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True))
    return nn.Sequential(body, nn.Flatten(), SeededDropout(0.5), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2))


def test_chain_is_equal_at_every_cut() -> None:
    cuts = assert_equal_at_every_cut(chain(), torch.randn(5, 1, 8))
    # Every layer with parameters below and above; "0" and "0.2" are the same place. "5" is the output: nothing above.
    assert cuts == ["0.0", "0.1", "0.2", "0", "1", "2", "3", "4"]


def test_branchy_is_equal_at_every_cut() -> None:
    net = Branchy()
    cuts = assert_equal_at_every_cut(net, torch.randn(5, 1, 8, 8))
    # left and right run side by side, so neither is a cut; head is the output.
    assert cuts == ["stem", "norm", "mix", "pool", "drop"]


def test_tensors_that_no_forward_reads_belong_to_the_top() -> None:
    model = SplitModel(Branchy(), "mix")
    assert {"unused.weight", "scale", "head.bias"} <= set(model.top.state_dict())
    assert set(model.bottom.state_dict()) == {
        *(f"{layer}.{name}" for layer in ("stem", "left", "right") for name in ("weight", "bias")),
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert "table" in dict(model.top.named_buffers())
    assert "table" not in model.top.state_dict()  # not persistent in the network either


def test_literal_tensors_follow_the_dtype() -> None:
    model = SplitModel(Branchy(), "mix").double().eval()
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_crossing_value_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"'left'.*not legal.*a second value.*'right', read by 'add'.*legal: drop, mix"
    ):
        SplitModel(Branchy(), "left")


def test_an_unknown_cut_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown cut 'mixx' of Branchy: did you mean 'mix'\?"):
        SplitModel(Branchy(), "mixx")
    with pytest.raises(ConfigError, match="unknown cut ''"):
        SplitModel(chain(), "")


def test_a_cut_without_parameters_on_a_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter to train above"):
        SplitModel(chain(), "5")
    with pytest.raises(ConfigError, match="no parameter to train below"):
        SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "0")


class Reused(nn.Module):
    """One ReLU called twice, and one weight read on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.second = nn.Linear(4, 4)
        self.aside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)  # computed and dropped: not on the way to the output
        x = self.act(self.first(x))
        return self.act(functional.linear(self.second(x), self.first.weight))


def test_repeated_modules_shared_tensors_and_side_branches_are_refused() -> None:
    with pytest.raises(ConfigError, match="called more than once"):
        SplitModel(Reused(), "act")
    with pytest.raises(ConfigError, match=r"share the tensor 'first.weight'"):
        SplitModel(Reused(), "first")
    with pytest.raises(ConfigError, match="not between the input and the output"):
        SplitModel(Reused(), "aside")
    assert list_cuts(Reused()) == []


def test_a_shared_module_in_a_chain_is_refused() -> None:
    tied = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="share the tensor"):
        SplitModel(nn.Sequential(tied, nn.ReLU(), tied), "1")


def test_tied_modules_on_one_side_keep_both_names() -> None:
    tied = nn.Linear(4, 4)
    net = nn.Sequential(tied, tied, nn.Linear(4, 2))
    model = SplitModel(net, "1")
    assert list(model.joined_state_dict()) == list(net.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(model(x), net(x))


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_control_flow_on_data_is_refused_and_modes_are_restored() -> None:
    net = nn.Sequential(Conditional(), nn.Linear(2, 2))
    net[0].eval()
    with pytest.raises(ConfigError, match="does not depend on its input"):
        list_cuts(net)
    assert net.training and not net[0].training and net[1].training


def test_a_chain_with_a_block_inside_is_traced() -> None:
    net = nn.Sequential(nn.Sequential(Branchy(), nn.ReLU()), nn.Linear(3, 2))
    cuts = assert_equal_at_every_cut(net, torch.randn(3, 1, 8, 8))
    assert cuts == ["0.0.stem", "0.0.norm", "0.0.mix", "0.0.pool", "0.0.drop", "0.0.head", "0.0", "0.1", "0"]


class Attention(nn.Module):
    """A leaf that returns a tuple cannot be a cut, what comes after can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x, _ = self.attention(x, x, x)
        return self.head(self.act(x))


def test_layers_that_return_tuples_are_no_cuts() -> None:
    torch.manual_seed(0)
    assert assert_equal_at_every_cut(Attention(), torch.randn(2, 3, 4)) == ["inner", "act"]
    with pytest.raises(ConfigError, match="does not return one tensor"):
        SplitModel(Attention(), "attention")


class InPlaceOperators(nn.Module):
    """In-place work on the cut value itself, in three spellings."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.below = nn.Linear(3, 3)
        self.above = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.below(x)
        if self.kind == "method":
            z = z.mul_(2.0)
        elif self.kind == "operator":
            z = operator.iadd(z, 1.0)
        else:
            z = functional.relu(z, True)
        return self.above(z)


@pytest.mark.parametrize("kind", ["method", "operator", "positional"])
def test_in_place_work_above_leaves_the_features_alone(kind: str) -> None:
    model = SplitModel(InPlaceOperators(kind), "below")
    z = model.bottom(torch.randn(4, 3)).detach().requires_grad_()  # (4, 3)
    before = z.detach().clone()
    model.top(z).sum().backward()
    assert torch.equal(z.detach(), before)
    assert z.grad is not None and z.grad.abs().sum() > 0


def test_a_copy_is_independent() -> None:
    model = SplitModel(chain(), "0")
    seed_dropout(model, 1)
    x = torch.randn(4, 1, 8)
    model(x)  # the generator of the dropout is now in mid-stream
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        next(twin.bottom.parameters()).add_(1.0)
    assert not torch.equal(twin.eval()(x), model.eval()(x))


def test_loading_refuses_another_model_and_copies_nothing() -> None:
    model = SplitModel(chain(), "0")
    state = {key: value.clone() + 1 for key, value in model.joined_state_dict().items()}
    before = {key: value.clone() for key, value in model.joined_state_dict().items()}
    for change, message in (
        ({"5.bias": torch.zeros(7)}, r"'5.bias' has shape \(7,\), expected \(2,\)"),
        ({"extra": torch.zeros(1)}, "'extra' is missing in this model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model.load_joined_state_dict({**state, **change})
    with pytest.raises(CheckpointError, match=r"'0.0.weight' is missing in the state"):
        model.load_joined_state_dict({key: value for key, value in state.items() if key != "0.0.weight"})
    assert all(torch.equal(model.joined_state_dict()[key], value) for key, value in before.items())
    model.load_joined_state_dict(state)
    assert all(torch.equal(model.joined_state_dict()[key], value) for key, value in state.items())


def test_mode_of_the_network_is_kept() -> None:
    model = SplitModel(chain().eval(), "0")
    assert not model.training and not model.bottom.training and not model.top.training


@pytest.mark.parametrize("cut", ["0.0", "0", "3"])
def test_one_worker_equals_joint_training_to_the_bit(cut: str) -> None:
    """One worker, D = d: cut, step, return the gradient, step; five times. float32, batch-norm and dropout included."""
    joint = chain()
    model = SplitModel(copy.deepcopy(joint), cut)
    joint_sgd = make_sgd(joint.parameters(), 0.1)
    bottom_sgd, top_sgd = make_sgd(model.bottom.parameters(), 0.1), make_sgd(model.top.parameters(), 0.1)
    seed_dropout(joint, 5)
    seed_dropout(model.bottom, 5)
    seed_dropout(model.top, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(6, 1, 8, generator=generator)
        y = torch.randint(0, 2, (6,), generator=generator)
        joint_sgd.zero_grad()
        loss = functional.cross_entropy(joint(x), y)
        loss.backward()
        joint_sgd.step()
        z = model.bottom(x)
        step = merged_step(model.top, top_sgd, [z.detach()], [y])
        bottom_sgd.zero_grad()
        z.backward(step.gradients[0])
        bottom_sgd.step()
        assert step.loss_nats == float(loss.detach())
    joined = model.joined_state_dict()
    assert all(torch.equal(joined[key], value) for key, value in joint.state_dict().items())


def test_a_stand_in_trains_and_neither_evaluates_nor_is_copied() -> None:
    model = SplitModel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), "0")
    top = model.top
    top.train_through(lambda x: 2 * top.compute(x))
    z = torch.randn(4, 3)
    expected = model.top.compute(z)
    assert torch.equal(top.train()(z), 2 * expected)
    assert torch.equal(copy.deepcopy(top)(z), expected)
    assert torch.equal(copy.deepcopy(model).top(z), expected)
    assert torch.equal(top.eval()(z), expected)
    assert torch.equal(top.train()(z), 2 * expected)
