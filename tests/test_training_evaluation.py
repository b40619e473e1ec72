"""Evaluation by hand, over uneven batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mergesfl.errors import DataError
from mergesfl.training.evaluation import evaluate

CPU = torch.device("cpu")


class Table(nn.Module):
    """The sample is its own logits; a dropout that would spoil them in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.spoil = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(x)


def test_by_hand_over_uneven_batches() -> None:
    """Logits (ln 3, 0, -inf-like): softmax of (ln 3, 0) over the first two classes is (3/4, 1/4).

    Four samples predicted 0, labels 0, 0, 1, 1: accuracy 1/2, class 0 all right, class 1 none, class 2 never seen.
    Loss: two of -ln(3/4), two of -ln(1/4), mean over four. A mean over batches of 3 and 1 would differ.
    """
    row = [math.log(3), 0.0, -1e9]
    batches = [
        (torch.tensor([row] * 3), torch.tensor([0, 0, 1])),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.int64)),
        (torch.tensor([row]), torch.tensor([1])),
    ]
    result = evaluate(Table(), batches, 3, CPU)
    assert result.accuracy == 0.5
    assert result.num_samples == 4
    assert result.class_accuracy[:2] == (1.0, 0.0)
    assert math.isnan(result.class_accuracy[2])
    assert result.loss_nats == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2, abs=1e-7)


def test_the_split_into_batches_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator)
    y = torch.randint(0, 4, (50,), generator=generator)
    model = Table()
    whole = evaluate(model, [(x, y)], 4, CPU)
    parts = evaluate(model, zip(x.split(7), y.split(7), strict=True), 4, CPU)
    assert whole.accuracy == parts.accuracy == float((x.argmax(1) == y).double().mean())
    assert whole.class_accuracy == parts.class_accuracy
    assert whole.loss_nats == pytest.approx(parts.loss_nats, abs=1e-12)


def test_modes_are_restored_and_no_graph_is_kept() -> None:
    model = nn.Sequential(Table(), nn.Linear(2, 2))
    model[0].eval()
    evaluate(model, [(torch.zeros(1, 2), torch.tensor([0]))], 2, CPU)
    assert model.training and not model[0].training and not model[0].spoil.training and model[1].training
    with pytest.raises(DataError):
        evaluate(model, [(torch.zeros(1, 2), torch.tensor([2]))], 2, CPU)
    assert model.training and not model[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "0 samples to evaluate"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "labels from 0 to 2, expected 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), "labels from -1 to 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"logits of shape \(2, 3\), expected \(2, 2\)"),
    ],
)
def test_illegal_data_is_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(Table(), [(x, y)], 2, CPU)
