"""The exchanges of one round: features in, the top trained, gradients out; all at once, or as they arrive.

With a barrier [paper] a step takes as long as the slowest of its workers, in every step anew. Streaming, all workers of
step k meet the top as it stands before step k, in whatever groups they come, and are answered at once; the top steps
with the sum of (d_i / D) * gradient of L_i when the last worker that is left has been processed. That is the same step
(mergesfl/training/merging.py). What arrives of step k + 1 meanwhile waits for it. If a worker is lost, the weights are
those among the samples that were processed before the step.

What streaming saves: the slowest worker of one step need not be that of the next. A round takes about the largest of
the workers' sums over the steps, where with the barrier it takes the sum over the steps of the largest. Nothing changes
for the planner, whose t_i (Eq. 7) are such sums: it makes them equal in either case.

In parts (training.parts_per_step) the slowest worker's own step becomes shorter, too: what it sends, what the top does
with it, and what comes back no longer come one after the other. Each part is answered when it is there, with its rows
of the gradient of the worker's mean loss over its whole batch. With ways up and down that are equally long and do not
share the air P parts take (P + 1) / 2P of an unsplit step's transfer. On a half-duplex link, Wi-Fi for example, where
one direction waits for the other, nothing of that is gained, and only computing is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mergesfl.methods.base import ServerProgram, StepFeatures, StreamingProgram
from mergesfl.training.finite import all_finite
from ps.exchange import RoundExchange
from ps.streaming import StreamingExchange
from ps.void import InfiniteRoundError


def merge_at_barrier(
    program: ServerProgram,
    exchange: RoundExchange,
    num_exchanges: int,
    device: torch.device,
    charge: Callable[[int], None],
    require_quorum: Callable[[], None],
) -> int:
    """All steps, each with all its features at once; returns the samples trained.

    Args:
        program: the server's side of the method, its round open.
        exchange: the messages of the round, assigned.
        num_exchanges: tau.
        device: where the top runs.
        charge: told the samples that were computed; lets virtual time pass for it.
        require_quorum: raises VoidRoundError when too few workers are left.

    Raises VoidRoundError, InfiniteRoundError, InterruptedRunError.
    """
    num_samples_trained = 0
    for step in range(num_exchanges):
        arrived, received_seconds = exchange.gather_features(step, device)
        require_quorum()
        gradients = program.merge(step, arrived)
        charge(_num_samples(arrived))
        if not _are_finite(gradients):
            raise _infinite(step)
        exchange.answer(step, arrived, gradients, received_seconds)
        num_samples_trained += _num_samples(arrived)
    return num_samples_trained


def merge_as_they_arrive(
    program: StreamingProgram,
    exchange: StreamingExchange,
    num_exchanges: int,
    device: torch.device,
    charge: Callable[[int], None],
    require_quorum: Callable[[], None],
    in_order: bool,
) -> int:
    """All steps, each in groups as they come; like `merge_at_barrier`. in_order: whatever comes first, the same bits.

    When a gradient is not finite, the rest of the step is awaited without being processed: only beside the others can
    be seen whose features were out of all proportion.
    """
    num_samples_trained = 0
    for step in range(num_exchanges):
        exchange.begin_step(step)
        program.begin_step(step, exchange.active_ids, in_order)
        is_finite = True
        while exchange.is_step_open:
            group, received_seconds = exchange.next_group(device)
            require_quorum()
            if not group or not is_finite:
                continue
            gradients = program.feed(group)
            charge(_num_samples(group))
            is_finite = _are_finite(gradients)
            if is_finite:
                exchange.answer(step, group, gradients, received_seconds)
                num_samples_trained += _num_samples(group)
        exchange.end_step()
        require_quorum()  # of those who were answered, too
        if not is_finite:
            raise _infinite(step)
        program.end_step()
    return num_samples_trained


def _num_samples(arrived: Sequence[StepFeatures]) -> int:
    return sum(len(one.labels) for one in arrived)


def _are_finite(gradients: Sequence[torch.Tensor]) -> bool:
    return all(all_finite(gradient) for gradient in gradients)


def _infinite(step: int) -> InfiniteRoundError:
    return InfiniteRoundError(f"a gradient of step {step} is not finite")
