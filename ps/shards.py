"""The training forward and backward of the top, its rows shared out over the ranks.

In forward every rank runs its copy of the top on its rows, and the logits come together on rank 0; in backward the
gradient of the logits goes the same way, and so the losses, their adjustments and the optimiser know of one process
only. Rank 0 sends its parameters before every forward: whatever happened to them, all ranks compute with the same.

Legend: D merged samples, d_r rows of them on rank r (may be none), F... shape of one sample at the cut, C classes,
P parameters of the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesfl.errors import ConfigError
from mergesfl.training.dropout import SeededDropout
from mergesfl.training.singles import layer_with_batch_statistics
from mergesfl.training.split import Half
from ps.ranks import BACKWARD, FORWARD, Ranks

DTYPES = (torch.float32, torch.float64)  # of features, by their number in a command


def rows_of(rank: int, num_ranks: int, num_rows: int) -> tuple[int, int]:
    """(begin, end) of the rows of a rank: even shares, the first ranks have one more.

    >>> [rows_of(rank, 3, 4) for rank in range(3)]
    [(0, 2), (2, 3), (3, 4)]
    """
    share, rest = divmod(num_rows, num_ranks)
    return share * rank + min(rank, rest), share * (rank + 1) + min(rank + 1, rest)


def require_shardable(top: Half) -> None:
    """Raises ConfigError when a row of the batch cannot be computed without the others."""
    layer = layer_with_batch_statistics(top)
    if layer is not None:
        name, kind = layer
        raise ConfigError(
            f"the top holds the layer '{name}' ({kind}), whose statistics are those of the whole merged batch: start "
            "the parameter server with one rank, or set model.cut behind the last such layer"
        )


class Shard:
    """The rows of one rank through its copy of the top, forward once and backward as often as asked."""

    def __init__(self, top: Half) -> None:
        self._top = top
        self.parameters = [parameter for parameter in top.parameters() if parameter.requires_grad]
        self._dropouts = [layer for layer in top.modules() if isinstance(layer, SeededDropout) and layer.p > 0]
        self._z: Tensor
        self._logits: Tensor
        self.tensors = [*top.parameters(), *top.buffers()]
        self.num_seeds = len(self._dropouts)

    def unused_seeds(self) -> list[int]:
        """Of the dropout layers, in order. Raises MergeSFLError when one has drawn a mask of its seed already."""
        return [layer.unused_seed() for layer in self._dropouts]

    def forward(self, z: Tensor, begin: int, end: int, num_rows: int, seeds: Sequence[int]) -> Tensor:
        """Rows begin..end of D: z (d_r, F...) -> logits (d_r, C), detached."""
        self._z = z.detach().requires_grad_()
        for layer, seed in zip(self._dropouts, seeds, strict=True):
            layer.reseed(seed)
            layer.take_rows(begin, end, num_rows)
        try:
            with torch.enable_grad():
                self._logits = self._top.compute(self._z)
        finally:
            for layer in self._dropouts:
                layer.take_all_rows()
        return self._logits.detach().contiguous()

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dlogits (d_r, C) -> dL/dz (d_r, F...), and what these rows add to dL/dw, (P,)."""
        wanted = [self._z, *self.parameters]
        of_z, *of_parameters = torch.autograd.grad(
            self._logits, wanted, gradient, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return of_z.contiguous(), torch.cat([part.reshape(-1) for part in of_parameters])

    def no_gradient(self) -> Tensor:
        """(P,) what no rows add."""
        return torch.cat([torch.zeros_like(parameter).reshape(-1) for parameter in self.parameters])

    def parts_of(self, gradient: Tensor) -> list[Tensor]:
        """(P,) -> one tensor per parameter, of its shape."""
        parts = torch.split(gradient, [parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]


class ShardedTop:
    """Rank 0's end: once made, the top trains on all ranks and evaluates here."""

    def __init__(self, ranks: Ranks, top: Half) -> None:
        require_shardable(top)
        self._ranks = ranks
        self._shard = Shard(top)
        self._num_forwards = 0
        top.train_through(self._run)

    def _run(self, features: Tensor) -> Tensor:
        """(D, F...) -> (D, C)."""
        logits: Tensor = _Sharded.apply(self, features, *self._shard.parameters)
        return logits

    def forward(self, features: Tensor) -> tuple[Tensor, int]:
        """(D, F...) -> logits (D, C), and the number of this forward. Raises TransportError when a rank is lost."""
        ranks, num_rows = self._ranks, len(features)
        seeds = self._shard.unused_seeds()
        ranks.in_step = True
        ranks.command(FORWARD, num_rows, DTYPES.index(features.dtype))
        ranks.tell_seeds(seeds)
        ranks.share(self._shard.tensors)
        sent = self._send_rows(features)
        begin, end = rows_of(0, ranks.num_ranks, num_rows)
        own = self._shard.forward(features[begin:end], begin, end, num_rows, seeds)  # (d_0, C)
        logits = self._receive_rows(own, num_rows)
        ranks.wait(sent)
        ranks.in_step = False
        self._num_forwards += 1
        return logits, self._num_forwards

    def backward(self, gradient: Tensor, number: int) -> tuple[Tensor, list[Tensor]]:
        """dL/dlogits (D, C) of this forward -> dL/dz (D, F...), and dL/dw of each parameter."""
        assert number == self._num_forwards, "a rank keeps the graph of its newest forward only"
        ranks, num_rows = self._ranks, len(gradient)
        ranks.in_step = True
        ranks.command(BACKWARD, num_rows)
        sent = self._send_rows(gradient)
        begin, end = rows_of(0, ranks.num_ranks, num_rows)
        own, of_parameters = self._shard.backward(gradient[begin:end])  # (d_0, F...), (P,)
        ranks.add_up(of_parameters)
        of_features = self._receive_rows(own, num_rows)
        ranks.wait(sent)
        ranks.in_step = False
        return of_features, self._shard.parts_of(of_parameters)

    def _send_rows(self, batch: Tensor) -> list[Any]:
        """Starts to send each follower its rows of (D, ...)."""
        whole, sent = batch.detach().contiguous(), []
        for rank in range(1, self._ranks.num_ranks):
            begin, end = rows_of(rank, self._ranks.num_ranks, len(whole))
            if begin < end:
                sent.append(self._ranks.send(whole[begin:end], rank))
        return sent

    def _receive_rows(self, own: Tensor, num_rows: int) -> Tensor:
        """(d_0, ...) of this rank and those of the others -> (D, ...)."""
        whole = own.new_empty(num_rows, *own.shape[1:])
        whole[: len(own)] = own
        for rank in range(1, self._ranks.num_ranks):
            begin, end = rows_of(rank, self._ranks.num_ranks, num_rows)
            if begin < end:
                self._ranks.receive(whole[begin:end], rank)
        return whole


class _Sharded(torch.autograd.Function):
    """ShardedTop for autograd: (D, F...) and the parameters -> (D, C)."""

    @staticmethod
    def forward(ctx: Any, sharded: ShardedTop, features: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sharded = sharded
        logits, ctx.number = sharded.forward(features)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_features, of_parameters = ctx.sharded.backward(gradient, ctx.number)
        return None, of_features, *of_parameters
