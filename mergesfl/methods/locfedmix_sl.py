"""LocFedMix-SL: parallel split learning with a local regulariser, averaged bottoms and mix-up at the server.

Oh, Park, Vepakomma, Baek, Raskar, Bennis, Kim. "LocFedMix-SL: Localize, Federate, and Mix for Improved Scalability,
Convergence, and Latency in Split Learning." WWW 2022. https://doi.org/10.1145/3485447.3512153

    for every step, in parallel:
        z_i    = bottom_i(x_i)                        on worker i, d_i samples
        R_i    = mean |x_i - decoder_i(z_i)|^2        on worker i: the local regulariser        reconstruct()
        L_i    = mean cross-entropy(top(z_i), y_i)    on the server
        M_i    = mean cross-entropy(top((z_i + z_j) / 2), (y_i + y_j) / 2), j another worker    MixedTop.step()
        top   <- one step on sum_i p_i L_i + sum_i q_i M_i
        bottom_i  <- step with dL_i/dz_i + dR_i/dz_i;  decoder_i <- step with dR_i              work()
    at the end of a round:  bottom, decoder = sum_i n_i / n * those of worker i         take(), close()

What is uncertain: the paper's text was not at hand. From its abstract and from re-implementations: the two losses of
the server are one weighted sum and one step, M_i trains the top alone and never reaches a worker, bottoms and decoders
are both averaged. [ours]: p_i = d_i / sum d (the paper weighs with the data sets; batches are equal but for workers
with few samples), q_i alike with m_i = min(d_i, d_j); one partner per worker and step, the r-th after it in plan order
for a random r; R_i counts once; the decoder is linear (mergesfl.training.decoder), trained with the bottom's rate or,
where that could diverge, the highest safe one; it travels with the bottom, so a worker keeps nothing between rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesfl.errors import CheckpointError
from mergesfl.methods.base import (
    Assignment,
    Batches,
    Exchange,
    Method,
    MethodSettings,
    State,
    StepFeatures,
    WorkResult,
    copy_state,
)
from mergesfl.methods.split_program import seed_of_turn
from mergesfl.methods.splitfed_v1 import UniformSplitProgram
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.decoder import PREFIX, highest_stable_rate, initial_decoder, reconstruct
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.mixup import mix_halves, mixed_cross_entropy
from mergesfl.training.schedule import make_sgd
from mergesfl.training.sharing import backward_share
from mergesfl.training.singles import forward_any
from mergesfl.training.split import SplitModel


class MixedTop:
    """One top, one step per exchange, on the features of all workers and on their mix-ups."""

    def __init__(self, top: nn.Module) -> None:
        self._top = top
        self._optimizer: torch.optim.Optimizer

    def open(self, worker_ids: Sequence[str], rate: float) -> None:
        """A new round has a new learning rate; plain SGD has no other state."""
        self._optimizer = make_sgd(self._top.parameters(), rate)

    def step(self, arrived: Sequence[StepFeatures], seed: int) -> tuple[list[Tensor], float]:
        """Gradients of each worker's own L_i, and sum_i p_i L_i: the mix-ups are no part of what is reported."""
        self._optimizer.zero_grad(set_to_none=True)
        num_samples = sum(len(one.labels) for one in arrived)  # D
        gradients, loss_nats = [], 0.0
        for one in arrived:
            seed_dropout(self._top, seed_of_turn(seed, one.worker_id, len(arrived)))
            share = len(one.labels) / num_samples  # p_i
            result = backward_share(self._top, one.features, one.labels, share)
            gradients.append(result.gradient)
            loss_nats += share * result.loss_nats
        if len(arrived) > 1:  # a lone worker has nobody to be mixed with
            self._backward_mixed(arrived, seed)
        self._optimizer.step()
        return gradients, loss_nats

    def close(self, weights: dict[str, float]) -> None:
        """One top: there is nothing to average."""

    def _backward_mixed(self, arrived: Sequence[StepFeatures], seed: int) -> None:
        """Adds the gradient of sum_i q_i M_i to those of the top."""
        shift = int(generator_for(seed, "mix").integers(1, len(arrived)))  # r
        pairs = [(one, arrived[(i + shift) % len(arrived)]) for i, one in enumerate(arrived)]
        sizes = [min(len(one.labels), len(other.labels)) for one, other in pairs]  # m_i
        for (one, other), size in zip(pairs, sizes, strict=True):
            seed_dropout(self._top, seed_for(seed, "mix", one.worker_id))
            mixed = mix_halves(one.features, other.features)  # (m_i, F...)
            loss = mixed_cross_entropy(forward_any(self._top, mixed), one.labels, other.labels)
            (size / sum(sizes) * loss).backward()  # type: ignore[no-untyped-call]


