"""Presets and cells: the effective configuration of every run, and when a run counts as done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import Cell, Choice, cells_of
from benchmarks.presets import load_preset
from mergesfl.config import config_values
from mergesfl.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks" / "configs"
PRESET = """
[benchmark]
command = "simulate"
levels = [10]
methods = ["mergesfl", "fedavg"]
[training]
num_rounds = 4
batch_size = 16
[datasets.small]
data.dataset = "digits"
[datasets.large]
data.dataset = "npz:{data}/large.npz"
training.num_rounds = 9
"""


VARIANTS = f"""{PRESET}
[variants.small]
training.batch_size = 2
codec.features = "int8"
[variants.fast]
training.learning_rate = 0.2
codec.features = "fp16"
[variants.wrong]
training.batch_size = 0
[variants.seeded]
seed = 3
[variants.other]
method.name = "fedavg"
[variants.data]
data.partition = "iid"
"""


def make_cells(
    folder: Path,
    settings: Sequence[str] = (),
    datasets: tuple[str, ...] = ("small",),
    levels: tuple[float, ...] = (10.0,),
    methods: tuple[str, ...] = ("mergesfl",),
    seeds: tuple[int, ...] = (0,),
    text: str = PRESET,
) -> list[Cell]:
    """The cells of a preset with this text, which write below the folder."""
    path = folder / "preset.toml"
    path.write_text(text)
    choice = Choice(datasets, levels, methods, seeds)
    return cells_of(load_preset(path), choice, folder / "out", Path("/data"), settings)


def leave_run(cell: Cell, **changes: Any) -> None:
    """What a whole run leaves in its folder, as far as it matters here."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "config.json").write_text(json.dumps(config_values(cell.config)))
    summary = {"num_rounds": cell.config.training.num_rounds} | changes
    (cell.folder / "summary.json").write_text(json.dumps(summary))


def test_a_cell_is_the_preset_with_its_data_set_level_method_and_seed(tmp_path: Path) -> None:
    cells = make_cells(
        tmp_path,
        ["training.batch_size=8"],
        datasets=("small", "large"),
        levels=(0.0, 2.5),
        methods=("fedavg", "mergesfl-without-merging"),
        seeds=(3, 4),
    )
    assert len(cells) == 16
    assert [cell.name for cell in cells[:4]] == [
        *("small-level0-fedavg-seed3", "small-level0-mergesfl-without-merging-seed3"),
        *("small-level0-fedavg-seed4", "small-level0-mergesfl-without-merging-seed4"),
    ]
    last = cells[-1]
    assert (last.pair, last.folder) == ("large-level2.5", tmp_path / "out" / "cells" / last.name)
    config = last.config
    assert (config.data.dataset, config.data.partition) == ("npz:/data/large.npz", "level(2.5)")
    assert (config.training.num_rounds, config.training.batch_size) == (9, 8)  # of the data set; of --set
    assert (config.method.name, config.method.merging, config.method.regulation) == ("mergesfl", False, True)
    assert (config.seed, cells[0].config.training.num_rounds) == (4, 4)


def test_a_variant_is_a_method_with_settings_of_its_own_above_those_of_all(tmp_path: Path) -> None:
    methods = ("mergesfl", "mergesfl@small", "mergesfl-without-merging@small@fast")
    cells = make_cells(tmp_path, ["training.batch_size=8"], methods=methods, text=VARIANTS)
    assert [cell.method for cell in cells] == [*methods]
    assert cells[1].name == "small-level10-mergesfl@small-seed0"
    assert [cell.config.training.batch_size for cell in cells] == [8, 2, 2]
    assert [cell.config.training.learning_rate for cell in cells] == [0.1, 0.1, 0.2]
    assert [cell.config.codec.features for cell in cells] == ["fp32", "int8", "fp16"]
    assert [cell.config.method.merging for cell in cells] == [True, True, False]
    assert len({cell.folder for cell in cells}) == 3


