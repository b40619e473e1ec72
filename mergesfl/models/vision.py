"""Any torchvision classification network, without pretrained weights. torchvision is imported only when one is named.

Samples must be (channels, height, width). For other than 3 channels the first convolution is made anew for that number
[ours]: the names of all tensors stay torchvision's own, and a grey image is not sent through three times the work.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mergesfl.errors import ConfigError, unknown_name
from mergesfl.training.dropout import SeededDropout

PREFIX = "torchvision:"

# Auxiliary heads return more than one tensor in training mode: built without.
_EXTRA: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# How stochastic depth of torchvision drops: one draw per sample ("row") or one for the batch.
_DEPTH_MASKS = {"row": "sample", "batch": "batch"}


def list_vision_models() -> list[str]:
    """The names of torchvision's classification networks. Raises ConfigError when torchvision is not installed."""
    try:
        import torchvision
    except ImportError as error:
        raise ConfigError(
            f"a model '{PREFIX}...' needs torchvision, which is not installed ({error}): pip install 'mergesfl[vision]'"
        ) from error
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_vision(name: str, sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network `name` for samples (channels, height, width) and C classes; stochastic depth becomes seeded.

    Raises ConfigError for an unknown name and for a missing torchvision, ValueError for a sample that cannot fit.
    """
    legal = list_vision_models()
    if name not in legal:
        raise unknown_name("torchvision model", name, legal)
    import torchvision

    channels, height, width = sample_shape
    extra = dict(_EXTRA.get(name, {}))
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("a vision transformer takes square images only")
        extra["image_size"] = height
    elif name.startswith("maxvit"):
        extra["input_size"] = (height, width)
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    for path, module in list(net.named_modules()):
        if isinstance(module, torchvision.ops.StochasticDepth):
            _replace(net, path, SeededDropout(module.p, _DEPTH_MASKS[module.mode]))
    if channels != 3:
        _replace_stem(net, channels)
    return net


def _replace_stem(net: nn.Module, channels: int) -> None:
    """A first convolution for this number of channels, with PyTorch's own initial weights."""
    path, stem = next((path, module) for path, module in net.named_modules() if isinstance(module, nn.Conv2d))
    made = nn.Conv2d(
        channels,
        stem.out_channels,
        kernel_size=stem.kernel_size,  # type: ignore[arg-type]
        stride=stem.stride,  # type: ignore[arg-type]
        padding=stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    _replace(net, path, made)


def _replace(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(net.get_submodule(parent), last, module)
