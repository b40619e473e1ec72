"""The configuration: what is legal, what is refused and how it says so, and that a written one reads back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mergesfl.config import (
    RunConfig,
    Section,
    apply_settings,
    config_values,
    load_config,
    parse_config,
)
from mergesfl.data import DATASETS, parse_partition
from mergesfl.data.request import IMAGE_SIZE_PIXELS
from mergesfl.errors import ConfigError
from mergesfl.methods import find_method
from mergesfl.methods.base import MethodSettings
from mergesfl.models import MODELS
from mergesfl.training import schedule

# Legal, and different from the default everywhere.
UNUSUAL: dict[str, Any] = {
    "name": "har-Dir0.1_s+1",
    "seed": 2**63 - 1,
    "data": {
        "dataset": "har:/data/har",
        "download": True,
        "image_size_pixels": 64,
        "partition": "shards(2)",
        "partition_file": "runs/old/partition.npz",
    },
    "model": {"name": "torchvision:resnet18", "cut": "layer2"},
    "method": {
        "name": "mergesfl+",
        "merging": False,
        "regulation": False,
        "adapt_local_steps": True,
        "top_momentum": 0.9,
        "logit_adjustment": True,
        "proximal": 0.01,
        "model_averaging": 0.5,
    },
    "training": {
        "num_rounds": 60,
        "local_steps": 42,
        "batch_size": 64,
        "learning_rate": 0.05,
        "learning_rate_decay": 1.0,
        "learning_rate_min": 0.001,
        "bottom_learning_rate": "proportional",
        "merge": "streaming",
        "parts_per_step": 3,
        "evaluate_every_rounds": 5,
        "evaluation_batch_size": 512,
    },
    "control": {
        "participants_per_round": 8,
        "ingress_budget_bytes": 10_000_000,
        "max_participants": 7,
        "search": "convex",
        "reference": "data",
        "idle_weight_nats": 0.1,
        "priority_weight_nats": 0.0,
        "time_model": "affine",
        "kl_epsilon_nats": 0.01,
        "estimate_memory": 0.0,
        "survey_every_rounds": 5,
        "survey_deadline_seconds": 2.5,
        "fill_budget": False,
        "allow_above_max": False,
    },
    "codec": {"features": "topk(0.1)", "gradients": "fp8", "weights": "bf16"},
    "cluster": {
        "num_workers": 80,
        "transport": "ipc",
        "device": "cpu",
        "worker_device": "cuda:1",
        "ps_threads": 4,
        "worker_threads": 1,
        "start_deadline_seconds": 5.5,
        "step_deadline_seconds": 2.0,
        "quorum_fraction": 1.0,
        "max_void_rounds": 9,
        "slowdowns": [1.0, 2.5],
        "declared_compute_seconds_per_sample": [0.001],
        "declared_transfer_seconds_per_sample": [0.002, 0.003],
    },
    "simulation": {
        "fleet": {"jetson-tx2": 3, "raspberry-pi-5": 1},
        "ps_flops_per_second": 1e12,
        "ps_link_mbit_per_second": 100.0,
        "availability_trace": "traces/availability.csv",
        "bandwidth_trace": "traces/bandwidth.csv",
    },
    "output": {
        "folder": "elsewhere/runs",
        "checkpoint_every_rounds": 1,
        "tensorboard": False,
        "plots": False,
        "export": False,
    },
}


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, annotation, default) of every value, sections opened."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation, field.default


def value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


ALL_KEYS = [key for key, _, _ in fields_of(RunConfig)]


def toml_of(values: dict[str, Any], prefix: str = "") -> str:
    """A TOML text of nested values; JSON writes numbers, texts, lists and booleans as TOML does."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", toml_of(value, f"{prefix}{key}.")]
    return "\n".join(lines)


