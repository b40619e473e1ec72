"""A preset: a run's configuration with three more tables, which say what a comparison runs.

    [benchmark]          command, data sets' levels, methods, seeds, targets: see BenchmarkConfig
    [datasets.NAME]      what differs from the rest of the file for this data set, section by section
    [variants.NAME]      the same for methods written METHOD@NAME, above all else: a codec, a learning rate

Everything else is a run's configuration, so any file that `mergesfl run` takes is a preset of one data set and one
partition. `{data}` in data.dataset stands for the folder of data sets.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mergesfl.config import Section, explain
from mergesfl.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover  (JetPack 6 ships Python 3.10)
    import tomli as tomllib


class BenchmarkConfig(Section):
    """What to compare; each list is a default that the command line may replace."""

    command: Literal["simulate", "run"] = "run"  # the subcommand of mergesfl that runs one cell
    datasets: tuple[str, ...] = ()  # names of [datasets.*]; (): all of them
    levels: tuple[float, ...] = ()  # p of level(p), 0 is IID; (): the partition of the configuration
    methods: tuple[str, ...] = Field(default=("mergesfl",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    targets: Mapping[str, tuple[float, ...]] = Field(default={})  # data set -> accuracies 0..1 to measure the time to


@dataclass(frozen=True)
class Preset:
    """A preset as it was read.

    Attributes:
        path: the file.
        benchmark: its table [benchmark].
        run: the configuration of a run, sections as nested mappings, not yet checked.
        datasets: for each data set what differs from `run`; empty for a plain configuration.
        variants: for each name behind an @ what differs from the cell without it.
    """

    path: Path
    benchmark: BenchmarkConfig
    run: Mapping[str, Any]
    datasets: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]

    def values_for(self, dataset: str) -> dict[str, Any]:
        """The configuration for one data set: a name of [datasets.*], or NAME[:PATH] for a plain configuration.

        Raises ConfigError for a name that the preset does not have.
        """
        if self.datasets:
            if dataset not in self.datasets:
                raise ConfigError(f"{self.path} has no [datasets.{dataset}]: {nearest(dataset, self.datasets)}")
            return overlay(self.run, self.datasets[dataset])
        return overlay(self.run, {"data": {"dataset": dataset}} if dataset else {})

    def variant(self, name: str) -> Mapping[str, Any]:
        """What METHOD@name sets. Raises ConfigError for a name that the preset does not have."""
        if name not in self.variants:
            raise ConfigError(f"{self.path} has no [variants.{name}]: {nearest(name, self.variants)}")
        return self.variants[name]


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A new nested mapping: the values of `above`, and those of `below` that it does not name."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = overlay(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return result


def load_preset(path: Path) -> Preset:
    """Reads a preset or a plain run configuration (TOML). Raises ConfigError naming file, key and what is legal."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the preset {path}: {error.strerror}; see benchmarks/configs") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    datasets, variants = (_tables(path, values, what) for what in ("datasets", "variants"))
    try:
        benchmark = BenchmarkConfig.model_validate(values.pop("benchmark", {}))
    except ValidationError as error:
        raise explain(error, f"{path}, [benchmark]", BenchmarkConfig) from None
    return Preset(path, benchmark, values, datasets, variants)


def _tables(path: Path, values: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """Takes the tables [what.NAME] out of the values."""
    tables = values.pop(what, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{path}: '{what}' is {tables!r}, expected tables [{what}.NAME]")
    return tables
