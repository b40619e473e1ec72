"""What a run leaves behind in its folder, written as it goes: so that nothing is lost when the process dies."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergesfl.config import RunConfig, config_values
from mergesfl.control.divergence import kl_nats, label_distributions, mean_distribution
from mergesfl.data.dataset import Dataset
from mergesfl.errors import CheckpointError, ConfigError
from mergesfl.runtime.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mergesfl.runtime.files import write_atomic
from mergesfl.runtime.journal import Journal, RoundRecord, read_journal, summarise, write_summary
from mergesfl.training.split import SplitModel
from ps.export import export_model
from ps.plots import plot_accuracy, plot_batch_sizes, plot_partition
from ps.progress import Progress
from ps.tensorboard import TensorBoardWriter, open_tensorboard

# What may differ between a run and its continuation: how long, where, and how it is watched; not what is computed.
RESUMABLE_CHANGES = {
    *("name", "output", "data.download", "data.partition_file"),
    *("training.num_rounds", "training.evaluate_every_rounds", "training.evaluation_batch_size"),
    *("cluster.transport", "cluster.device", "cluster.worker_device", "cluster.ps_threads", "cluster.worker_threads"),
    *("cluster.start_deadline_seconds", "cluster.step_deadline_seconds", "cluster.quorum_fraction"),
    *("cluster.max_void_rounds", "cluster.slowdowns", "control.survey_deadline_seconds"),
}
OWN_NAMES = (
    *("config.json", "journal.jsonl", "summary.json", "cluster.json", "partition.npz", "partition.json"),
    *("partition.png", "accuracy.png", "batch_sizes.png", "checkpoints", "tensorboard", "model", "workers"),
)

log = logging.getLogger("ps")


def check_folder(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Whether the run may use its folder; changes nothing.

    Raises ConfigError when it already holds a run (say `--resume` or `--overwrite`), CheckpointError when there is
    nothing to resume or the configuration differs in what is computed.
    """
    folder = config.run_folder
    saved, journal = folder / "config.json", folder / "journal.jsonl"
    if resume:
        if not saved.exists():
            raise CheckpointError(f"nothing to resume in {folder}: expected config.json there; start without --resume")
        _check_same(_read_saved(saved), config_values(config), config_values(RunConfig()), folder)
        return
    if saved.exists() and not _is_ours(saved):
        raise ConfigError(
            f"{folder} holds a config.json that is not of a run: choose another name with --set name=NAME"
        )
    if journal.exists() and journal.stat().st_size and not overwrite:
        raise ConfigError(
            f"{folder} already holds a run: continue it with --resume, replace it with --overwrite, "
            "or choose another name with --set name=NAME"
        )


def prepare_folder(config: RunConfig, resume: bool) -> Path:
    """Makes the run's folder and writes its configuration there; what an earlier run left goes, unless it is resumed.

    Called when everything else has been found in order, so that a wrong setting costs nobody an earlier run. Nothing is
    removed but what runs write.
    """
    folder = config.run_folder
    for name in () if resume else OWN_NAMES:
        old = folder / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(config_values(config), indent=2).encode())
    return folder


def _is_ours(path: Path) -> bool:
    """Whether a config.json was written by a run (of any version)."""
    with contextlib.suppress(CheckpointError):
        return {"method", "training", "cluster"} <= _read_saved(path).keys()
    return False


def _read_saved(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): restore it from a copy, or start without --resume"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged (expected an object): restore it from a copy")
    return values


def _check_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path, prefix: str = ""
) -> None:
    """What an older version has not saved was its default."""
    for key, value in now.items():
        name, default = prefix + key, defaults.get(key)
        before = saved.get(key, default)
        if name in RESUMABLE_CHANGES:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            _check_same(before, value, default if isinstance(default, Mapping) else {}, folder, name + ".")
        elif name == "data.dataset" and str(before).partition(":")[0] == str(value).partition(":")[0]:
            continue  # the same data in another place
        elif before != value:
            raise CheckpointError(
                f"cannot resume {folder}: {name} was {before!r} and is {value!r} now; set it back, "
                "or start a new run under another name"
            )