# Files


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_file_sets_every_key(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"run.{kind}"
    path.write_text(toml_of(UNUSUAL) if kind == "toml" else json.dumps(UNUSUAL), encoding="utf-8")
    config = load_config(path)
    values = config_values(config)
    assert values == UNUSUAL
    assert sorted(ALL_KEYS) == sorted(key for key, _, _ in fields_of(RunConfig) if value_at(UNUSUAL, key) is not None)
    for key in ALL_KEYS:
        assert value_at(values, key) != value_at(config_values(RunConfig()), key), f"'{key}' is at its default here"
    assert config.run_folder == Path("elsewhere/runs/har-Dir0.1_s+1")
    assert config.cluster.slowdowns == (1.0, 2.5)


@pytest.mark.parametrize("values", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_the_effective_configuration_reads_back(tmp_path: Path, values: dict[str, Any]) -> None:
    """Also through the JSON file that a run leaves behind, with its nulls."""
    config = parse_config(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_values(config)), encoding="utf-8")
    assert load_config(path) == config
    assert parse_config(config_values(config)) == config


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == RunConfig() == parse_config({})
    assert RunConfig().run_folder == Path("runs/run")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.toml: No such file.*\.toml"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.toml", b"seed = = 3"),
        ("broken.json", b'{"seed": '),
        ("latin1.toml", 'name = "caf\xe9"'.encode("latin-1")),
        ("digits.json", b'{"seed": ' + b"9" * 5000 + b"}"),
        ("deep.json", b"[" * 100_000),
        ("noext", b"not toml"),
    ],
)
def test_an_invalid_file_is_named_with_its_format(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is not valid {path.suffix or 'TOML'}: "):
        load_config(path)


def test_a_json_file_must_hold_sections(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"list\.json: expected a table of sections, got list"):
        load_config(path)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nnum_round = 3\n")
    with pytest.raises(
        ConfigError, match=r"mine\.toml:\n.*unknown key 'training\.num_round': did you mean 'num_rounds'"
    ):
        load_config(path)


# Unknown keys and bad values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainning": {}}, "unknown key 'trainning': did you mean 'training'? legal: cluster, codec, control, data"),
        ({"training": {"num_round": 3}}, "unknown key 'training.num_round': did you mean 'num_rounds'?"),
        ({"cluster": {"step_deadline": 3}}, "'cluster.step_deadline': did you mean 'step_deadline_seconds'?"),
        ({"method": {"zzz": 1}}, "unknown key 'method.zzz': legal: adapt_local_steps, "),
        ({"data": {"dataset": {"path": 1}}}, "'data.dataset' = {'path': 1}: Input should be a valid string"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "mine")
    assert message in str(caught.value) and str(caught.value).startswith("mine:\n  ")


BAD_VALUES = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than 9223372036854775808"),
    ("name", "", "at least 1 character"),
    ("name", "../up", "match pattern"),
    ("name", ".hidden", "match pattern"),
    ("name", "line\n", "match pattern"),
    ("name", "a" * 101, "at most 100 characters"),
    ("codec.features", "int9", "unknown codec 'int9': did you mean 'int8'"),
    ("codec.gradients", "fp", "legal: bf16, fp16, fp32, fp8, int8, topk"),
    ("codec.features", 8, "valid string"),
    ("codec.features", "fp16(0.1)", "unknown codec"),
    ("codec.features", "topk", "needs a share of the numbers to keep: topk(0.1)"),
    ("codec.features", "topk(1.5)", "give one above 0 and up to 1"),
    ("codec.weights", "topk(0.1)", "not for weights"),
    ("codec.weights", "fp8", "choose fp32, fp16, bf16, int8"),
    ("training.num_rounds", 0, "greater than or equal to 1"),
    ("training.num_rounds", "60", "valid integer"),
    ("training.num_rounds", True, "valid integer"),
    ("training.num_rounds", 1.5, "valid integer"),
    ("training.num_rounds", float("nan"), "valid integer"),
    ("training.learning_rate", 0.0, "greater than 0"),
    ("training.learning_rate", "0.1", "valid number"),
    ("training.learning_rate", True, "valid number"),
    ("training.learning_rate", float("inf"), "finite number"),
    ("training.learning_rate", float("nan"), "finite number"),
    ("training.learning_rate_decay", 1.01, "less than or equal to 1"),
    ("training.merge", "stream", "'barrier', 'streaming' or 'streaming-in-order'"),
    ("training.parts_per_step", 0, "greater than or equal to 1"),
    ("training.parts_per_step", 9, "less than or equal to 8"),
    ("training.parts_per_step", True, "valid integer"),
    ("training.bottom_learning_rate", "equl", "'equal' or 'proportional'"),
    ("method.merging", "yes", "valid boolean"),
    ("method.regulation", 1, "valid boolean"),
    ("control.estimate_memory", 1.1, "less than or equal to 1"),
    ("control.estimate_memory", float("nan"), "less than or equal to 1"),
    ("control.ingress_budget_bytes", 0, "greater than or equal to 1"),
    ("cluster.transport", "udp", "'tcp', 'ipc' or 'memory'"),
    ("cluster.quorum_fraction", 0.0, "greater than 0"),
    ("control.survey_every_rounds", -1, "greater than or equal to 0"),
    ("control.survey_deadline_seconds", 0.0, "greater than 0"),
    ("cluster.max_void_rounds", 100, "less than or equal to 99"),  # NUMBERS_PER_ROUND of the protocol, less the survey
    ("cluster.slowdowns", [1.0, 0.5], "greater than or equal to 1"),
    ("cluster.slowdowns", 2.0, "valid tuple"),
    ("training", 5, "valid dictionary"),
    ("output.folder", 5, "path"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_bad_values_are_refused_with_key_value_and_limit(key: str, value: Any, message: str) -> None:
    values: Any = value
    for part in reversed(key.split(".")):
        values = {part: values}
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    text = str(caught.value)
    assert f"'{key}" in text and message in text
    assert repr(value[1] if isinstance(value, list) else value) in text


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"seed": -1, "training": {"batch_size": 0, "tau": 3}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(any(key in line for line in lines) for key in ("'seed'", "'training.batch_size'", "'training.tau'"))


def test_a_whole_number_is_a_rate_too() -> None:
    assert parse_config({"training": {"learning_rate": 1}}).training.learning_rate == 1.0


def test_it_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.training.num_rounds = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.data.dataset = "har"


# --set


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("training.num_rounds=60", "training.num_rounds", 60),
        (" training.num_rounds = 60 ", "training.num_rounds", 60),
        ("training.num_rounds=1_000", "training.num_rounds", 1000),
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("training.learning_rate=2", "training.learning_rate", 2.0),
        ("method.merging=false", "method.merging", False),
        ("data.dataset=har:/data/UCI HAR", "data.dataset", "har:/data/UCI HAR"),
        ("data.dataset=npz:a=b.npz", "data.dataset", "npz:a=b.npz"),
        ("data.partition=dirichlet(0.3)", "data.partition", "dirichlet(0.3)"),
        ("model.name=torchvision:resnet18@layer2", "model.name", "torchvision:resnet18@layer2"),
        ('name="007"', "name", "007"),
        ("name='none'", "name", "none"),
        ("name=2024-01-31", "name", "2024-01-31"),  # TOML would make a date of it
        ("name=07", "name", "07"),  # no TOML number
        ("cluster.slowdowns=[1, 2.5]", "cluster.slowdowns", (1.0, 2.5)),
        ("cluster.slowdowns=[]", "cluster.slowdowns", ()),
        ("output.folder=/tmp/a b", "output.folder", Path("/tmp/a b")),
        ("training={num_rounds = 5}", "training.num_rounds", 5),
        ("model.cut=none", "model.cut", None),
        ("control.participants_per_round=null", "control.participants_per_round", None),
    ],
)
def test_a_setting_on_the_command_line(setting: str, key: str, value: Any) -> None:
    config: Any = load_config(None, [setting])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


