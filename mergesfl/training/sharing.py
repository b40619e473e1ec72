"""One top, one step, several workers: each worker's own mean loss with its share of the step, without merging.

Legend: d samples of one worker, F... shape of one sample at the cut.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mergesfl.training.merging import SingleStep, merge_features
from mergesfl.training.singles import forward_any


def backward_share(top: nn.Module, features: Tensor, labels: Tensor, share: float) -> SingleStep:
    """Adds share * gradient of this worker's mean cross-entropy to the gradients of the top, which does not step yet.

    For plain SGD the mean of copies that stepped apart is the step with the mean gradient: sum_i p_i (w - eta g_i) =
    w - eta sum_i p_i g_i. So one top does for many copies whose average is taken in every step.

    Args:
        top: (d, F...) -> logits (d, C).
        features: (d, F...), detached.
        labels: (d,) int64.
        share: p_i, above 0.

    Returns: the gradient (d, F...) of the mean loss itself, without the share, and the loss.
    """
    z, y = merge_features([features], [labels])  # (d, F...), (d,): checked
    z.requires_grad_()
    loss = functional.cross_entropy(forward_any(top, z), y)
    (share * loss).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return SingleStep(z.grad / share, float(loss.detach()))
