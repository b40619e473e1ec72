"""The weighted mean of model states that come one by one, in any order: each is added to a sum and let go of.

Eq. 17 with the weights d_i [paper]. Kept are two float64 numbers per element however many states there are, so memory
does not grow with the number of workers; how they are summed is [ours]:

    p_i = d_i * w_i        exact: 24 bits of a float32 times an integer below 2**29 are at most 53
    hi + lo = sum_i p_i    TwoSum (Knuth, The Art of Computer Programming, vol. 2, 4.2.2): hi is the float64 sum as it
                           is rounded, lo the sum of what the rounding took away
    mean = round(round(hi + lo) / D)

So the mean is that of the exact sum, and it has the same bits in whatever order the states came: a round is the same
over every transport, and no state has to wait for those before it in the plan. lo is itself exact while the w_i of an
element that are not 0 lie within a factor of 2**34 of each other (of 1,000 workers); beyond, it errs by 2**-86 of
sum_i |p_i|, and an order can show where that is of the size of what float64 rounds. Of float64 states p_i is rounded,
too, and has to stay below 2**1023: the mean is as accurate, and the same holds for its order. One state comes back to
the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesfl.errors import RemoteProtocolError
from mergesfl.training.aggregation import require_like

MAX_WEIGHT = 1 << 29  # above, d_i * w_i need not be exact
CHUNK_ELEMENTS = 1 << 15  # per thread of torch: it gives no thread fewer, and five such arrays fit into a cache


@dataclass
class _Sum:
    """What has been added to one floating-point tensor; both in the order in which the tensor lies in memory."""

    hi: Tensor  # (n,) float64; while it is of one state: that state itself
    lo: Tensor | None  # (n,) float64; None: of one state
    total: int  # sum of the weights


class StateMean:
    """sum_i d_i w_i / sum_i d_i over the states that are added; a tensor counts for those that bring it.

    Floating-point parameters and buffers are averaged; integer and boolean buffers are taken from the state with the
    first place [ours]; a tensor that nobody brings stays as it was [ours].

    Args:
        previous: the state before, with all names; its shapes, dtypes and order in memory are those of the mean. It is
            not written to.
    """

    def __init__(self, previous: Mapping[str, Tensor]) -> None:
        self._previous = previous
        self._sums: dict[str, _Sum] = {}
        self._firsts: dict[str, tuple[int, Tensor]] = {}  # of a tensor that is not averaged: place and copy
        self._scratch = torch.empty((3, CHUNK_ELEMENTS * torch.get_num_threads()), dtype=torch.float64)

    def add(self, state: Mapping[str, Tensor], weight: int, place: int) -> None:
        """Adds one state, which the caller may then let go of.

        Args:
            state: some or all of the names of `previous`, with equal shapes and dtypes, in main memory.
            weight: d_i, 1 to MAX_WEIGHT.
            place: in the plan; no two states have the same.
        Raises:
            ValueError: an illegal weight.
            RemoteProtocolError: an unknown name, or a shape or dtype that differs; nothing was added then.
        """
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueError(f"weight {weight} of the state with place {place}: expected 1 to {MAX_WEIGHT} samples")
        for name, tensor in state.items():
            self._check(name, tensor, place)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self._add(name, tensor.detach(), weight)
            elif name not in self._firsts or place < self._firsts[name][0]:
                self._firsts[name] = (place, tensor.detach().clone())

    def close(self) -> dict[str, Tensor]:
        """The mean, as new tensors in the order of `previous`; nothing can be added any more."""
        mean = {}
        for name, tensor in self._previous.items():
            if name in self._sums:
                mean[name] = _mean_of(self._sums.pop(name), tensor)  # one after the other, so that memory is given back
            else:
                mean[name] = self._firsts[name][1] if name in self._firsts else tensor.detach().clone()
        self._firsts.clear()
        return mean

    def _check(self, name: str, tensor: Tensor, place: int) -> None:
        ours = self._previous.get(name)
        if ours is None:
            raise RemoteProtocolError(
                f"the state with place {place} has the unknown tensor '{name}': drop this worker's update"
            )
        require_like(f"the state with place {place}", name, tensor, ours)

    def _add(self, name: str, tensor: Tensor, weight: int) -> None:
        values = _flat(tensor, self._previous[name])  # (n,)
        own = self._sums.get(name)
        if own is None:
            self._sums[name] = _Sum(values.to(torch.float64, copy=True), None, weight)
            return
        if own.lo is None:
            own.lo = torch.zeros_like(own.hi)
            own.hi.mul_(own.total)
        parts = (torch.split(whole, self._scratch.shape[1]) for whole in (values, own.hi, own.lo))
        for part, hi, lo in zip(*parts, strict=True):
            term, new, change = self._scratch[:, : len(hi)]
            term.copy_(part).mul_(weight)  # p
            torch.add(hi, term, out=new)  # s = round(hi + p)
            torch.sub(new, hi, out=change)  # p', what of p has arrived in s
            term.sub_(change)  # p - p'
            torch.sub(new, change, out=change)  # hi', what of hi has
            torch.sub(hi, change, out=change)  # hi - hi'
            lo.add_(term.add_(change))  # s + (p - p') + (hi - hi') = hi + p, and the sum in brackets is exact
            hi.copy_(new)
        own.total += weight


def _mean_of(own: _Sum, like: Tensor) -> Tensor:
    if own.lo is not None:
        own.hi.add_(own.lo).div_(own.total)
    order = torch.channels_last if _is_channels_last(like) else torch.contiguous_format
    mean = torch.empty(like.shape, dtype=like.dtype, memory_format=order)
    _flat(mean, like).copy_(own.hi)
    return mean


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """(n,) the elements in the order in which `like` lies in memory; a view if the tensor lies so, too."""
    if _is_channels_last(like):
        return tensor.permute(0, 2, 3, 1).reshape(-1)  # (n, h, w, c)
    return tensor.reshape(-1)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