def test_settings_come_after_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 1\n[training]\nnum_rounds = 2\nbatch_size = 3\n[model]\ncut = "conv1"\n')
    config = load_config(
        path, ["training.num_rounds=5", "training.num_rounds=6", "model.cut=none", "training.batch_size=none"]
    )
    assert (config.seed, config.training.num_rounds, config.training.batch_size) == (1, 6, 32)
    assert config.model.cut is None  # like the batch size, back to the default


@pytest.mark.parametrize("setting", ["training.num_rounds", "", "=3", ".seed=3", "training.=3", "a..b=1"])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value, for example training\.num_rounds=60"):
        load_config(None, [setting])


def test_a_setting_cannot_lead_through_a_value() -> None:
    with pytest.raises(ConfigError, match=r"--set 'seed\.x=3': 'seed' is a value, not a section"):
        load_config(None, ["seed=1", "seed.x=3"])


def test_unknown_and_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'cluster\.worker_thread': did you mean 'worker_threads'"):
        load_config(None, ["cluster.worker_thread=3"])
    with pytest.raises(ConfigError, match=r"'training\.num_rounds' = 'many': Input should be a valid integer"):
        load_config(None, ["training.num_rounds=many"])


def test_apply_settings_leaves_its_input_alone() -> None:
    values = {"training": {"num_rounds": 2}}
    assert apply_settings(values, ["training.num_rounds=3", "seed=4"]) == {"training": {"num_rounds": 3}, "seed": 4}
    assert values == {"training": {"num_rounds": 2}}