def test_a_plain_run_configuration_is_a_preset_of_one_data_set(tmp_path: Path) -> None:
    text = "[data]\npartition = 'shards(2)'\n[training]\nnum_rounds = 2\n"
    (cell,) = make_cells(tmp_path, datasets=("",), levels=(), text=text)
    assert (cell.name, cell.level, cell.config.data.partition) == ("digits-mergesfl-seed0", None, "shards(2)")
    (cell,) = make_cells(tmp_path, datasets=("har:/x/y.npz",), levels=(), text=text)
    assert (cell.dataset, cell.config.data.dataset) == ("har", "har:/x/y.npz")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"datasets": ("smal",)}, "did you mean 'small'"),
        ({"methods": ("mergesflx",)}, "did you mean 'mergesfl'"),
        ({"methods": ("mergesfl-without-mergin",)}, "did you mean 'merging'"),
        ({"methods": ("fedavg", "fedavg")}, "twice"),
        ({"settings": ["seed=3"]}, "has its own"),
        ({"settings": ["data.partition=iid"]}, "has its own"),
        ({"settings": ["training.batch_size=0"]}, "greater than or equal to 1"),
        ({"methods": ("mergesfl@int8",)}, r"has no \[variants.int8\]"),
        ({"methods": ("mergesfl@smal",), "text": VARIANTS}, "did you mean 'small'"),
        ({"methods": ("mergesfl@wrong",), "text": VARIANTS}, "greater than or equal to 1"),
        ({"methods": ("mergesfl@seeded",), "text": VARIANTS}, r"\[variants.seeded\] sets seed: each run has its own"),
        ({"methods": ("mergesfl@other",), "text": VARIANTS}, "sets method.name"),
        ({"methods": ("mergesfl@data",), "text": VARIANTS}, "sets data"),
        ({"text": "variants = [1]"}, "expected tables"),
        ({"text": PRESET.replace("levels", "level")}, "did you mean 'levels'"),
        ({"text": PRESET.replace("num_rounds = 4", "rounds = 4")}, "unknown key 'training.rounds'"),
        ({"text": "datasets = 3"}, "expected tables"),
        ({"text": "="}, "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_cells(tmp_path, **changes)


def test_the_partition_may_be_set_where_there_are_no_levels(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path, ["data.partition=iid"], levels=())
    assert (cell.config.data.partition, cell.pair) == ("iid", "small")


def test_a_run_is_done_when_it_is_whole_and_of_the_same_configuration(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path)
    assert not cell.is_done()
    leave_run(cell)
    assert cell.is_done()
    (changed,) = make_cells(tmp_path, ["training.batch_size=17"])
    assert changed.folder == cell.folder and not changed.is_done()
    (moved,) = make_cells(tmp_path, ["output.plots=false"])  # what is left behind changes no figure
    assert moved.is_done()


def test_a_run_that_is_not_whole_is_not_done(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path)
    leave_run(cell, num_rounds=3)  # of 4
    assert not cell.is_done()
    for text in ("", "[]", "{}"):
        leave_run(cell)
        (cell.folder / "summary.json").write_text(text)
        assert not cell.is_done()
    leave_run(cell)
    (cell.folder / "config.json").write_text("{")
    assert not cell.is_done()


def test_a_run_of_newer_code_is_told_apart_from_a_failed_one(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path)
    leave_run(cell)
    values = config_values(cell.config) | {"invented": 1}
    (cell.folder / "config.json").write_text(json.dumps(values))
    lack = cell.lack()
    assert lack is not None and "start again if the code has changed" in lack and "invented" in lack


def test_the_order_of_a_fleet_counts(tmp_path: Path) -> None:
    fleets = ('{"jetson-tx2" = 3, "jetson-orin-nx" = 7}', '{"jetson-orin-nx" = 7, "jetson-tx2" = 3}')
    first, second = (
        make_cells(tmp_path, text=f"{PRESET}\n[simulation]\nfleet = {fleet}\n[cluster]\nnum_workers = 10")[0]
        for fleet in fleets
    )
    leave_run(first)
    assert first.is_done() and not second.is_done()


def test_a_run_of_before_a_setting_existed_stays_done(tmp_path: Path) -> None:
    (cell,) = make_cells(tmp_path)
    leave_run(cell)
    values = json.loads((cell.folder / "config.json").read_text())
    del values["training"]["evaluation_batch_size"]  # then it had what is the default now
    (cell.folder / "config.json").write_text(json.dumps(values))
    assert cell.is_done()


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_the_published_presets_are_legal_as_a_whole(tmp_path: Path, name: str) -> None:
    preset = load_preset(CONFIGS / f"{name}.toml")
    benchmark = preset.benchmark
    choice = Choice(tuple(preset.datasets), benchmark.levels, benchmark.methods, benchmark.seeds)
    cells = cells_of(preset, choice, tmp_path, Path("/nowhere"))
    expected = len(preset.datasets) * len(benchmark.levels) * len(benchmark.methods) * len(benchmark.seeds)
    assert len({cell.folder for cell in cells}) == len(cells) == expected
    assert {cell.config.cluster.num_workers for cell in cells} == {80}
    assert {sum(cell.config.simulation.fleet.values()) for cell in cells} == {80}


def test_the_paper_preset_has_the_numbers_of_the_paper(tmp_path: Path) -> None:
    preset = load_preset(CONFIGS / "paper.toml")
    assert preset.benchmark.levels == (0, 1, 2, 4, 5, 10)
    rounds = {}
    for dataset in preset.datasets:
        (cell,) = cells_of(preset, Choice((dataset,), (10.0,), ("mergesfl",), (0,)), tmp_path, Path("/nowhere"))
        training = cell.config.training
        assert (training.local_steps, training.batch_size, training.learning_rate) == (42, 64, 0.1)
        rounds[dataset] = training.num_rounds
    assert rounds == {"har": 80, "fashion": 250, "cifar10": 250}
