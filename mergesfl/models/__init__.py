"""The models by name, and how one is built, seeded and cut. One literal table: reading it shows all there is.

A name is an entry of MODELS or "torchvision:NAME"; "@CUT" behind either names the layer to cut at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mergesfl.errors import ConfigError, unknown_name
from mergesfl.models.alexnet import build_alexnet
from mergesfl.models.cnn_har import build_cnn
from mergesfl.models.initial import build_seeded
from mergesfl.models.m5 import build_m5
from mergesfl.models.vgg16 import build_vgg16
from mergesfl.models.vision import PREFIX, build_vision
from mergesfl.training.cuts import list_cuts, output_shape
from mergesfl.training.dropout import replace_dropout
from mergesfl.training.split import SplitModel


@dataclass(frozen=True)
class ModelSpec:
    """One line of the table: (sample_shape, num_classes) -> network, where to cut it by default, and what it is."""

    build: Callable[[tuple[int, ...], int], nn.Module]
    default_cut: str
    description: str
    sample_shape: str  # for people: what fits
    example_shape: tuple[int, ...]  # of the data set that the paper trains it on


MODELS: dict[str, ModelSpec] = {
    "cnn": ModelSpec(
        build_cnn,
        "conv2",
        "3 conv + 2 FC: HAR, digits, Fashion-MNIST",
        "(channels, height, width), such as (1, 128, 9)",
        (1, 128, 9),
    ),
    "m5": ModelSpec(
        build_m5, "block3", "4 conv1d + FC: raw audio", "(channels, num_steps >= 6848), such as (1, 16000)", (1, 16000)
    ),
    "alexnet": ModelSpec(
        build_alexnet,
        "features",
        "5 conv + 3 FC: CIFAR-10",
        "(channels, height >= 8, width >= 8), such as (3, 32, 32)",
        (3, 32, 32),
    ),
    "vgg16": ModelSpec(
        build_vgg16,
        "features",
        "13 conv with batch-norm + 3 FC: IMAGE-100",
        "(channels, height >= 16, width >= 16), such as (3, 144, 144)",
        (3, 144, 144),
    ),
}
_VISION_SHAPE = "(channels, height, width), large enough for this network, such as (3, 224, 224)"


def split_name(text: str) -> tuple[str, str | None]:
    """ "torchvision:resnet18@layer2" -> ("torchvision:resnet18", "layer2"); no "@": no cut. Raises ConfigError."""
    name, at, cut = text.partition("@")
    if not name or (at and not cut):
        raise ConfigError(f"model '{text}' lacks a part, expected NAME or NAME@CUT: for example cnn@conv2")
    return name, cut or None


def build_network(name: str, sample_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """The whole network: initial weights of this seed, dropout seeded by layer (see training/dropout.py), not yet cut.

    Args:
        name: a model without "@CUT".
        sample_shape: of one sample, without the batch.
        num_classes: C.
        seed: of the initial weights, 0 <= seed < 2**64.
    Raises:
        ConfigError: no such model, or one that samples of this shape or this number of classes do not fit.
    """
    if name.startswith(PREFIX):
        expected = _VISION_SHAPE
        vision_name = name[len(PREFIX) :]

        def build() -> nn.Module:
            return build_vision(vision_name, sample_shape, num_classes)

    elif name in MODELS:
        spec = MODELS[name]
        expected = spec.sample_shape

        def build() -> nn.Module:
            return spec.build(sample_shape, num_classes)

    else:
        raise unknown_name("model", name, [*MODELS, f"{PREFIX}NAME"])
    if num_classes < 2 or not sample_shape or min(sample_shape) < 1:
        raise ConfigError(
            f"model '{name}' for {num_classes} classes and samples of shape {tuple(sample_shape)}: "
            f"expected at least 2 classes and samples {expected}; check the data set"
        )
    try:
        net = replace_dropout(build_seeded(build, seed))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise _misfit(name, expected, sample_shape, str(error)) from error
    try:
        shape = output_shape(net, sample_shape)
    except ConfigError as error:
        raise _misfit(name, expected, sample_shape, str(error.__cause__ or error)) from error
    if shape != (num_classes,):
        raise _misfit(name, expected, sample_shape, f"its output is {shape}, not {(num_classes,)}")
    return net


def _misfit(name: str, expected: str, sample_shape: tuple[int, ...], reason: str) -> ConfigError:
    return ConfigError(
        f"model '{name}' takes samples {expected}, the data has {tuple(sample_shape)}: {reason}; "
        "choose another model or another data set"
    )


def build_model(name: str, cut: str | None, sample_shape: tuple[int, ...], num_classes: int, seed: int) -> SplitModel:
    """A network, seeded and cut: a pure function of its arguments that leaves torch's global generator alone.

    Args:
        name: a model, also as "name@cut".
        cut: name of the layer to cut at; None: the one in `name`, or else the default of the table.
        sample_shape: of one sample, without the batch.
        num_classes: C.
        seed: of the initial weights.
    Raises:
        ConfigError: unknown model or cut, two different cuts, a torchvision model without a cut, a sample that does not
            fit.

    Call `seed_dropout(model, seed)` before training. Models of the table may be built in several threads at once;
    for torchvision models callers serialise (see training/tracing.py).
    """
    base, named_cut = split_name(name)
    if cut is not None and named_cut is not None and cut != named_cut:
        raise ConfigError(f"model '{name}' names the cut '{named_cut}', the setting says '{cut}': keep one of them")
    cut = cut or named_cut or (MODELS[base].default_cut if base in MODELS else None)
    net = build_network(base, tuple(sample_shape), num_classes, seed)
    if cut is None:
        raise ConfigError(
            f"model '{base}' has no default cut: write '{base}@CUT'; legal cuts: {', '.join(list_cuts(net))}"
        )
    return SplitModel(net, cut)
