"""When the end of a round is judged and written down: in line, or in a thread beside the next round.

After a round the network is evaluated, the journal gets its line, and a checkpoint is saved if one is due, in this
order. In line all workers are idle meanwhile. Beside the next round a frozen copy of the network is evaluated while the
workers compute; at most one round is pending, and its line and its checkpoint are on the disk before anything of the
next one is written.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from mergesfl.runtime.clock import Clock
from mergesfl.training.evaluation import Evaluation
from mergesfl.training.split import SplitModel

Evaluate = Callable[[SplitModel], Evaluation]
Keep = Callable[[Evaluation | None, float], None]  # (what was found, the seconds that it took): writes it down

log = logging.getLogger("ps")


class Evaluator(Protocol):
    """One round at a time: `begin` after `wait`."""

    def begin(self, network: SplitModel | None, keep: Keep) -> None:
        """Evaluates the network as it is now (None: this round is not evaluated), then calls `keep` with the result."""
        ...

    def wait(self) -> None:
        """Until what was begun is kept. Raises what evaluating or keeping it has raised, once."""
        ...

    def close(self) -> None:
        """The run is over, one way or the other."""
        ...


class InlineEvaluator:
    """`begin` does it all; nothing is ever pending. For clocks that are not the real one."""

    def __init__(self, evaluate: Evaluate, clock: Clock) -> None:
        self._evaluate = evaluate
        self._clock = clock

    def begin(self, network: SplitModel | None, keep: Keep) -> None:
        """Raises what evaluating and keeping raise."""
        _finish(self._evaluate, self._clock, network, keep)

    def wait(self) -> None:
        """Nothing is pending."""

    def close(self) -> None:
        """Nothing is open."""


class BackgroundEvaluator:
    """One thread of its own, which the caller's computing runs beside; one copy of the network, made once.

    The thread gives torch as many threads as the caller has: kernels may add up in another order with more or fewer,
    and an evaluation has the same bits in line and here. So while one is under way the parameter server may use up to
    twice its cluster.ps_threads, and workers on the same machine share the cores with it.

    Args:
        evaluate: called in the thread, with the copy.
        clock: read in the thread, too.
    """

    def __init__(self, evaluate: Evaluate, clock: Clock) -> None:
        self._evaluate = evaluate
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "evaluation", torch.set_num_threads, (torch.get_num_threads(),))
        self._frozen: SplitModel | None = None
        self._pending: Future[None] | None = None

    def begin(self, network: SplitModel | None, keep: Keep) -> None:
        """Returns as soon as the network is copied."""
        assert self._pending is None, "wait() comes first"
        frozen = None if network is None else self._freeze(network)
        self._pending = self._thread.submit(_finish, self._evaluate, self._clock, frozen, keep)

    def wait(self) -> None:
        """Blocks; the thread's error becomes the caller's."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, too; an error is logged: the caller that did not wait for it has one of its own already."""
        try:
            self.wait()
        except Exception as error:
            log.error("the last closed round could not be evaluated and saved: %s: %s", type(error).__name__, error)
        self._thread.shutdown()

    def _freeze(self, network: SplitModel) -> SplitModel:
        """A copy with the same layout in memory, on the same device. Without gradients, and it computes by itself where
        the network computes on several ranks."""
        if self._frozen is None:
            self._frozen = copy.deepcopy(network)
            return self._frozen
        with torch.no_grad():
            for mine, current in zip(_tensors(self._frozen), _tensors(network), strict=True):
                mine.copy_(current)
        return self._frozen


def _finish(evaluate: Evaluate, clock: Clock, network: SplitModel | None, keep: Keep) -> None:
    if network is None:
        keep(None, 0.0)
        return
    begin_seconds = clock.now_seconds()
    evaluation = evaluate(network)
    keep(evaluation, clock.now_seconds() - begin_seconds)


def _tensors(network: SplitModel) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
