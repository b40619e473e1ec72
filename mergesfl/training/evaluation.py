"""Accuracy and loss of a model over labelled batches, exact also when the batches differ in size.

Legend: d samples of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """Means over all samples, not over batches.

    Attributes:
        accuracy: share of the samples whose largest logit is the label, 0 to 1.
        loss_nats: mean cross-entropy.
        num_samples: samples seen.
        class_accuracy: (C,) the accuracy over the samples of each label; nan for a label that did not occur.
    """

    accuracy: float
    loss_nats: float
    num_samples: int
    class_accuracy: tuple[float, ...]


def evaluate(
    model: nn.Module, inputs: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device
) -> Evaluation:
    """Runs model in evaluation mode over all batches; every module's mode is restored, also after an error.

    Args:
        model: x (d, sample...) -> logits (d, C), on `device`.
        inputs: batches of x (d, sample...) and y (d,) int64, of any sizes, on any device.
        num_classes: C.
        device: where to compute.
    Raises:
        DataError: there is no sample, a label is outside 0..C-1, or the logits are not (d, C).
    """
    correct = torch.zeros(num_classes, dtype=torch.int64)  # (C,) samples per label predicted right
    seen = torch.zeros(num_classes, dtype=torch.int64)  # (C,) samples per label
    loss_sum_nats = 0.0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for x, y in inputs:
                if y.numel() == 0:
                    continue
                if not 0 <= int(y.min()) <= int(y.max()) < num_classes:
                    raise DataError(
                        f"labels from {int(y.min())} to {int(y.max())}, expected 0 to {num_classes - 1}: "
                        "set the number of classes of the data set"
                    )
                logits = model(x.to(device))  # (d, C)
                if tuple(logits.shape) != (y.shape[0], num_classes):
                    raise DataError(
                        f"logits of shape {tuple(logits.shape)}, expected {(y.shape[0], num_classes)}: "
                        "build the model for this data set"
                    )
                loss = functional.cross_entropy(logits.double(), y.to(device), reduction="sum")
                loss_sum_nats += float(loss)
                hit = logits.argmax(dim=1).cpu() == y.cpu()  # (d,)
                seen += torch.bincount(y.cpu(), minlength=num_classes)
                correct += torch.bincount(y.cpu()[hit], minlength=num_classes)
    finally:
        for module, training in modes:
            module.training = training
    num_samples = int(seen.sum())
    if num_samples == 0:
        raise DataError("0 samples to evaluate, expected at least 1: check the test part of the data set")
    per_class = tuple(c / s if s else float("nan") for c, s in zip(correct.tolist(), seen.tolist(), strict=True))
    return Evaluation(int(correct.sum()) / num_samples, loss_sum_nats / num_samples, num_samples, per_class)
