"""LocFedMix-SL against a reference in plain torch, and over memory.

Legend: d_i samples of worker i in one step, n_i of its data set, F... shape of a sample at the cut.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mergesfl.errors import CheckpointError
from mergesfl.methods.base import copy_state
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.decoder import BIAS, WEIGHT, initial_decoder
from tests.memory_cluster import MEASURED, checkpoint_of, journal_of, play_daemons, same_tensors, small_config, without
from tests.pretend_cluster import (
    PretendCluster,
    assert_close,
    assert_equal,
    descend,
    differs,
    plan_of,
    settings_of,
    small_cluster,
    small_network,
)

torch.set_num_threads(1)

NUM_SAMPLES = {"a": 9, "b": 30, "c": 14}  # n_i: the weights of the averages
SIZES = {"a": 4, "b": 2, "c": 6}  # d_i, in other proportions
SEED = 7  # of settings_of()


def start(**changes: int | float | str | bool) -> PretendCluster:
    return small_cluster("locfedmix-sl", settings_of(**changes), NUM_SAMPLES)


def decoded(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(d, 3, 2, 2) -> (d, 1, 4, 4): patches of 2 x 2, each place with its own bias."""
    return functional.conv_transpose2d(z, weight, stride=2) + bias.repeat(1, 2, 2)


class Reference:
    """The small network, one round after the other, in float64."""

    def __init__(self) -> None:
        self.net = small_network()
        generator = generator_for(SEED, "decoder")
        initial = initial_decoder((3, 2, 2), (1, 4, 4), torch.float64, generator)
        self.decoder = [initial[WEIGHT], initial[BIAS]]  # (3, 1, 2, 2), (1, 2, 2)

    def play(self, cluster: PretendCluster, num_steps: int, round_num: int) -> float:
        """One round with the batches of the cluster; returns the mean loss without the mix-ups."""
        rate = 0.3 * 0.9**round_num
        plan = plan_of(SIZES, num_steps, round_num)
        batches = cluster.batches_of(plan)
        top = self.net[1]
        bottoms = [copy.deepcopy(self.net[0]) for _ in SIZES]
        decoders = [[tensor.clone() for tensor in self.decoder] for _ in SIZES]
        sizes, losses_nats = list(SIZES.values()), []
        for step in range(num_steps):
            xs, ys = zip(*(batches[i][step] for i in range(3)), strict=True)
            zs = [bottom(x) for bottom, x in zip(bottoms, xs, strict=True)]
            losses = [functional.cross_entropy(top(z), y) for z, y in zip(zs, ys, strict=True)]
            shift = int(generator_for(seed_for(SEED, "top", round_num, step), "mix").integers(1, 3))
            total = sum(d / 12 * loss for d, loss in zip(sizes, losses, strict=True))  # D = 12
            losses_nats.append(float(total.detach()))
            partners = [(i + shift) % 3 for i in range(3)]
            ms = [min(sizes[i], sizes[j]) for i, j in enumerate(partners)]
            for i, (j, m) in enumerate(zip(partners, ms, strict=True)):
                soft = (functional.one_hot(ys[i][:m], 3) + functional.one_hot(ys[j][:m], 3)).double() / 2  # (m, C)
                mixed = (zs[i][:m].detach() + zs[j][:m].detach()) / 2  # (m, F...)
                total = total + m / sum(ms) * functional.cross_entropy(top(mixed), soft)
            of_top = torch.autograd.grad(total, list(top.parameters()), retain_graph=True)
            for i in range(3):
                for tensor in decoders[i]:
                    tensor.requires_grad_()
                error = functional.mse_loss(decoded(zs[i], *decoders[i]), xs[i])
                parameters = list(bottoms[i].parameters())
                of_bottom = torch.autograd.grad(losses[i] + error, parameters, retain_graph=True)
                of_decoder = torch.autograd.grad(error, decoders[i], retain_graph=True)
                descend(parameters, of_bottom, rate)
                decoders[i] = [(t - rate * slope).detach() for t, slope in zip(decoders[i], of_decoder, strict=True)]
            descend(list(top.parameters()), of_top, rate)
        shares = [n / 53 for n in NUM_SAMPLES.values()]  # 9 + 30 + 14
        self.decoder = [sum(p * d[k] for p, d in zip(shares, decoders, strict=True)) for k in range(2)]  # type: ignore[misc]
        mean = {
            key: sum(p * bottom.state_dict()[key] for p, bottom in zip(shares, bottoms, strict=True))
            for key in self.net[0].state_dict()
        }
        self.net[0].load_state_dict(mean)
        return sum(losses_nats) / num_steps


