"""The worker's side of a survey: how long a step would take, measured without training anything.

Spec, section 1, step 1 [paper]: workers report compute and transfer time per sample before a round is planned. How to
measure is ours:

    compute    one batch of its own data, forward and backward as one stretch, as between two exchanges of a round
    transfer   a probe out until its echo is in, less what the server held it

If the steps of the rounds go in parts, so does this one, for no sum of what was measured one after the other tells how
much of it will go on at the same time: every part is computed, sent as a probe of its own size and echoed at once,
while the next is computed. As in a round the last backward of one step and the first forward of the next are one
stretch; here it is that of the first part, at the beginning. What was transfer is reckoned as in a round
(workers/timing.py). So a link that cannot carry both ways at the same time, and a device that computes for longer than
it transfers, are seen as they are.

What is uncertain: weights are those that happen to be here, the network is in evaluation mode (so that neither buffers
nor dropout streams move), there is no optimizer's step, and what a method computes beside the network (a decoder) is
not measured. A batch smaller than that of a round pays more of the fixed costs per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.methods.base import Assignment, Batches, Exchange, WorkResult
from mergesfl.parts import part_bytes, part_sizes
from mergesfl.protocol.messages import Echo, Probe, Report, Survey, round_of
from mergesfl.runtime.clock import Clock
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from workers.link import Link, SessionLostError
from workers.models import ModelSource
from workers.pace import Pace, Stretch
from workers.timing import StepTiming


class SelfSurvey:
    """One worker that measures itself.

    Args:
        link: where the probe goes.
        clock: the only source of time.
        pace: how durations are reported.
        device: where the network runs.
        models: where the network comes from.
    """

    def __init__(self, link: Link, clock: Clock, pace: Pace, device: torch.device, models: ModelSource) -> None:
        self._link = link
        self._clock = clock
        self._pace = pace
        self._device = device
        self._models = models

    def report(self, survey: Survey, batches: Batches) -> Report:
        """Measures both; `batches` are of survey.num_samples. Raises the ends of a session, RuntimeError."""
        sizes = list(part_sizes(survey.num_samples, survey.parts_per_step))
        if survey.parts_per_step > 1 and survey.num_probe_samples != survey.num_samples:
            raise SessionLostError(
                f"the server asks for a probe of {survey.num_probe_samples} samples in parts, expected "
                f"{survey.num_samples}, those that are computed"
            )
        name, work = ("survey whole", pass_whole) if survey.whole_network else ("survey bottom", pass_bottom)
        assignment = Assignment(round_of(survey.round_num), 1, survey.num_samples, settings={}, state={}, seed=0)
        self._pace.begin_round(assignment.round_num, lambda: self._models.work_flops(name, work, assignment))
        with contextlib.ExitStack() as lent:  # no longer than it is computed with: others may wait for it
            model = lent.enter_context(self._models.lend())
            module = place(model if survey.whole_network else model.bottom, self._device)
            lent.enter_context(_in_evaluation_mode(module))
            begin_seconds = self._clock.now_seconds()
            x, y = next(batches)  # (d, *sample), (d,)
            parts = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
            _backward(module, _forward(module, *parts[0], survey.whole_network))
            self._synchronize()
            if len(parts) == 1:
                lent.close()
            compute_seconds = self._pause(begin_seconds, Stretch(num_full_samples=sizes[0]))
            transfer_seconds, rest_seconds = self._exchange(survey, module, parts)
            compute_seconds += rest_seconds
        return Report(
            survey.round_num,
            self._pace.compute_seconds(compute_seconds, survey.num_samples) / survey.num_samples,
            self._pace.transfer_seconds(transfer_seconds, survey.num_probe_samples) / survey.num_probe_samples,
        )

    def _exchange(self, survey: Survey, module: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Probes out, echoes in, and meanwhile all parts but the first: seconds of transfer and of computing."""
        clock, link, compute_seconds = self._clock, self._link, 0.0
        probe_bytes, echo_bytes = (
            part_bytes(num_bytes, survey.num_probe_samples, survey.parts_per_step)
            for num_bytes in (survey.probe_bytes, survey.echo_bytes)
        )
        payloads = [torch.zeros(num_bytes, dtype=torch.uint8).numpy() for num_bytes in probe_bytes]  # (n,) together
        timing = StepTiming(clock.now_seconds())

        def pause(begin_seconds: float, stretch: Stretch) -> None:
            nonlocal compute_seconds
            self._synchronize()
            seconds = self._pause(begin_seconds, stretch)
            timing.computed(seconds)
            compute_seconds += seconds

        roots: list[Tensor] = []
        for part, payload in enumerate(payloads):
            if part:
                begin_seconds = clock.now_seconds()
                roots.append(_forward(module, *parts[part], survey.whole_network))
                pause(begin_seconds, Stretch(num_forward_samples=len(parts[part][1])))
            timing.sent(clock.now_seconds())
            link.send(Probe(survey.round_num, payload, part))
        for part, num_bytes in enumerate(echo_bytes):
            if part:
                begin_seconds = clock.now_seconds()
                _backward(module, roots[part - 1])
                pause(begin_seconds, Stretch(num_backward_samples=len(parts[part][1])))
            echo = link.receive()
            if not isinstance(echo, Echo):
                raise SessionLostError(f"expected Echo, got {type(echo).__name__}")
            timing.answered(clock.now_seconds(), echo.held_seconds)
            if len(echo.payload) != num_bytes:
                raise SessionLostError(f"echo of {len(echo.payload)} bytes, expected {num_bytes}")
        return timing.transfer_seconds(), compute_seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _pause(self, begin_seconds: float, stretch: Stretch) -> float:
        """A stretch of computing that began then has ended: throttles it, and returns how long it took."""
        self._pace.throttle(self._clock.now_seconds() - begin_seconds, stretch)
        return self._clock.now_seconds() - begin_seconds


@contextlib.contextmanager
def _in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """So that parameters, buffers, gradients and generators stay as they are; modes are put back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _forward(module: nn.Module, x: Tensor, y: Tensor, whole_network: bool) -> Tensor:
    """A scalar that a backward can begin with."""
    out: Tensor = module(x)  # (d, C) or (d, F...)
    return functional.cross_entropy(out, y) if whole_network else out.sum()


def _backward(module: nn.Module, root: Tensor) -> None:
    if root.requires_grad:  # else there is nothing to train
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        torch.autograd.grad(root, parameters, allow_unused=True)


def pass_bottom(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """One step of a split method, as `Work`: the bottom, whose features are offered to the exchange."""
    x, y = next(batches)  # (d, *sample), (d,)
    with _in_evaluation_mode(model.bottom):
        root = _forward(model.bottom, x, y, whole_network=False)
        exchange(0, root.detach(), y)
        _backward(model.bottom, root)
    return WorkResult({}, len(y), {})


def pass_whole(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """One step of a federated method, as `Work`."""
    x, y = next(batches)  # (d, *sample), (d,)
    with _in_evaluation_mode(model):
        _backward(model, _forward(model, x, y, whole_network=True))
    return WorkResult({}, len(y), {})
