"""The central reference: one network, one process, all data; recorded and saved like a run over a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergesfl.data.sampling import Batches
from mergesfl.methods.base import copy_state
from mergesfl.methods.central import train_round
from mergesfl.runtime.journal import RoundRecord
from mergesfl.seeding import generator_for, seed_for
from mergesfl.training.evaluation import Evaluation
from ps.run import Scene, method_settings
from ps.switchboard import InterruptedRunError

CENTRAL_WORKER_ID = "worker-00"  # the central run draws the batches that a single worker of this name would draw


def train_centrally(scene: Scene, resume: bool, check: Callable[[], None]) -> dict[str, Any]:
    """Trains all rounds; returns the summary.

    Raises InterruptedRunError with the last closed round saved.
    """
    config, dataset, clock, recorder = scene.config, scene.dataset, scene.clock, scene.recorder
    settings, training = method_settings(config, dataset.sample_shape), config.training
    begin_seconds, next_round = clock.now_seconds(), 0
    checkpoint = recorder.load() if resume else None
    if checkpoint is not None:
        scene.network.load_joined_state_dict(checkpoint.tensors)
        recorder.wall_seconds_before = float(checkpoint.state["wall_seconds"])
        next_round = checkpoint.round_num
    recorder.open(next_round)
    scene.progress.started(next_round, training.num_rounds)
    batch_size = min(training.batch_size * settings.participants_per_round, len(dataset.train.y))

    def save(next_round: int) -> None:
        wall_seconds = recorder.wall_seconds_before + clock.now_seconds() - begin_seconds
        recorder.checkpoint(next_round, copy_state(scene.network.joined_state_dict()), {"wall_seconds": wall_seconds})

    for round_num in range(next_round, training.num_rounds):
        try:
            check()
        except InterruptedRunError:
            save(round_num)
            recorder.close()
            raise
        round_begin_seconds = clock.now_seconds()
        generator = generator_for(config.seed, "batches", CENTRAL_WORKER_ID, round_num)
        batches = Batches(dataset.train.x, dataset.train.y, batch_size, generator, dataset.scale, augment=True)
        worker_seed = seed_for(config.seed, "worker", CENTRAL_WORKER_ID, round_num)
        loss_nats, num_samples = train_round(scene.network, settings, round_num, worker_seed, batches, scene.device)
        round_seconds = clock.now_seconds() - round_begin_seconds
        evaluation = scene.evaluate(scene.network) if recorder.is_evaluation_due(round_num) else None
        rate = settings.rate_at(round_num)
        recorder.record(_central_record(round_num, evaluation, loss_nats, batch_size, num_samples, round_seconds, rate))
        if recorder.is_checkpoint_due(round_num + 1):
            save(round_num + 1)
    summary = recorder.finish(scene.network, {}, clock.now_seconds() - begin_seconds)
    recorder.close()
    return summary


def _central_record(
    round_num: int,
    evaluation: Evaluation | None,
    loss_nats: float,
    batch_size: int,
    num_samples: int,
    round_seconds: float,
    rate: float,
) -> RoundRecord:
    """A journal line without a network: nothing was sent, nobody waited."""
    return RoundRecord(
        round_num=round_num,
        accuracy=evaluation.accuracy if evaluation else None,
        loss_nats=evaluation.loss_nats if evaluation else None,
        train_loss_nats=loss_nats,
        worker_ids=("central",),
        batch_sizes=(batch_size,),
        finished_worker_ids=("central",),
        dropped=(),
        kl_before_nats=0.0,
        kl_after_nats=0.0,
        merged_kl_nats=0.0,
        predicted_seconds=(None,),
        observed_seconds=(round_seconds,),
        predicted_idle_seconds=0.0,
        idle_seconds=0.0,
        ingress_bytes=0,
        egress_bytes=0,
        samples_trained=num_samples,
        planning_seconds=0.0,
        round_seconds=round_seconds,
        evaluation_seconds=0.0,
        learning_rate=rate,
    )
