"""Where a network computes, and how its images lie in memory there."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def place(network: Network, device: torch.device) -> Network:
    """Moves the network to the device, in place; on a CPU its 2-d convolutions work with the channels last.

    There torch's pooling is vectorised only that way: forward and backward of the HAR bottom take 0.5 to 0.6 of the
    time, larger networks 0.8 to 1.0 (benchmarks/LOG.md). Values and shapes stay, the last bits of a result need not:
    whatever trains or evaluates must be placed. On a GPU the usual order stays [ours: not measured there].
    """
    order = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:  # (out, in, height, width); there is no such order of others
            tensor.data = tensor.data.contiguous(memory_format=order)
    return network
