"""Both ends of the start of a run on several ranks, and the whole of a follower.

Legend: d_r rows of the merged batch on this rank (may be none), F... shape of one sample at the cut, C classes,
P parameters of the top.
"""

from __future__ import annotations

import signal

import torch

from mergesfl import __version__
from mergesfl.config import RunConfig
from mergesfl.errors import ConfigError
from mergesfl.methods import METHODS
from mergesfl.models import build_model
from mergesfl.runtime.devices import set_threads
from mergesfl.training.placement import place
from mergesfl.training.split import Half
from ps.ranks import END, FORWARD, Ranks, threads_of
from ps.run import Scene
from ps.shards import DTYPES, Shard, ShardedTop, require_shardable, rows_of


def require_merging(config: RunConfig) -> None:
    """Raises ConfigError when the method has no merged batch that several ranks could share, or keeps several open."""
    if config.training.merge == "streaming-in-order":
        raise ConfigError(
            "training.merge = 'streaming-in-order' keeps the top's graph of every worker, a rank that of its newest "
            "forward only: set training.merge = 'streaming' or 'barrier', or start the parameter server with one rank"
        )
    method = METHODS.get(config.method.name)
    if method is not None and method.merges and config.method.merging:
        return
    name = config.method.name if method is None or not method.merges else f"{config.method.name} without merging"
    raise ConfigError(
        f"method '{name}' has no merged batch that several ranks could share: start it without torchrun, or choose "
        f"one of {', '.join(name for name, method in METHODS.items() if method.merges)}"
    )


def lead(ranks: Ranks, scene: Scene) -> None:
    """Rank 0: from now on the top of the run trains on all ranks.

    Raises ConfigError when it cannot, TransportError when a rank is lost.
    """
    config, dataset, network = scene.config, scene.dataset, scene.network
    require_shardable(network.top)
    ranks.describe(
        {
            "version": __version__,
            "model": config.model.name,
            "cut": network.cut,
            "sample_shape": dataset.sample_shape,
            "num_classes": dataset.num_classes,
            "device": scene.device.type,
            "num_threads": config.cluster.ps_threads,
        }
    )
    ranks.open(scene.device.type)
    ShardedTop(ranks, network.top)


def follow_run() -> None:
    """Another rank, from its start to its end; silent unless something goes wrong.

    Signals are for rank 0, which finishes its step and then ends the others: stopped in the middle of one they would
    take it along. Raises ConfigError, TransportError.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Ranks.join() as ranks:
        run = ranks.hear_description()
        if run is None:
            return
        if run["version"] != __version__:
            raise ConfigError(
                f"rank {ranks.rank} has mergesfl {__version__}, rank 0 {run['version']}: install the same on all hosts"
            )
        set_threads(threads_of(run["num_threads"]))
        sample_shape = tuple(run["sample_shape"])
        network = build_model(run["model"], run["cut"], sample_shape, run["num_classes"], seed=0)  # weights will come
        device = ranks.open(run["device"])
        follow(ranks, place(network, device).top, network.feature_shape(sample_shape), device)


def follow(ranks: Ranks, top: Half, feature_shape: tuple[int, ...], device: torch.device) -> None:
    """A follower's whole work: does its part of every step, until rank 0 says END.

    Raises TransportError when rank 0 has gone without a word.
    """
    top.train()
    shard = Shard(top)
    while True:
        kind, (num_rows, dtype) = ranks.next_command()
        if kind == END:
            return
        begin, end = rows_of(ranks.rank, ranks.num_ranks, num_rows)
        if kind == FORWARD:
            seeds = ranks.hear_seeds(shard.num_seeds)
            ranks.share(shard.tensors)
            if begin < end:
                z = torch.empty(end - begin, *feature_shape, dtype=DTYPES[dtype], device=device)  # (d_r, F...)
                logits = shard.forward(ranks.receive(z, 0), begin, end, num_rows, seeds)  # (d_r, C)
                ranks.wait([ranks.send(logits, 0)])
        elif begin < end:
            gradient = ranks.receive(torch.empty_like(logits), 0)  # (d_r, C)
            of_z, of_parameters = shard.backward(gradient)  # (d_r, F...), (P,)
            ranks.add_up(of_parameters)
            ranks.wait([ranks.send(of_z, 0)])
        else:
            ranks.add_up(shard.no_gradient())
