"""The cells of a comparison: one run for each data set, level, method and seed, with a folder of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.packed_cifar10 import readable_dataset
from benchmarks.presets import Preset, overlay
from mergesfl.config import RunConfig, apply_settings, config_values, load_config, parse_config
from mergesfl.errors import ConfigError, unknown_name
from mergesfl.methods import SUMMARIES

WITHOUT = "-without-"  # mergesfl-without-merging: the method mergesfl with its switch `merging` off
VARIANT = "@"  # mergesfl@int8: the method mergesfl with the settings of the preset's [variants.int8]
OWN_KEYS = ("name", "seed", "method.name", "output.folder")  # what a cell is: not to be --set, nor by a variant


@dataclass(frozen=True, eq=False)  # a configuration may hold tables, which have no hash
class Cell:
    """One run of a comparison.

    Attributes:
        dataset: as the tables show it.
        level: p of level(p); None: the partition of the configuration.
        method: a name of METHODS, perhaps with "-without-SWITCH", then perhaps with "@VARIANT" of the preset.
        seed: of the run: it draws partition, initial weights, batches and devices, alike for all methods.
        config: the effective configuration, with the folder it writes to.
    """

    dataset: str
    level: float | None
    method: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Also the name of its run folder."""
        return self.config.name

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.config.run_folder

    @property
    def pair(self) -> str:
        """The data set and the level, whose methods are compared with each other: the name of their tables."""
        return pair_name(self.dataset, self.level)

    def is_done(self) -> bool:
        """Whether its folder holds a whole run of this very configuration; where it writes to does not matter."""
        return self.lack() is None

    def lack(self) -> str | None:
        """Why the cell is not done; None when it is."""
        path = self.folder / "summary.json"
        try:
            saved = load_config(self.folder / "config.json")
            num_rounds = json.loads(path.read_text(encoding="utf-8"))["num_rounds"]
        except ConfigError as error:  # also of a run that newer code has made, with settings that this process lacks
            return f"its configuration cannot be read by this process, start again if the code has changed: {error}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{path} tells no num_rounds: {error!r}"
        if num_rounds != self.config.training.num_rounds:
            return f"{path} tells of {num_rounds} of {self.config.training.num_rounds} rounds"
        return None if _computed(saved) == _computed(self.config) else f"{self.folder} has another configuration"


def pair_name(dataset: str, level: float | None) -> str:
    """E.g. "har-level10"; without a level the data set alone."""
    return dataset if level is None else f"{dataset}-level{level:g}"


def _computed(config: RunConfig) -> str:
    """The part of a configuration that the result depends on, in order: that of a fleet counts."""
    return json.dumps({key: value for key, value in config_values(config).items() if key != "output"})


@dataclass(frozen=True)
class Choice:
    """Which part of a preset to run, in the order of the tables. levels (): the configuration's own partition."""

    datasets: tuple[str, ...]
    levels: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for what in ("datasets", "levels", "methods", "seeds"):
            values = getattr(self, what)
            if len(set(values)) != len(values):
                raise ConfigError(f"{what} {values} name one twice: name each once")


def cells_of(preset: Preset, choice: Choice, out: Path, data: Path, settings: Sequence[str] = ()) -> list[Cell]:
    """All cells of a comparison, each checked; of a data set and level the first seed of all methods comes first.

    Args:
        preset: the numbers.
        choice: which of them.
        out: the comparison's folder; runs go to out/cells.
        data: the folder of data sets, {data} of the preset.
        settings: `section.key=value` for all cells, above the preset's.

    Raises ConfigError for an unknown method or data set, a wrong value, or a setting that belongs to the cells.
    """
    owned = {*OWN_KEYS, *(("data.partition",) if choice.levels else ())}
    owned |= {"data.dataset"} if preset.datasets else set()
    for setting in settings:
        if setting.partition("=")[0].strip() in owned:
            raise ConfigError(f"--set '{setting}': each run of a comparison has its own; choose with --methods etc.")
    cells = []
    levels: tuple[float | None, ...] = choice.levels or (None,)
    for text in choice.datasets:
        values = apply_settings(preset.values_for(text), settings)
        described = parse_config(values, str(preset.path)).data.dataset
        dataset = text.partition(":")[0] or described.partition(":")[0]
        readable = readable_dataset(described.replace("{data}", str(data)), out / "archives")
        values = overlay(values, {"data": {"dataset": readable}})
        for level, seed, method in itertools.product(levels, choice.seeds, choice.methods):
            config = _cell_config(preset, values, dataset, level, method, seed, out)
            cells.append(Cell(dataset, level, method, seed, config))
    return cells


def _check_variant(preset: Preset, variant: str, changes: Mapping[str, Any]) -> None:
    """Variants are of a method: data and seed are what methods are compared on. Raises ConfigError."""
    for key in (*OWN_KEYS, "data"):
        table: Any = changes
        *sections, last = key.split(".")
        for section in sections:
            table = table.get(section, {}) if isinstance(table, Mapping) else {}
        if isinstance(table, Mapping) and last in table:
            raise ConfigError(f"{preset.path}, [variants.{variant}] sets {key}: each run has its own, take it out")


def _cell_config(
    preset: Preset, values: dict[str, Any], dataset: str, level: float | None, method: str, seed: int, out: Path
) -> RunConfig:
    plain, *variants = method.split(VARIANT)
    base, *switches_off = plain.split(WITHOUT)
    if base not in SUMMARIES:
        raise unknown_name("method", base, SUMMARIES)
    for variant in variants:
        changes = preset.variant(variant)
        _check_variant(preset, variant, changes)
        values = overlay(values, changes)
    own: dict[str, Any] = {
        "name": f"{pair_name(dataset, level)}-{method}-seed{seed}",
        "seed": seed,
        "method": {"name": base, **dict.fromkeys(switches_off, False)},
        "output": {"folder": str(out / "cells")},
    }
    if level is not None:
        own["data"] = {"partition": f"level({level:g})"}
    return parse_config(overlay(values, own), f"{preset.path}, {dataset}, {method}")
