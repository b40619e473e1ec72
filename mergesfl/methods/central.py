"""Central training: one process, all data, the joint network. The reference that a federated method is held against.

Plain SGD on the mean cross-entropy with the same schedule and the same random streams as the split methods use, so
that one worker with all data and tau = 1 gives the same parameters to the bit (tests/test_methods_central.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mergesfl.methods.base import Batches, MethodSettings
from mergesfl.seeding import seed_for
from mergesfl.training.dropout import seed_dropout
from mergesfl.training.schedule import make_sgd
from mergesfl.training.singles import forward_any
from mergesfl.training.split import SplitModel

SUMMARY = "one process, all data: the reference"


def train_round(
    network: SplitModel,
    settings: MethodSettings,
    round_num: int,
    worker_seed: int,
    batches: Batches,
    device: torch.device,
) -> tuple[float, int]:
    """tau steps of SGD on the joint network; returns the mean loss in nats and the number of samples trained.

    `worker_seed` is the seed of the one virtual worker in this round: it drives dropout below the cut, while dropout
    above the cut follows the server's stream, exactly as when the two halves are trained apart.
    """
    s = settings
    rate = s.rate_at(round_num)
    network.train()
    optimizer = make_sgd(network.parameters(), rate)
    loss_sum_nats, num_samples = 0.0, 0
    for step in range(s.num_steps):
        x, y = (tensor.to(device) for tensor in next(batches))  # (D, *sample), (D,)
        seed_dropout(network.bottom, seed_for(worker_seed, "step", step))
        seed_dropout(network.top, seed_for(s.seed, "top", round_num, step))
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward_any(network, x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum_nats += float(loss.detach()) * len(y)
        num_samples += len(y)
    return loss_sum_nats / num_samples, num_samples
