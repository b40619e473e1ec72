"""The worker's side of a survey: how long a step would take, measured without training anything.

Spec, section 1, step 1 [paper]: workers report compute and transfer time per sample before a round is planned. How to
measure is ours:

    compute    one batch of its own data, forward and backward as one stretch, as between two exchanges of a round
    transfer   a probe out until its echo is in, less what the server held it

What is uncertain: weights are those that happen to be here, the network is in evaluation mode (so that neither buffers
nor dropout streams move), there is no optimizer's step, and what a method computes beside the network (a decoder) is
not measured. A batch smaller than that of a round pays more of the fixed costs per sample.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mergesfl.methods.base import Assignment, Batches, Exchange, WorkResult
from mergesfl.protocol.messages import Echo, Probe, Report, Survey, round_of
from mergesfl.runtime.clock import Clock
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from workers.link import Link, SessionLostError
from workers.models import ModelSource
from workers.pace import Pace, Stretch


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
        return Report(survey.round_num, self._compute_seconds(survey, batches), self._transfer_seconds(survey))

    def _compute_seconds(self, survey: Survey, batches: Batches) -> float:
        """Per sample."""
        round_num, num_samples = round_of(survey.round_num), survey.num_samples
        name, work = ("survey whole", pass_whole) if survey.whole_network else ("survey bottom", pass_bottom)
        assignment = Assignment(round_num, num_steps=1, batch_size=num_samples, settings={}, state={}, seed=0)
        self._pace.begin_round(round_num, lambda: self._models.work_flops(name, work, assignment))
        with self._models.lend() as model:  # no longer than it is computed with: others may wait for it
            place(model if survey.whole_network else model.bottom, self._device)
            begin_seconds = self._clock.now_seconds()
            work(model, assignment, batches, _no_exchange)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        self._pace.throttle(self._clock.now_seconds() - begin_seconds, Stretch(num_full_samples=num_samples))
        return self._pace.compute_seconds(self._clock.now_seconds() - begin_seconds, num_samples) / num_samples

    def _transfer_seconds(self, survey: Survey) -> float:
        """Per sample."""
        payload = torch.zeros(survey.probe_bytes, dtype=torch.uint8).numpy()  # (n,)
        begin_seconds = self._clock.now_seconds()
        self._link.send(Probe(survey.round_num, payload))
        echo = self._link.receive()
        exchange_seconds = self._clock.now_seconds() - begin_seconds
        if not isinstance(echo, Echo):
            raise SessionLostError(f"expected Echo, got {type(echo).__name__}")
        if len(echo.payload) != survey.echo_bytes:
            raise SessionLostError(f"echo of {len(echo.payload)} bytes, expected {survey.echo_bytes}")
        measured_seconds = exchange_seconds - echo.held_seconds
        return self._pace.transfer_seconds(measured_seconds, survey.num_probe_samples) / survey.num_probe_samples


def _pass(model: SplitModel, batches: Batches, whole_network: bool) -> WorkResult:
    """Forward and backward over one batch; parameters, buffers, gradients, generators and modes stay as they are."""
    x, y = next(batches)  # (d, *sample), (d,)
    module = model if whole_network else model.bottom
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        out = module(x)  # (d, C) or (d, F...)
        root = functional.cross_entropy(out, y) if whole_network else out.sum()
        if root.requires_grad:  # else there is nothing to train
            torch.autograd.grad(root, parameters, allow_unused=True)
    finally:
        for part, training in modes.items():
            part.training = training
    return WorkResult({}, len(y), {})


def pass_bottom(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """One step of a split method, as `Work`: the bottom, without an exchange."""
    return _pass(model, batches, whole_network=False)


def pass_whole(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """One step of a federated method, as `Work`."""
    return _pass(model, batches, whole_network=True)


def _no_exchange(step: int, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a survey exchanges no features")