class LocFedMixProgram(UniformSplitProgram):
    """The server's side of LocFedMix-SL (implements `ServerProgram`)."""

    def __init__(self, network: SplitModel, settings: MethodSettings, device: torch.device) -> None:
        super().__init__(network, settings, device, MixedTop(network.top))
        decoder = initial_decoder(
            network.feature_shape(settings.sample_shape),
            settings.sample_shape,
            next(network.parameters()).dtype,
            generator_for(settings.seed, "decoder"),
        )
        self._sent = {**self._bottom, **decoder}

    def global_state(self) -> State:
        """The bottom and the decoder: both are averaged with the same weights."""
        return self._sent

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Takes both."""
        self._sent = state
        super().adopt(_bottom_of(state))

    def state_dict(self) -> dict[str, Tensor]:
        """The joined network and the decoder."""
        return {**super().state_dict(), **copy_state(_decoder_of(self._sent))}

    def load_state_dict(self, state: State) -> None:
        """Takes both back. Raises CheckpointError for a state of another method, which has no decoder."""
        decoder, own = _decoder_of(state), _decoder_of(self._sent)
        if decoder.keys() != own.keys():
            raise CheckpointError(
                f"the state holds {sorted(decoder)} of the decoder, expected {sorted(own)}: "
                "load a state of method locfedmix-sl"
            )
        super().load_state_dict(_bottom_of(state))
        self._sent = {**self._bottom, **copy_state(decoder)}


def _decoder_of(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _bottom_of(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


def work(model: SplitModel, assignment: Assignment, batches: Batches, exchange: Exchange) -> WorkResult:
    """The worker's side: as in every split method, with the regulariser's gradient added at the cut."""
    bottom = model.bottom
    bottom.load_state_dict(_bottom_of(assignment.state))
    bottom.train()
    rate = float(assignment.settings["learning_rate"])
    optimizer = make_sgd(bottom.parameters(), rate)
    decoder: dict[str, Tensor] = {}
    num_samples = 0
    for step in range(assignment.num_steps):
        x, y = next(batches)  # (d_i, *sample), (d_i,)
        seed_dropout(bottom, seed_for(assignment.seed, "step", step))
        z = forward_any(bottom, x)  # (d_i, F...)
        decoder = decoder or {k: v.to(z.device, copy=True) for k, v in _decoder_of(assignment.state).items()}
        regulariser = _regulariser_step(z, x, decoder, rate)  # (d_i, F...) dR_i/dz_i
        gradient = exchange(step, z.detach(), y)() + regulariser  # (d_i, F...)
        optimizer.zero_grad(set_to_none=True)
        z.backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        num_samples += len(y)
    return WorkResult({**copy_state(bottom.state_dict()), **copy_state(decoder)}, num_samples, {})


def _regulariser_step(z: Tensor, x: Tensor, decoder: dict[str, Tensor], rate: float) -> Tensor:
    """One step of the decoder, in place; returns dR_i/dz_i (d_i, F...), taken before it."""
    leaf = z.detach().requires_grad_()
    weights = [tensor.requires_grad_() for tensor in decoder.values()]
    error = functional.mse_loss(reconstruct(leaf, decoder, tuple(x.shape[1:])), x)  # R_i
    gradient, *of_decoder = torch.autograd.grad(error, [leaf, *weights])
    stable_rate = min(rate, highest_stable_rate(leaf, x))
    with torch.no_grad():
        for weight, slope in zip(weights, of_decoder, strict=True):
            weight -= stable_rate * slope
    return gradient


METHOD = Method(
    "parallel split learning, features mixed at the server, inputs decoded (WWW 2022)", LocFedMixProgram, work
)
