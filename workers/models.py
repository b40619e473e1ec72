"""The network that a worker trains: built once per kind, lent for a round."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from mergesfl.errors import MergeSFLError
from mergesfl.methods.base import Assignment, Work
from mergesfl.methods.flops import WorkFlops, count_work_flops
from mergesfl.models import build_model
from mergesfl.protocol.messages import Welcome
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel

# Cutting a torchvision network patches torch.nn while it traces (mergesfl/training/tracing.py): one thread at a time.
_BUILD_LOCK = threading.Lock()

WARM_UP_SAMPLES = 2  # enough to load the kernels, little enough for a slow device [ours]


class WorkFailedError(MergeSFLError):
    """This worker could not compute its round: out of memory, or a state that does not fit the model."""


class ModelSource(Protocol):
    """Where a worker's network comes from. Its weights mean nothing: every round begins with the server's."""

    def prepare(self, welcome: Welcome, device: torch.device) -> tuple[int, ...]:
        """Builds the network of a run; the shape of one sample at its cut. Raises ConfigError, WorkFailedError."""
        ...

    def lend(self) -> contextlib.AbstractContextManager[SplitModel]:
        """The network, for one round."""
        ...

    def work_flops(self, name: str, work: Work, assignment: Assignment) -> WorkFlops:
        """FLOPs of the work of this name on this network, counted with its first assignment. Raises RuntimeError."""
        ...


class OwnModel:
    """One network for one worker; kept while the runs are of the same kind."""

    def __init__(self) -> None:
        self._model: SplitModel | None = None
        self._kind: tuple[object, ...] = ()
        self._sample_shape: tuple[int, ...] = ()
        self._work_flops: dict[str, WorkFlops] = {}  # by name of the work

    def prepare(self, welcome: Welcome, device: torch.device) -> tuple[int, ...]:
        """Builds it unless it is there. Raises ConfigError, WorkFailedError."""
        num_classes = len(welcome.class_names)
        kind = (welcome.model, welcome.cut, welcome.sample_shape, num_classes)
        if self._model is None or kind != self._kind:
            self._model, self._kind = _build(welcome, num_classes, device), kind
            self._sample_shape, self._work_flops = welcome.sample_shape, {}
        return self._model.feature_shape(welcome.sample_shape)

    @contextlib.contextmanager
    def lend(self) -> Iterator[SplitModel]:
        """The same network every time."""
        assert self._model is not None, "the model is built before the first assignment"
        yield self._model

    def work_flops(self, name: str, work: Work, assignment: Assignment) -> WorkFlops:
        """Counted once per name and network. Raises RuntimeError when the state does not fit the network."""
        assert self._model is not None, "the model is built before the first assignment"
        if name not in self._work_flops:
            with _BUILD_LOCK:  # torch's counter hangs hooks on the modules of all threads
                self._work_flops[name] = count_work_flops(work, self._model, assignment, self._sample_shape)
        return self._work_flops[name]


def _build(welcome: Welcome, num_classes: int, device: torch.device) -> SplitModel:
    with _BUILD_LOCK:
        model = build_model(welcome.model, welcome.cut, welcome.sample_shape, num_classes, 0)
        try:
            warm_up(model.bottom, welcome.sample_shape, device)
        except RuntimeError as error:
            raise WorkFailedError(
                f"the bottom of {welcome.model} cut at {welcome.cut} does not run on {device}: {error}"
            ) from error
    return model


def warm_up(bottom: nn.Module, sample_shape: tuple[int, ...], device: torch.device) -> None:
    """Moves the bottom to the device and runs it once, forward and backward, so that no observation pays for loading.

    In evaluation mode and without an optimizer: parameters, buffers, gradients and generators stay as they are.
    Raises RuntimeError when the device cannot do it.
    """
    place(bottom, device).eval()
    z = bottom(torch.zeros(WARM_UP_SAMPLES, *sample_shape, device=device))  # (WARM_UP_SAMPLES, F...)
    if z.requires_grad:  # else the bottom has nothing to train
        parameters = [parameter for parameter in bottom.parameters() if parameter.requires_grad]
        torch.autograd.grad(z.sum(), parameters, allow_unused=True)
    bottom.train()
