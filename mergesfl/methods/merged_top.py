"""Feature merging on the server: what MergeSFL, Minibatch-SFL, SCALA and GPSL do with the features of a step.

With `momentum` beta > 0 the merged step is one of momentum SGD [ours]: m <- beta * m + dL/dw, w <- w - eta * m, where m
lives on from round to round. It is what the step-wise fusion of SMoFi (arXiv 2511.09828) comes to with a single top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mergesfl.errors import ConfigError
from mergesfl.methods.base import MethodSettings, State, StepFeatures, copy_state
from mergesfl.methods.split_program import seed_of_turn
from mergesfl.training.dropout import has_dropout, seed_dropout, seed_dropout_groups
from mergesfl.training.merging import OpenStep, merged_step
from mergesfl.training.momentum import checked_copy, make_momentum_sgd, put_buffers, take_buffers, zero_buffers
from mergesfl.training.singles import layer_with_batch_statistics
from mergesfl.training.split import Half, SplitModel


class MergedTop:
    """ONE forward, ONE mean loss over D samples and ONE step of the top (MergeSFL, section 1 step 4) [paper].

    Implements `TopTrainer`, `StreamingTop` and `CarriedState`. A subclass may adjust the logits by a prior: see
    `priors_of`; streaming knows none, because the merged batch is not known before its end.
    """

    def __init__(self, top: nn.Module, momentum: float = 0.0) -> None:
        self._top = top
        self._momentum = momentum
        self._buffers = zero_buffers(top) if momentum else {}  # as they stand between two rounds
        self._optimizer: torch.optim.Optimizer
        # Of a step that is streamed:
        self._open_step: OpenStep
        self._batch_sizes: dict[str, int] = {}  # worker_id -> d_i, in plan order
        self._fed: list[tuple[str, int]] = []  # worker_id and part of the first of each group, as they came
        self._seed = 0
        self._feeds_one_by_one = False

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """A new round has a new learning rate; the momentum, if any, goes on."""
        self._optimizer = make_momentum_sgd(self._top.parameters(), rate, self._momentum)
        if self._momentum:
            put_buffers(self._optimizer, self._top, self._buffers)

    def priors_of(self, arrived: Sequence[StepFeatures]) -> tuple[Tensor | None, list[Tensor] | None]:
        """(C,) ln pi of the merged samples and per worker, for a logit-adjusted loss; here None: the plain loss."""
        return None, None

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """Merges, trains, and returns the slices scaled by D / d_i."""
        seed_dropout(self._top, seed)
        prior, own_priors = self.priors_of(arrived)
        features, labels = [one.features for one in arrived], [one.labels for one in arrived]
        merged = merged_step(self._top, self._optimizer, features, labels, prior, own_priors)
        return merged.gradients, merged.loss_nats

    def begin_step(self, batch_sizes: Mapping[str, int], seed: int, in_order: bool) -> None:
        """D = sum d_i is known. In order, workers and their parts go in one by one.

        So they do where the top has dropout and trains on several ranks, which are told one seed per forward.
        """
        self._open_step = OpenStep(self._top, self._optimizer, sum(batch_sizes.values()), in_order)
        self._batch_sizes, self._fed, self._seed = dict(batch_sizes), [], seed
        elsewhere = isinstance(self._top, Half) and self._top.trains_elsewhere
        self._feeds_one_by_one = in_order or (elsewhere and has_dropout(self._top))

    def feed(self, arrived: Sequence[StepFeatures]) -> list[Tensor]:
        """Adds (d_i / D) dL_i/dw to the gradient of the top; the slices as `step` returns them."""
        groups = [[one] for one in arrived] if self._feeds_one_by_one else [list(arrived)]
        gradients = []
        for group in groups:
            num_workers = len(self._batch_sizes)
            seeds = [seed_of_turn(self._seed, one.worker_id, num_workers, one.part) for one in group]
            seed_dropout_groups(self._top, list(zip(seeds, [len(one.labels) for one in group], strict=True)))
            gradients += self._open_step.feed(
                [one.features for one in group],
                [one.labels for one in group],
                batch_sizes=[self._batch_sizes[one.worker_id] for one in group],
            )
            self._fed.append((group[0].worker_id, group[0].part))
        return gradients

    def end_step(self) -> float:
        """ONE step of the top; the losses are summed up in plan order where workers went in one by one."""
        places = {worker_id: place for place, worker_id in enumerate(self._batch_sizes)}
        keys = [(places[worker_id], part) for worker_id, part in self._fed]
        return self._open_step.close(sorted(range(len(keys)), key=keys.__getitem__))

    def close(self, weights: dict[str, float]) -> None:
        """The top is never averaged [paper]."""
        if self._momentum:
            self._buffers = take_buffers(self._optimizer, self._top)

    def state_dict(self) -> dict[str, Tensor]:
        """The momentum by the names of the top's parameters; empty without momentum."""
        return copy_state(self._buffers)

    def load_state_dict(self, state: State) -> None:
        """Takes it back. Raises CheckpointError when it is not of this top."""
        self._buffers = checked_copy(self._buffers, state)


def check_streaming_merge(network: SplitModel, settings: MethodSettings) -> None:
    """Raises ConfigError where the merged step needs all D samples at once: batch-norm, instance-norm with running
    statistics, logit adjustment."""
    if settings.logit_adjustment:
        raise ConfigError(
            "method.logit_adjustment = true adjusts the loss by the labels of the whole merged batch, which are not "
            "known before the last worker answers: set training.merge = 'barrier', or method.logit_adjustment = false"
        )
    layer = layer_with_batch_statistics(network.top)
    if layer is not None:
        name, kind = layer
        raise ConfigError(
            f"the top after the cut '{network.cut}' holds the layer '{name}' ({kind}), whose statistics are those of "
            "the whole merged batch: set training.merge = 'barrier', or cut behind the last such layer (model.cut, see "
            "`mergesfl cuts`)"
        )
