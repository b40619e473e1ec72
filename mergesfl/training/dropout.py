"""Dropout whose masks are a pure function of a seed: its own generator, never the global one.

Workers may be threads of one process, and threads share torch's global generator: with nn.Dropout a mask would depend
on which thread came first. Legend: d samples, F... shape of one sample at this layer.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError, MergeSFLError

# Which elements share one draw: the leading dimensions the mask has of its own, None for all of them.
_MASK_DIMS: dict[str, int | None] = {
    "element": None,  # nn.Dropout
    "channel": 2,  # nn.Dropout1d/2d/3d: one draw per sample and channel
    "sample": 1,  # stochastic depth of a residual branch, mode "row"
    "batch": 0,  # stochastic depth, mode "batch"
}

_REPLACED: dict[type[nn.Module], str] = {
    nn.Dropout: "element",
    nn.Dropout1d: "channel",
    nn.Dropout2d: "channel",
    nn.Dropout3d: "channel",
}


class SeededDropout(nn.Module):
    """Zeroes with probability p and scales the rest by 1 / (1 - p); the identity in evaluation mode.

    After `reseed(seed)` the n-th mask depends on seed, shape, type of device and n only. The generator lives
    on the device of the input and is made anew, from the same seed, when the module meets another device.

    Args:
        p: probability of a zero, 0 <= p <= 1.
        mask: "element", "channel", "sample" or "batch": what is dropped together.
    Raises:
        ConfigError: p or mask is out of range.
        MergeSFLError: forward in training mode before `reseed`.
    """

    def __init__(self, p: float = 0.5, mask: str = "element") -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"dropout probability {p} is outside [0, 1]: choose one inside")
        if mask not in _MASK_DIMS:
            raise ConfigError(f"dropout mask '{mask}' is unknown: choose one of {', '.join(_MASK_DIMS)}")
        self.p = p
        self.mask = mask
        self._seed: int | None = None
        self._generator: torch.Generator | None = None
        self._shard: tuple[int, int, int] | None = None

    def reseed(self, seed: int) -> None:
        """Starts the stream of masks of this seed (any non-negative integer below 2**64) from its beginning."""
        self._seed = seed
        self._generator = None

    def unused_seed(self) -> int:
        """The seed, of which no mask has been drawn. Raises MergeSFLError: not seeded since the last forward."""
        if self._seed is None or self._generator is not None:
            raise MergeSFLError(
                "a SeededDropout is shared by several processes, and its seed is "
                f"{'missing' if self._seed is None else 'used up'}: call mergesfl.training.dropout.seed_dropout(model, "
                "seed) before every forward"
            )
        return self._seed

    def take_rows(self, begin: int, end: int, num_rows: int) -> None:
        """From now on inputs are rows begin..end of a batch of num_rows: masks are drawn for all of it."""
        self._shard = (begin, end, num_rows)

    def take_all_rows(self) -> None:
        """Ends `take_rows`."""
        self._shard = None

    def forward(self, x: Tensor) -> Tensor:
        """(d, F...) -> (d, F...)."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        own_dims = _MASK_DIMS[self.mask]
        batch = self._batch_shape(x)
        own = batch if own_dims is None else batch[:own_dims]
        mask = torch.empty(*own, *(1 for _ in x.shape[len(own) :]), device=x.device, dtype=x.dtype)
        mask.bernoulli_(keep, generator=self._stream(x.device))
        if self._shard is not None and own:
            mask = mask[self._shard[0] : self._shard[1]]  # broadcasts to x
        if keep > 0.0:
            mask.div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        """The arguments, for print(model)."""
        return f"p={self.p}, mask={self.mask}"

    def _batch_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the batch of which x is a part, or the whole."""
        if self._shard is None:
            return tuple(x.shape)
        begin, end, num_rows = self._shard
        if x.shape[0] != end - begin:
            raise MergeSFLError(
                f"a SeededDropout got {x.shape[0]} rows, its shard of the batch has {end - begin}: a layer before it "
                "folds other dimensions into the batch; start the parameter server with one rank"
            )
        return (num_rows, *x.shape[1:])

    def _stream(self, device: torch.device) -> torch.Generator:
        if self._seed is None:
            raise MergeSFLError(
                "a SeededDropout in training mode has no seed (expected: one per round and worker): "
                "call mergesfl.training.dropout.seed_dropout(model, seed) before the first step"
            )
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(self._seed)
        return self._generator

    # A torch.Generator cannot be copied in every version of torch: its state can.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        generator = state.pop("_generator")
        state["_stream_state"] = None if generator is None else (generator.device, generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        stream = state.pop("_stream_state")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._generator = None
        if stream is not None:
            self._generator = torch.Generator(device=stream[0])
            self._generator.set_state(stream[1])


def replace_dropout(net: nn.Module) -> nn.Module:
    """Swaps every nn.Dropout, Dropout1d, 2d, 3d in net for a SeededDropout of the same p; changes net and returns it.

    Raises ConfigError for a dropout layer that has no seeded counterpart (alpha dropout).
    """
    if type(net) in _REPLACED:
        return _seeded(net)
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if type(module) not in _REPLACED:
                raise ConfigError(
                    f"layer '{name}' is a {type(module).__name__}, which draws from the global generator; "
                    f"seeded are {', '.join(kind.__name__ for kind in _REPLACED)}: use one of these"
                )
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, _seeded(module))
    return net


def _seeded(module: nn.Module) -> SeededDropout:
    replacement = SeededDropout(float(module.p), _REPLACED[type(module)])  # type: ignore[arg-type]
    replacement.train(module.training)
    return replacement


def has_dropout(module: nn.Module) -> bool:
    """Whether training it draws masks."""
    return any(isinstance(layer, SeededDropout) and layer.p > 0.0 for layer in module.modules())


def seed_dropout(module: nn.Module, seed: int) -> None:
    """Seeds every SeededDropout in module, each with its own stream derived from (seed, qualified name).

    The two halves of a SplitModel keep the qualified names of the network they came from: seeded alike, a split and a
    joint network draw the same masks.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, SeededDropout):
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            layer.reseed(int.from_bytes(digest, "little"))
