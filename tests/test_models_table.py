"""The four models: the sizes of the paper's setting, every cut, and weights that depend on the seed only."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError
from mergesfl.models import MODELS, ModelSpec, build_model, build_network, split_name
from mergesfl.models.initial import build_seeded
from mergesfl.models.vgg16 import pooled_size
from mergesfl.training.cuts import cut_table
from mergesfl.training.dropout import SeededDropout, seed_dropout
from mergesfl.training.split import SplitModel
from tests.test_training_split import assert_equal_at_every_cut

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "sample_shape", "num_classes", "feature_shape", "feature_bytes"),
    [  # mergesfl.md, section 5
        ("cnn", (1, 128, 9), 6, (32, 32, 2), 8_192),
        ("m5", (1, 16_000), 35, (64, 14), 3_584),
        ("alexnet", (3, 32, 32), 10, (256, 4, 4), 16_384),
        ("vgg16", (3, 144, 144), 100, (512, 5, 5), 51_200),
    ],
)
def test_cut_tensors_of_the_paper(
    name: str, sample_shape: tuple[int, ...], num_classes: int, feature_shape: tuple[int, ...], feature_bytes: int
) -> None:
    with torch.device("meta"):  # sizes need no weights
        net = MODELS[name].build(sample_shape, num_classes)
    row = next(row for row in cut_table(net, sample_shape) if row.name == MODELS[name].default_cut)
    assert row.feature_shape == feature_shape
    assert row.feature_bytes_per_sample == feature_bytes == 4 * math.prod(feature_shape)


def test_parameters_by_hand() -> None:
    """HAR: bottom 12*9+12 + 32*12*9+32 = 120 + 3488 = 3608.

    Top: conv 64*32*9+64 = 18496, FC 64*32*2*1024+1024 = 4195328, FC 1024*6+6 = 6150; together 4219974.
    """
    net = build_network("cnn", (1, 128, 9), 6, seed=0)
    row = next(row for row in cut_table(net, (1, 128, 9)) if row.name == "conv2")
    assert (row.num_params_bottom, row.num_params_top) == (3_608, 4_219_974)


@pytest.mark.parametrize(
    ("name", "sample_shape"),
    [
        ("cnn", (1, 8, 8)),
        ("cnn", (1, 28, 28)),
        ("cnn", (1, 12, 9)),
        ("cnn", (2, 1, 3)),  # a dimension of 1 is not pooled
        ("m5", (1, 7000)),
        ("alexnet", (3, 8, 8)),
        ("vgg16", (3, 16, 16)),
    ],
)
def test_equal_at_every_cut(name: str, sample_shape: tuple[int, ...]) -> None:
    if name in ("alexnet", "vgg16"):
        check_large(build_network(name, sample_shape, 4, seed=0), sample_shape)
        return
    x = torch.randn(3, *sample_shape, generator=torch.Generator().manual_seed(0))
    cuts = assert_equal_at_every_cut(build_network(name, sample_shape, 4, seed=0), x)
    assert MODELS[name].default_cut in cuts


def check_large(net: nn.Module, sample_shape: tuple[int, ...]) -> None:
    """Every cut, without a copy of the many million weights for each: the halves own the modules of net.

    Training mode at every cut; evaluation mode, which has the same graph in a chain, at the default one.
    """
    x = torch.randn(2, *sample_shape, generator=torch.Generator().manual_seed(0))
    buffers = {key: value.clone() for key, value in net.named_buffers()}

    def run(model: nn.Module, parts: list[nn.Module], training: bool) -> list[Tensor]:
        for part in parts:
            seed_dropout(part, 3)
        for key, value in net.named_buffers():
            value.copy_(buffers[key])
        with torch.no_grad():
            return [model.train(training)(x), *(value.clone() for value in net.buffers())]

    expected = {training: run(net, [net], training) for training in (True, False)}
    names = [row.name for row in cut_table(net, sample_shape)]
    assert "features" in names and len(names) > 15
    for cut in names:
        model = SplitModel(net, cut)
        for training in (True, False) if cut == "features" else (True,):
            found = run(model, [model.bottom, model.top], training)
            assert all(torch.equal(a, b) for a, b in zip(found, expected[training], strict=True)), (cut, training)
        assert list(model.joined_state_dict()) == list(net.state_dict())


def test_vgg_pools_by_hand() -> None:
    # 144 -> 72 -> 36 -> 18 -> (18 + 2 - 2) / 2 + 1 = 10 -> 5
    # 32 -> 16 -> 8 -> 4 -> 3 -> 1;  8 -> 4 -> 2 -> 1 -> 1 -> 0.
    assert [pooled_size(size) for size in (144, 32, 16, 8, 4)] == [5, 1, 1, 0, 0]


def test_weights_are_those_of_a_seeded_global_generator() -> None:
    """The reference: torch.manual_seed(seed), then build as usual."""
    for name, shape in (("cnn", (1, 8, 8)), ("m5", (1, 7000))):
        net = build_network(name, shape, 3, seed=17)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            reference = MODELS[name].build(shape, 3)
        expected = reference.state_dict()
        assert list(net.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


def test_weights_depend_on_the_seed_only_and_leave_the_global_generator_alone() -> None:
    def state(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = build_model("cnn", None, (1, 8, 8), 10, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.joined_state_dict()

    first, again, other = state(1, 0), state(1, 99), state(2, 0)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_threads_build_the_same_model() -> None:
    """The table's models are built and cut in four threads at once, while the main thread trains another."""
    expected = build_model("cnn", None, (1, 8, 8), 10, 5).joined_state_dict()
    built: list[SplitModel] = []
    threads = [
        threading.Thread(target=lambda: built.extend(build_model("cnn", None, (1, 8, 8), 10, 5) for _ in range(4)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    noise = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    while any(thread.is_alive() for thread in threads):
        noise(torch.randn(4, 8)).sum().backward()
    for thread in threads:
        thread.join()
    assert len(built) == 16
    for model in built:
        assert all(torch.equal(value, expected[key]) for key, value in model.joined_state_dict().items())


class Noisy(nn.Module):
    """Every way to draw initial weights: in place, from a function, and one that takes no generator."""

    def __init__(self, illegal: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5))
        self.b = nn.Parameter(torch.rand(5))
        self.c = nn.Parameter(nn.init.trunc_normal_(torch.empty(5)))
        if illegal:
            torch.nn.functional.dropout(torch.ones(3), 0.5, training=True).sum()
            torch.ops.aten.native_dropout(torch.ones(3), 0.5, True)


def test_every_draw_is_seeded_or_refused() -> None:
    net = build_seeded(Noisy, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = Noisy()
    for key, value in net.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key
    with pytest.raises(ConfigError, match="takes no generator"):
        build_seeded(lambda: Noisy(illegal=True), 3)


def test_dropout_is_seeded() -> None:
    model = build_model("alexnet", None, (3, 8, 8), 4, 0)
    assert [m.p for m in model.top.modules() if isinstance(m, SeededDropout)] == [0.5, 0.5]
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())


def test_names_and_cuts() -> None:
    assert split_name("cnn") == ("cnn", None)
    assert split_name("cnn@conv1") == ("cnn", "conv1")
    assert split_name("torchvision:resnet18@layer2") == ("torchvision:resnet18", "layer2")
    for bad in ("", "@conv1", "cnn@"):
        with pytest.raises(ConfigError, match="expected NAME or NAME@CUT"):
            split_name(bad)
    assert build_model("cnn", None, (1, 8, 8), 10, 0).cut == "conv2"
    assert build_model("cnn@conv1", None, (1, 8, 8), 10, 0).cut == "conv1"
    assert build_model("cnn", "conv3", (1, 8, 8), 10, 0).cut == "conv3"
    assert build_model("cnn@conv3", "conv3", (1, 8, 8), 10, 0).feature_shape((1, 8, 8)) == (64, 2, 2)
    with pytest.raises(ConfigError, match="keep one of them"):
        build_model("cnn@conv1", "conv2", (1, 8, 8), 10, 0)
    with pytest.raises(ConfigError, match=r"unknown cut 'conv9'.*legal: classifier.0"):
        build_model("cnn@conv9", None, (1, 8, 8), 10, 0)


@pytest.mark.parametrize(
    ("name", "sample_shape", "num_classes", "message"),
    [
        ("cnnn", (1, 8, 8), 10, "unknown model 'cnnn': did you mean 'cnn'"),
        ("cnn", (64,), 10, r"'cnn' takes samples \(channels, height, width\).*the data has \(64,\)"),
        ("m5", (1, 6847), 10, r"'m5' takes samples \(channels, num_steps >= 6848\).*the data has \(1, 6847\)"),
        ("alexnet", (1, 7, 32), 10, r"height >= 8.*the data has \(1, 7, 32\)"),
        ("vgg16", (3, 15, 15), 10, r"height >= 16.*the data has \(3, 15, 15\)"),
        ("cnn", (1, 8, 0), 10, r"samples of shape \(1, 8, 0\)"),
        ("cnn", (), 10, r"samples of shape \(\)"),
        ("cnn", (1, 8, 8), 1, "for 1 classes"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, sample_shape: tuple[int, ...], num_classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, None, sample_shape, num_classes, 0)


def test_the_smallest_audio_fits() -> None:
    assert build_model("m5", None, (1, 6848), 4, 0).feature_shape((1, 6848)) == (64, 6)


def test_a_network_with_the_wrong_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ModelSpec(lambda shape, num_classes: nn.Linear(4, num_classes + 1), "0", "", "(4,)", (4,))
    monkeypatch.setitem(MODELS, "wrong", wrong)
    with pytest.raises(ConfigError, match=r"its output is \(4,\), not \(3,\)"):
        build_network("wrong", (4,), 3, 0)