# Defaults


def test_a_preset_fills_only_what_the_configuration_leaves_open() -> None:
    plain = parse_config({"method": {"name": "mergesfl"}})
    preset = parse_config({"method": {"name": "mergesfl+"}})
    assert plain.method.model_averaging == 0.0 and plain.control == RunConfig().control
    assert preset.method.model_averaging > 0.0
    own = parse_config({"method": {"name": "mergesfl+", "model_averaging": 0.25}, "control": {"estimate_memory": 0.7}})
    assert (own.method.model_averaging, own.control.estimate_memory) == (0.25, 0.7)
    # what a run has written down says all of it, so another version's preset changes nothing
    assert parse_config(json.loads(json.dumps(config_values(own)))) == own
    assert load_config(None, ["method.name=mergesfl+"]) == preset


def test_a_switch_of_another_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.proximal = 0\.1 is for method\.name = 'mergesfl\+', not 'fedavg'"):
        parse_config({"method": {"name": "fedavg", "proximal": 0.1}})


def test_a_section_that_is_none_is_refused_under_a_preset_too() -> None:
    with pytest.raises(ConfigError, match="control"):
        parse_config({"method": {"name": "mergesfl+"}, "control": 3})


def test_what_is_wrong_with_several_keys_together_is_said_in_one_line_without_their_sections() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.parts_per_step=4", "name=x"])
    assert str(caught.value) == (
        "configuration:\n  training.parts_per_step = 4 is for a server that answers features as they arrive: set "
        "training.merge = 'streaming' or 'streaming-in-order', or training.parts_per_step = 1"
    )


def test_every_section_is_documented() -> None:
    sections = [type(field.default) for field in RunConfig.model_fields.values() if isinstance(field.default, Section)]
    assert len(sections) == 9
    for section in (RunConfig, *sections):
        own = section.__dict__.get("__doc__")
        assert own and own != Section.__doc__, section


def test_defaults_are_those_of_the_paper_and_its_code() -> None:
    """Spec: alpha 0.8 (Eq. 5, 6), epsilon 0.05 (Eq. 14); lr 0.1 x 0.993 per round, not below 0.005."""
    config = RunConfig()
    assert (config.control.estimate_memory, config.control.kl_epsilon_nats) == (0.8, 0.05)
    rates = (config.training.learning_rate, config.training.learning_rate_decay, config.training.learning_rate_min)
    assert rates == (0.1, 0.993, 0.005)
    assert rates == (schedule.INITIAL_LEARNING_RATE, schedule.DECAY_PER_ROUND, schedule.MINIMUM_LEARNING_RATE)
    assert config.method.name == "mergesfl" and config.method.merging and config.method.regulation


def test_default_names_are_in_their_tables() -> None:
    config = RunConfig()
    assert config.data.dataset in DATASETS and DATASETS[config.data.dataset].bundled  # runs without a download
    assert config.model.name in MODELS
    assert find_method(config.method.name)
    assert parse_partition(config.data.partition)
    assert config.data.image_size_pixels == IMAGE_SIZE_PIXELS


def test_the_method_settings_repeat_no_other_default() -> None:
    """Where the records of a method have defaults too, they are the same."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(MethodSettings)
        if field.default is not dataclasses.MISSING
    }
    ours = {key.rpartition(".")[2]: default for key, _, default in fields_of(RunConfig)}
    assert defaults and {name: ours[name] for name in defaults} == defaults


@pytest.mark.parametrize(("key", "annotation", "default"), list(fields_of(RunConfig)), ids=ALL_KEYS)
def test_only_what_may_be_none_defaults_to_none(key: str, annotation: Any, default: Any) -> None:
    """Empty entries are dropped when a file is read: that is right only while None is the default of all of them."""
    may_be_none = typing.get_origin(annotation) in (types.UnionType, typing.Union) and type(None) in typing.get_args(
        annotation
    )
    assert (default is None) == may_be_none, key
