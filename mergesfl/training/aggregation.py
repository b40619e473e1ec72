"""Weighted mean of states that are all there, as the tops of one server are; those that workers bring: state_mean.py.

The treatment of buffers is [ours].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergesfl.errors import RemoteProtocolError


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i (w_i / sum_j w_j) * state_i, accumulated in the given order, as new tensors.

    Floating-point parameters and buffers are averaged (half precision is accumulated in float32); integer and boolean
    buffers are taken from the first state [ours]. A state of weight 0 adds nothing, whatever its values are.

    Args:
        states: name -> tensor, with equal names, shapes and dtypes.
        weights: one per state, finite and not negative, with a positive sum.
    Raises:
        ValueError: no state, another number of weights than of states, or an illegal weight.
        RemoteProtocolError: the states differ in names, shapes or dtypes; names the state and the tensor.
    """
    if not states or len(states) != len(weights):
        raise ValueError(
            f"{len(states)} states with {len(weights)} weights: expected one weight per state, at least one"
        )
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight {index} is {weight}: expected a finite number >= 0, the samples of a step")
    total = math.fsum(weights)
    if total <= 0:
        raise ValueError(f"the weights sum to {total}: expected more than 0, so leave out a mean over nothing")
    first = states[0]
    for index, state in enumerate(states):
        _check_like(first, state, index)
    with torch.no_grad():
        return {key: _mean_of(key, states, [weight / total for weight in weights]) for key in first}


def _mean_of(key: str, states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> Tensor:
    first = states[0][key]
    if not first.is_floating_point():
        return first.detach().clone()
    dtype = torch.promote_types(first.dtype, torch.float32)
    mean: Tensor | None = None
    term: Tensor | None = None  # memory for one product, however many states there are
    for state, share in zip(states, shares, strict=True):
        if share == 0.0:
            continue
        value = state[key].detach().to(dtype)  # same shape as the tensor
        if mean is None:
            mean = value * share  # with share 1.0 the same bits
        else:
            term = torch.mul(value, share, out=term)
            mean.add_(term)
    assert mean is not None  # the shares sum to 1
    return mean.to(first.dtype)


def _check_like(first: Mapping[str, Tensor], state: Mapping[str, Tensor], index: int) -> None:
    for key in (*first, *state):
        if key not in first or key not in state:
            odd = f"lacks '{key}'" if key in first else f"has the unknown tensor '{key}'"
            raise RemoteProtocolError(f"state {index} {odd}, expected the names of state 0: drop this worker's update")
        require_like(f"state {index}", key, state[key], first[key])


def require_like(whose: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises RemoteProtocolError unless this tensor of a state has the shape and dtype of the other."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise RemoteProtocolError(
            f"{whose} has '{name}' as {tuple(tensor.shape)} {tensor.dtype}, "
            f"expected {tuple(like.shape)} {like.dtype}: drop this worker's update"
        )
