"""Feature merging: the features of all workers are ONE mixed sequence for ONE step of the top.

MergeSFL, Liao et al., ICDE 2024, arXiv 2311.13348, the round's step 4 [paper]; dispatch scaling [code].
Legend: D merged samples, d_i samples of worker i (D = sum d_i), F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import math
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
            (one.is_contiguous() or (one.ndim == 4 and one.is_contiguous(memory_format=torch.channels_last)))
            and one.stride()[1:] == first.stride()[1:]
            and one.storage_offset() == offset
            and one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        ):
            return torch.cat(list(slices))
        offset += one.numel()
    # Not first.stride(): where it holds one sample, the stride from sample to sample may be anything.
    strides = (math.prod(first.shape[1:]), *first.stride()[1:])
    return first.as_strided((sum(len(one) for one in slices), *first.shape[1:]), strides)


class OpenStep:
    """One merged step that is fed in groups: features go in as they come, the top steps at the end.

    The gradient for worker i depends on the top before its step and on worker i's own features only, unless the top
    mixes samples (batch-norm) [ours]. So with D known beforehand every group may be processed on its own:

        L = 1/D sum over all samples = sum_g (D_g / D) L_g       L_g the mean over the D_g samples of group g
        dL/dw                        = sum_g (D_g / D) dL_g/dw   accumulated; the top steps when the step is closed

    If fewer than D samples were fed in the end, because a worker was lost, the sum is scaled by D / fed: then it is the
    mean over the samples that were fed. One group of all D samples is the merged step, to the bit.

    Nor need a worker's d_i samples go in at once: a part of them gets its rows of the gradient of L_i, the mean over
    all d_i, which is (D / d_i) times its rows of dL/dZ, whatever else the group holds.

    Args:
        top: (D, F...) -> logits (D, C), in training mode if it is to train.
        optimizer: over the parameters of top; its gradients are cleared first.
        num_samples: D, the samples that are expected.
        in_order: the sum over the workers is made in the order of `close` instead of that of arrival, so that floats
            add up to the same bits however they arrived. What a worker is sent does not wait for it: its backward to
            the features comes first, the one to the parameters when the step is closed. That costs a second pass
            through the top's activations (they are kept), about a third of the step, and every worker is a group.
    """

    def __init__(
        self, top: nn.Module, optimizer: torch.optim.Optimizer, num_samples: int, in_order: bool = False
    ) -> None:
        self._top = top
        self._optimizer = optimizer
        self._num_samples = num_samples
        self._in_order = in_order
        self._num_fed = 0
        self._losses: list[tuple[Tensor, int]] = []  # mean loss of each group and its D_g
        optimizer.zero_grad(set_to_none=True)

    def feed(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        prior: Tensor | None = None,
        own_priors: Sequence[Tensor] | None = None,
        batch_sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """One forward and one backward of one group; (d_i, F...) per worker: the gradient of its own mean loss.

        Args:
            features: (d_i, F...) per worker, or fewer of its samples; float32 or float64; in_order: of one worker.
            labels: (d_i,) int64 per worker, in the same order.
            prior: (C,) ln pi of the merged samples: the loss is logit-adjusted by it; None: the plain loss.
            own_priors: (C,) ln pi_i per worker: what goes back to worker i is the gradient of the loss adjusted by its
                own prior, from the same forward, by a second backward (SCALA); None: the gradient of the loss of the
                step.
            batch_sizes: d_i per entry of features, where these are parts of batches; None: they are whole.
        """
        merged, targets = merge_features(features, labels)  # (D_g, F...), (D_g,)
        merged.requires_grad_()
        sizes = [z.shape[0] for z in features]
        wholes = list(batch_sizes) if batch_sizes is not None else sizes  # d_i
        logits = forward_any(self._top, merged)  # (D_g, C)
        loss = adjusted_cross_entropy(logits, targets, prior)
        num_group = sum(sizes)  # D_g
        part = loss * (num_group / self._num_samples)
        if self._in_order:
            assert len(sizes) == 1 and own_priors is None, "in order, workers go in one by one"
            (gradient,) = torch.autograd.grad(loss, [merged], retain_graph=True)
            gradients = [gradient if sizes == wholes else gradient * (num_group / wholes[0])]
        elif own_priors is None:
            part.backward()  # type: ignore[no-untyped-call]
            gradients = self._slices(merged, sizes, wholes)
        else:
            rows = torch.cat([own.expand(d, -1) for own, d in zip(own_priors, sizes, strict=True)])  # (D_g, C)
            own_part = adjusted_cross_entropy(logits, targets, rows) * (num_group / self._num_samples)
            part.backward(inputs=self._trained(), retain_graph=True)  # type: ignore[no-untyped-call]
            own_part.backward(inputs=[merged])  # type: ignore[no-untyped-call]
            gradients = self._slices(merged, sizes, wholes)
        self._num_fed += num_group
        self._losses.append((loss if self._in_order else loss.detach(), num_group))
        return gradients

    def close(self, order: Sequence[int] | None = None) -> float:
        """Steps the top; the mean loss in nats over the samples that were fed, before the step.

        Args:
            order: of the groups, counted as they were fed, in which losses (in_order: gradients, too) are summed up.
        """
        assert self._losses, "a step without samples has no gradient"
        losses = [self._losses[i] for i in order] if order is not None else self._losses
        scale = self._num_samples / self._num_fed  # 1 unless somebody was lost
        if self._in_order:
            for loss, num_group in losses:
                part = loss * (num_group / self._num_samples)
                part.backward(inputs=self._trained())  # type: ignore[no-untyped-call]
        if self._num_fed != self._num_samples:
            for parameter in self._top.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self._optimizer.step()
        self._losses = []
        return scale * sum(float(loss.detach()) * (num_group / self._num_samples) for loss, num_group in losses)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._top.parameters() if parameter.requires_grad]

    def _slices(self, merged: Tensor, sizes: Sequence[int], wholes: Sequence[int]) -> list[Tensor]:
        """(d_i, F...) each: the slices of d(part of L)/dZ times D / d_i, views of a new buffer."""
        assert merged.grad is not None
        slices = torch.split(merged.grad, list(sizes))
        return [s.mul_(self._num_samples / d) for s, d in zip(slices, wholes, strict=True)]


def merged_step(
    top: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    prior: Tensor | None = None,
    own_priors: Sequence[Tensor] | None = None,
) -> MergedStep:
    """One top forward and one mean cross-entropy over all D samples, one backward, one step. [paper]

    The arguments are those of `OpenStep` and its `feed`; features and labels in plan order.
    """
    step = OpenStep(top, optimizer, sum(len(y) for y in labels))
    gradients = step.feed(features, labels, prior, own_priors)
    return MergedStep(gradients, step.close())


def single_step(top: nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor) -> SingleStep:
    """One step of one worker's own top, without merging (SplitFed): (d, F...) and (d,) in, gradient (d, F...) out."""
    step = merged_step(top, optimizer, [features], [labels])
    return SingleStep(step.gradients[0], step.loss_nats)
