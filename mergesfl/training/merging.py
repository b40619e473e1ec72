"""Feature merging: the features of all workers are ONE mixed sequence for ONE step of the top.

MergeSFL, Liao et al., ICDE 2024, arXiv 2311.13348, the round's step 4 [paper]; dispatch scaling [code].
Legend: D merged samples, d_i samples of worker i (D = sum d_i), F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergesfl.errors import RemoteProtocolError
from mergesfl.training.logit_adjustment import adjusted_cross_entropy
from mergesfl.training.singles import forward_any


@dataclass(frozen=True)
class MergedStep:
    """What one merged step returns to the workers, and its loss.

    Attributes:
        gradients: per worker in the given order, (d_i, F...): the gradient of the mean loss over ITS d_i samples, that
            is (D / d_i) times its slice of dL/dZ, taken with the top before its step.
        loss_nats: mean cross-entropy over the D samples, before the step (logit-adjusted if the step is).
    """

    gradients: list[Tensor]
    loss_nats: float


@dataclass(frozen=True)
class SingleStep:
    """The same for one worker alone: gradient (d, F...), loss_nats over its d samples."""

    gradient: Tensor
    loss_nats: float


def merge_features(features: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates (d_i, F...) and (d_i,) in the given order, the plan's, to (D, F...) and (D,).

    New tensors, or views of one that holds them all, where they lie one behind the other in it.

    Raises RemoteProtocolError: nothing to merge, a worker without a sample, or counts, shapes or types that differ.
    """
    if not features or len(features) != len(labels):
        raise RemoteProtocolError(
            f"{len(features)} feature tensors and {len(labels)} label tensors, expected as many and at least one: "
            "drop the worker that did not send both"
        )
    first = features[0]
    for index, (z, y) in enumerate(zip(features, labels, strict=True)):
        if z.ndim < 1 or z.shape[0] < 1 or tuple(y.shape) != (z.shape[0],) or y.dtype != torch.int64:
            raise RemoteProtocolError(
                f"worker {index} of the plan sent features {tuple(z.shape)} with labels {tuple(y.shape)} {y.dtype}, "
                "expected (d, ...) with (d,) torch.int64 and d >= 1: drop this worker"
            )
        if z.shape[1:] != first.shape[1:] or z.dtype != first.dtype:
            raise RemoteProtocolError(
                f"worker {index} of the plan sent samples {tuple(z.shape[1:])} {z.dtype} at the cut, "
                f"expected {tuple(first.shape[1:])} {first.dtype}: drop this worker, its model is another one"
            )
    return joined([z.detach() for z in features]), joined(list(labels))  # (D, F...), (D,)


def joined(slices: Sequence[Tensor]) -> Tensor:
    """torch.cat of (d_i, F...) to (D, F...); without a copy where they are the consecutive parts of one tensor."""
    first, offset = slices[0], slices[0].storage_offset()
    for one in slices:
        if not (
            one.is_contiguous()
            and one.storage_offset() == offset
            and one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        ):
            return torch.cat(list(slices))
        offset += one.numel()
    return first.as_strided((sum(len(one) for one in slices), *first.shape[1:]), first.stride())


def merged_step(
    top: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    prior: Tensor | None = None,
    own_priors: Sequence[Tensor] | None = None,
) -> MergedStep:
    """One top forward and one mean cross-entropy over all D samples, one backward, one step. [paper]

    Args:
        top: (D, F...) -> logits (D, C), in training mode if it is to train.
        optimizer: over the parameters of top; its gradients are cleared first.
        features: (d_i, F...) per worker, float32 or float64, in plan order.
        labels: (d_i,) int64 per worker, in the same order.
        prior: (C,) ln pi of the merged samples: the loss is logit-adjusted by it; None: the plain loss.
        own_priors: (C,) ln pi_i per worker: what goes back to worker i is the gradient of the loss adjusted by its own
            prior, from the same forward, by a second backward (SCALA); None: the gradient of the loss of the step.
    """
    merged, targets = merge_features(features, labels)  # (D, F...), (D,)
    merged.requires_grad_()
    sizes = [z.shape[0] for z in features]
    optimizer.zero_grad(set_to_none=True)
    logits = forward_any(top, merged)  # (D, C)
    loss = adjusted_cross_entropy(logits, targets, prior)
    if own_priors is None:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        rows = torch.cat([own.expand(d, -1) for own, d in zip(own_priors, sizes, strict=True)])  # (D, C)
        own_loss = adjusted_cross_entropy(logits, targets, rows)
        trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
        loss.backward(inputs=trained, retain_graph=True)  # type: ignore[no-untyped-call]
        own_loss.backward(inputs=[merged])  # type: ignore[no-untyped-call]
    optimizer.step()
    assert merged.grad is not None
    num_merged = sum(sizes)
    slices = torch.split(merged.grad, sizes)  # (d_i, F...) each, views of one buffer that is new in every step
    return MergedStep([s.mul_(num_merged / d) for s, d in zip(slices, sizes, strict=True)], float(loss.detach()))


def single_step(top: nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor) -> SingleStep:
    """One step of one worker's own top, without merging (SplitFed): (d, F...) and (d,) in, gradient (d, F...) out."""
    step = merged_step(top, optimizer, [features], [labels])
    return SingleStep(step.gradients[0], step.loss_nats)
