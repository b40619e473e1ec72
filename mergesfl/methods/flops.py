"""How many FLOPs a worker spends per sample, counted by running the method's own `work` once.

Counted are matrix products and convolutions, a multiply-add as two (torch's counter, which has no formula for the rest:
activations, pooling, normalisation, the optimiser's step). So a method with work of its own beside the network, such as
a decoder, is charged for it without a table that could be wrong.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mergesfl.methods.base import Assignment, Work, copy_state
from mergesfl.training.split import SplitModel

COUNTED_SAMPLES = 2  # batch-norm refuses one


@dataclass(frozen=True)
class WorkFlops:
    """FLOPs of one sample in one step: before the exchange of features, and after it.

    Of a method without exchanges all is `backward_flops_per_sample`; only `full_flops_per_sample` means something.
    """

    forward_flops_per_sample: float
    backward_flops_per_sample: float

    @property
    def full_flops_per_sample(self) -> float:
        """Forward and backward."""
        return self.forward_flops_per_sample + self.backward_flops_per_sample


def count_work_flops(work: Work, model: SplitModel, assignment: Assignment, sample_shape: tuple[int, ...]) -> WorkFlops:
    """Runs one step of `work` over COUNTED_SAMPLES made-up samples, on a copy: model and generators stay as they are.

    Args:
        work: the worker's side of the method.
        model: the network, on any device; counted is on the CPU.
        assignment: a real one, for its settings and its state.
        sample_shape: of one sample, without the batch.
    Raises:
        RuntimeError: the state does not fit the model.
    """
    counted_forward_flops = 0.0
    with FlopCounterMode(display=False) as counter:

        def exchange(step: int, z: Tensor, y: Tensor) -> Callable[[], Tensor]:
            nonlocal counted_forward_flops
            counted_forward_flops = float(counter.get_total_flops())
            return lambda: torch.zeros_like(z)  # (COUNTED_SAMPLES, F...)

        one_step = dataclasses.replace(
            assignment,
            num_steps=1,
            batch_size=COUNTED_SAMPLES,
            state=copy_state(assignment.state),
            parts_per_step=1,
        )
        work(copy.deepcopy(model).cpu(), one_step, _made_up(sample_shape), exchange)
    total_flops = float(counter.get_total_flops())
    return WorkFlops(counted_forward_flops / COUNTED_SAMPLES, (total_flops - counted_forward_flops) / COUNTED_SAMPLES)


def _made_up(sample_shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise, all of class 0."""
    generator = torch.Generator()
    generator.manual_seed(0)
    while True:
        x = torch.randn(COUNTED_SAMPLES, *sample_shape, generator=generator)  # (COUNTED_SAMPLES, *sample)
        yield x, torch.zeros(COUNTED_SAMPLES, dtype=torch.int64)  # (COUNTED_SAMPLES,)