class Recorder:
    """Journal, TensorBoard, checkpoints, progress; at the end summary, pictures and the exported model."""

    def __init__(self, config: RunConfig, dataset: Dataset, partition: str, progress: Progress) -> None:
        self._config = config
        self._folder = config.run_folder
        self._dataset = dataset
        self._partition = partition
        self._progress = progress
        self._tensorboard: TensorBoardWriter | None = None
        self._journal: Journal | None = None
        self.wall_seconds_before = 0.0  # of the parts of this run before a resume

    def load(self) -> Checkpoint | None:
        """The newest intact checkpoint; None when the run died before the first one (it then starts anew)."""
        try:
            checkpoint = load_checkpoint(self._folder / "checkpoints")
        except CheckpointError:
            if any((self._folder / "checkpoints").glob("checkpoint-*.json")):
                raise
            log.warning("%s has no checkpoint yet: starting from round 0", self._folder)
            return None
        if checkpoint.warning:
            log.warning("%s", checkpoint.warning)
        return checkpoint

    def open(self, first_round: int) -> None:
        """Opens the journal; lines of rounds that will be run again are cut off."""
        self._journal = Journal(self._folder / "journal.jsonl", first_round)
        if self._config.output.tensorboard:
            self._tensorboard = open_tensorboard(self._folder / "tensorboard", first_round)

    def record(self, record: RoundRecord) -> None:
        """One round is closed."""
        assert self._journal is not None, "open() comes first"
        self._journal.append(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        self._progress.round_closed(record)

    def checkpoint(self, next_round: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Everything that the rounds from next_round on depend on."""
        save_checkpoint(self._folder / "checkpoints", next_round, tensors, state)

    def is_evaluation_due(self, round_num: int) -> bool:
        """In every k-th round, and in the last."""
        training = self._config.training
        return (round_num + 1) % training.evaluate_every_rounds == 0 or round_num + 1 == training.num_rounds

    def is_checkpoint_due(self, next_round: int) -> bool:
        """After every k rounds, and after the last."""
        every = self._config.output.checkpoint_every_rounds
        return next_round % every == 0 or next_round == self._config.training.num_rounds

    def finish(
        self, network: SplitModel, label_counts: Mapping[str, tuple[int, ...]], wall_seconds: float
    ) -> dict[str, Any]:
        """Writes summary, pictures and model; returns the summary.

        label_counts: (C,) of every worker ever seen, chosen or not; empty for a run without workers.
        """
        config, folder = self._config, self._folder
        records = read_journal(folder / "journal.jsonl")
        values = {
            "method": method_label(config),
            "dataset": self._dataset.name,
            "partition": self._partition,
            "num_workers": config.cluster.num_workers,
            "num_rounds": config.training.num_rounds,
            "seed": config.seed,
        }
        summary = summarise(values, records, self.wall_seconds_before + wall_seconds)
        write_summary(folder / "summary.json", summary)
        title = (
            f"{values['method']} on {values['dataset']}, {values['partition']}, {config.cluster.num_workers} workers"
        )
        if config.output.plots:
            plot_accuracy(folder / "accuracy.png", records, title)
            plot_batch_sizes(folder / "batch_sizes.png", records, sorted(label_counts) or ["central"], title)
            if label_counts and not (folder / "partition.png").exists():  # every worker brought data of its own
                self._plot_local_data(label_counts)
        if config.output.export:
            scale = self._dataset.scale
            facts = {"divisor": scale.divisor, "mean": scale.mean, "std": scale.std}
            metadata = {
                "method": str(values["method"]),
                "dataset": self._dataset.name,
                "cut": network.cut,
                "scale": json.dumps(facts),  # input = (stored / divisor - mean) / std, per channel
            }
            export_model(
                folder / "model", network.to("cpu"), self._dataset.sample_shape, self._dataset.class_names, metadata
            )
        return summary

    def _plot_local_data(self, label_counts: Mapping[str, tuple[int, ...]]) -> None:
        """partition.png from what the workers said of themselves."""
        counts = np.array([label_counts[name] for name in sorted(label_counts)])  # (N, C)
        distributions = label_distributions(counts)  # (N, C)
        held = distributions[counts.sum(axis=1) > 0]
        kls_nats = [kl_nats(row, mean_distribution(distributions)) for row in held]
        mean_kl_nats = sum(kls_nats) / len(kls_nats) if kls_nats else 0.0
        title = f"{self._dataset.name}, {self._partition}"
        plot_partition(self._folder / "partition.png", counts, self._dataset.class_names, title, mean_kl_nats)

    def close(self) -> None:
        """Closes the files."""
        if self._journal is not None:
            self._journal.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def method_label(config: RunConfig) -> str:
    """The method with its ablation, as tables show it."""
    method = config.method
    off = [name for name in ("merging", "regulation") if not getattr(method, name)]
    return method.name if method.name != "mergesfl" or not off else f"{method.name} without {' and '.join(off)}"