def test_two_rounds_equal_a_reference_in_plain_torch() -> None:
    """Features of tanh are at most 1: 4 positions, |z|^2 <= 3, hence a safe rate of at least
    16 d / (2 d 4 (3 + 1)) = 1/2, above the rate of 0.3: the decoder's rate is the bottom's here."""
    cluster, reference = start(), Reference()
    for round_num in range(2):
        expected_nats = reference.play(cluster, 3, round_num)
        assert cluster.play(plan_of(SIZES, 3, round_num)) == pytest.approx(expected_nats, abs=1e-12)
        assert_close(cluster.parameters(), reference.net.state_dict())
        state = cluster.program.state_dict()
        assert torch.allclose(state[WEIGHT], reference.decoder[0], rtol=0, atol=1e-12)
        assert torch.allclose(state[BIAS], reference.decoder[1], rtol=0, atol=1e-12)


def test_a_lone_worker_is_mixed_with_nobody() -> None:
    """The top then trains as in plain split learning."""
    lone, plain = start(), small_cluster("splitfed-v1", settings_of(), NUM_SAMPLES)
    assert lone.play(plan_of({"b": 5}, 1)) == pytest.approx(plain.play(plan_of({"b": 5}, 1)), abs=1e-12)
    tops = [{k: v for k, v in c.parameters().items() if k.startswith("1.")} for c in (lone, plain)]
    assert_close(tops[0], tops[1])
    assert differs(lone.parameters(), plain.parameters(), "0.")  # the regulariser is there all the same


def test_a_dropped_worker_is_left_out_of_both_averages() -> None:
    """With b gone after its first step, the averages are those of a and c as they came back."""
    cluster = start()
    cluster.play(plan_of(SIZES, 3), {"b": 1})
    states = [update.state for update in cluster.updates]
    state = cluster.program.state_dict()
    assert [update.worker_id for update in cluster.updates] == ["a", "c"]
    for name in (WEIGHT, BIAS, *cluster.program.network.bottom.state_dict()):
        expected = (9 * states[0][name] + 14 * states[1][name]) / 23
        assert torch.allclose(state[name], expected, rtol=0, atol=1e-12), name


def test_the_mixed_partner_is_another_worker_and_changes() -> None:
    """The documented stream ("top", round, step), ("mix"): both shifts occur, and never 0."""
    shifts = {int(generator_for(seed_for(SEED, "top", h, k), "mix").integers(1, 3)) for h in range(3) for k in range(4)}
    assert shifts == {1, 2}


def test_a_state_without_a_decoder_is_refused_and_nothing_is_loaded() -> None:
    cluster = start()
    kept = copy_state(cluster.program.state_dict())
    with pytest.raises(CheckpointError, match=r"expected \['decoder/bias', 'decoder/weight'\]: load a state of method"):
        cluster.program.load_state_dict(small_cluster("fedavg", settings_of(), NUM_SAMPLES).program.state_dict())
    assert_equal(cluster.program.state_dict(), kept)


SHARES = [np.arange(0, 24), np.arange(24, 44), np.arange(44, 60)]


def test_two_rounds_over_memory_repeat_to_the_bit(tmp_path: Path) -> None:
    """Real daemons: the decoder crosses the wire both ways and lies in the checkpoint."""
    configs = [
        small_config(tmp_path, f"name={name}", "method.name=locfedmix-sl", "training.num_rounds=2")
        for name in ("first", "again")
    ]
    for config in configs:
        play_daemons(config, SHARES)
    first, again = (checkpoint_of(config) for config in configs)
    assert same_tensors(first, again)
    assert first.tensors[WEIGHT].shape == (32, 1, 4, 4)  # features (32, 2, 2) of samples (1, 8, 8)
    assert float(first.tensors[BIAS].abs().max()) > 0
    lines = [without(journal_of(config), *MEASURED) for config in configs]
    assert lines[0] == lines[1]
    assert [line["samples_trained"] for line in lines[0]] == [48, 48]
