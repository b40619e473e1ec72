"""Dropout whose masks are a pure function of a seed: its own generator, never the global one.

Workers may be threads of one process, and threads share torch's global generator: with nn.Dropout a mask would depend
on which thread came first. Legend: d samples, F... shape of one sample at this layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

    After `reseed(seed)` the n-th mask depends on seed, shape, type of device and n only; after `reseed_groups` that is
    true of the rows of each group. Generators live on the device of the input and are made anew, from the same seeds,
    when the module meets another device.

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
        self._seeds: tuple[int, ...] = ()  # one, or one per group of rows
        self._num_rows: tuple[int, ...] = ()  # of each group; empty: all rows have the one seed
        self._generators: list[torch.Generator] = []  # of the seeds, once a mask was drawn
        self._shard: tuple[int, int, int] | None = None

    def reseed(self, seed: int) -> None:
        """Starts the stream of masks of this seed (any non-negative integer below 2**64) from its beginning."""
        self._seeds, self._num_rows, self._generators = (seed,), (), []

    def reseed_groups(self, groups: Sequence[tuple[int, int]]) -> None:
        """Starts a stream for each group (seed, rows) of the batch, in order: each gets the masks it gets alone."""
        self._seeds = tuple(seed for seed, _ in groups)
        self._num_rows = tuple(rows for _, rows in groups) if len(groups) > 1 else ()
        self._generators = []

    def unused_seed(self) -> int:
        """The seed of all rows, of which no mask has been drawn. Raises MergeSFLError: there is none such."""
        if len(self._seeds) != 1 or self._num_rows or self._generators:
            raise MergeSFLError(
                "a SeededDropout is shared by several processes, and its seed is "
                f"{'used up' if self._generators else 'missing'}: call mergesfl.training.dropout.seed_dropout(model, "
                "seed) before every forward"
            )
        return self._seeds[0]

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
        generators = self._streams(x.device)
        if self._num_rows:
            mask = self._group_masks(x, generators)
        else:
            mask = self._mask(self._batch_shape(x), x, generators[0])
            if self._shard is not None and mask.shape[0] > 1:
                mask = mask[self._shard[0] : self._shard[1]]
        if keep > 0.0:
            mask.div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        """The arguments, for print(model)."""
        return f"p={self.p}, mask={self.mask}"

    def _mask(self, batch: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones that broadcast to a batch of this shape."""
        own_dims = _MASK_DIMS[self.mask]
        own = batch if own_dims is None else batch[:own_dims]
        mask = torch.empty(*own, *(1 for _ in batch[len(own) :]), device=x.device, dtype=x.dtype)
        return mask.bernoulli_(1.0 - self.p, generator=generator)

    def _group_masks(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The same of all groups, one after the other."""
        if x.shape[0] != sum(self._num_rows):
            raise MergeSFLError(
                f"a SeededDropout got {x.shape[0]} rows of groups with {sum(self._num_rows)}: a layer before it folds "
                "other dimensions into the batch; set training.merge = 'streaming-in-order', or 'barrier'"
            )
        masks = [
            self._mask((rows, *x.shape[1:]), x, generator)
            for rows, generator in zip(self._num_rows, generators, strict=True)
        ]
        return torch.cat([mask.expand(rows, *mask.shape[1:]) for rows, mask in zip(self._num_rows, masks, strict=True)])

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

    def _streams(self, device: torch.device) -> list[torch.Generator]:
        if not self._seeds:
            raise MergeSFLError(
                "a SeededDropout in training mode has no seed (expected: one per round and worker): "
                "call mergesfl.training.dropout.seed_dropout(model, seed) before the first step"
            )
        if not self._generators or self._generators[0].device != device:
            self._generators = [torch.Generator(device=device).manual_seed(seed) for seed in self._seeds]
        return self._generators

    # A torch.Generator cannot be copied in every version of torch: its state can.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_generators"] = [(generator.device, generator.get_state()) for generator in self._generators]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        streams = state.pop("_generators")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._generators = []
        for device, stream in streams:
            generator = torch.Generator(device=device)
            generator.set_state(stream)
            self._generators.append(generator)


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
            layer.reseed(_seed_of(seed, name))


def seed_dropout_groups(module: nn.Module, groups: Sequence[tuple[int, int]]) -> None:
    """The same for a batch of several groups (seed, rows): each gets the masks that it gets alone with its seed."""
    for name, layer in module.named_modules():
        if isinstance(layer, SeededDropout):
            layer.reseed_groups([(_seed_of(seed, name), rows) for seed, rows in groups])


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
