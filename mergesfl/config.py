"""The configuration of a run: frozen, nested, checked at the door; every default stands here and only here.

A file (TOML, or the JSON that a run leaves behind) and `--set section.key=value` fill it. Unknown keys are refused
with the nearest legal name. Names of methods, models, data sets and partitions are looked up by their own tables.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergesfl.codecs import find_codec, find_weight_codec
from mergesfl.errors import ConfigError, nearest
from mergesfl.parts import MAX_PARTS_PER_STEP

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover  (JetPack 6 ships Python 3.10)
    import tomli as tomllib

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
PositiveFraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Memory = Annotated[float, Field(ge=0, lt=1, strict=True)]
NotNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Slowdown = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]
VoidRounds = Annotated[int, Field(ge=1, le=99, strict=True)]
PartsPerStep = Annotated[int, Field(ge=1, le=MAX_PARTS_PER_STEP, strict=True)]
Switch = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys.

    Numbers and switches are strict (in their types above): text or a switch is never taken for a number. The sections
    are not, because JSON and TOML have no paths and no tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


class DataConfig(Section):
    """What is learnt, and how it lies on the workers."""

    dataset: str = "digits"  # a name of `mergesfl datasets`, or name:path
    download: Switch = False
    image_size_pixels: PositiveInt = 144  # of the data set 'folder'
    partition: str = "dirichlet(0.1)"  # iid, dirichlet(a), level(p), dominant(r), shards(k), quantity(b), groups
    partition_file: Path | None = None  # a partition saved by an earlier run, instead of drawing one


class ModelConfig(Section):
    """The network and where it is cut."""

    name: str = "cnn"  # a name of `mergesfl models`, or torchvision:NAME
    cut: str | None = None  # a name of `mergesfl cuts MODEL`; None: the model's default


class MethodConfig(Section):
    """The method; merging and regulation are switches of mergesfl, adapt_local_steps is one of adasfl.

    Naming a method of PRESETS sets more than its name, unless the configuration says otherwise.
    """

    name: str = "mergesfl"
    merging: Switch = True  # one top step on the merged features; off: one top per worker
    regulation: Switch = True  # Algorithm 1; off: random selection, same batch
    adapt_local_steps: Switch = False  # fewer steps as the loss falls; off: training.local_steps in every round
    # Of mergesfl+ alone; see mergesfl/methods/mergesfl_plus.py.
    top_momentum: Memory = 0.0  # beta of the merged top's momentum
    logit_adjustment: Switch = False  # the merged loss is adjusted by the labels of the merged batch
    proximal: NotNegativeFloat = 0.0  # mu that holds the bottoms near the global one
    model_averaging: Memory = 0.0  # memory of the running mean of models that is evaluated and exported


class TrainingConfig(Section):
    """Rounds, steps and rates."""

    num_rounds: PositiveInt = 20
    local_steps: PositiveInt = 10  # tau
    batch_size: PositiveInt = 32  # D_max of Eq. 9, and the same batch of the unregulated methods
    learning_rate: PositiveFloat = 0.1  # [code]
    learning_rate_decay: PositiveFraction = 0.993  # per round [code]
    learning_rate_min: PositiveFloat = 0.005  # [code]
    bottom_learning_rate: Literal["equal", "proportional"] = "equal"  # proportional: eta * d_i / mean d
    # When the server processes the features of a step: all at once when the last are in (barrier) [paper], or what is
    # there as it arrives, answering at once (streaming): faster where times vary, the same mathematics but for dropout
    # masks of the top, which are drawn worker by worker. In-order: the same, and equal to the bit whatever the order of
    # arrival; the server computes worker by worker, which takes 2 to 9 times as long.
    merge: Literal["barrier", "streaming", "streaming-in-order"] = "barrier"
    # Streaming, a worker sends its batch of a step in so many parts: while the gradient of one comes down the next is
    # computed and goes up. The same mathematics, but for dropout masks, which are drawn part by part.
    parts_per_step: PartsPerStep = 1
    evaluate_every_rounds: PositiveInt = 1
    evaluation_batch_size: PositiveInt = 256


class ControlConfig(Section):
    """The control module (Algorithm 1)."""

    # The unregulated methods draw so many workers (None: all). Regulation is bounded by the budget B per step alone:
    # without one B = participants * batch_size * feature bytes, so that all methods merge equally many samples.
    participants_per_round: PositiveInt | None = None
    ingress_budget_bytes: PositiveInt | None = None
    max_participants: PositiveInt | None = None  # regulation chooses no more workers; None: as many as the budget takes
    search: Literal["auto", "genetic", "greedy-swaps", "convex"] = "auto"  # genetic is the paper's
    reference: Literal["uniform", "data"] = "uniform"  # Phi_0: mean over the workers [paper], or over all their data
    kl_epsilon_nats: PositiveFloat = 0.05
    idle_weight_nats: NotNegativeFloat = 0.0  # KL given up for merging a sample e times faster; 0 is the paper's
    priority_weight_nats: NotNegativeFloat = 0.002  # KL given up for workers that had half the turns of the others
    time_model: Literal["linear", "affine"] = "linear"  # t = b d [paper], or t = a + b d
    estimate_memory: Fraction = 0.8  # alpha of Eq. 5 and 6
    # All workers measure themselves before every so many rounds [paper: 1], if the method plans by speed; 0: never.
    survey_every_rounds: NotNegativeInt = 0
    survey_deadline_seconds: PositiveFloat = 10.0  # of all; who answers later keeps its estimate and misses the round
    fill_budget: Switch = True
    allow_above_max: Switch = True  # filling the budget may take d_i above D_max


def _checked(find: Callable[[str], object]) -> AfterValidator:
    """Refuses a name that `find` does not find, with its words."""

    def check(name: str) -> str:
        try:
            find(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


CodecName = Annotated[str, _checked(find_codec)]
WeightCodecName = Annotated[str, _checked(find_weight_codec)]


class CodecConfig(Section):
    """What crosses the wire in place of float32: fp32, fp16, bf16, int8, fp8, topk(share); see mergesfl/codecs."""

    features: CodecName = "fp32"
    gradients: CodecName = "fp32"
    weights: WeightCodecName = "fp32"  # of the states that go out and come back: fp32, fp16, bf16, int8


class ClusterConfig(Section):
    """Processes, links and what happens when they fail."""

    num_workers: PositiveInt = 10
    transport: Literal["tcp", "ipc", "memory"] = "tcp"  # of `mergesfl run`
    device: str = "auto"  # auto, cpu, cuda or cuda:1; of the parameter server
    worker_device: str = "auto"  # of the workers that `mergesfl run` starts
    # torch threads; None: share the cores of this machine. An evaluation beside a round has as many of its own.
    ps_threads: PositiveInt | None = None
    worker_threads: PositiveInt | None = None  # of worker processes; those of one process share the server's
    start_deadline_seconds: PositiveFloat = 120.0  # for num_workers to register; then a quorum is enough
    step_deadline_seconds: PositiveFloat = 60.0  # a worker that answers later is dropped from the round
    quorum_fraction: PositiveFraction = 0.5  # of a plan; fewer answers void the round
    max_void_rounds: VoidRounds = 5  # in a row; then the run stops with a QuorumError
    slowdowns: tuple[Slowdown, ...] = ()  # worker i computes x times slower
    declared_compute_seconds_per_sample: tuple[PositiveFloat, ...] = ()  # instead of measured ones, worker by worker
    declared_transfer_seconds_per_sample: tuple[PositiveFloat, ...] = ()


class SimulationConfig(Section):
    """What `mergesfl simulate` emulates. `mergesfl run` throttles its workers alike when a fleet is named."""

    # Device profile (a name of `mergesfl profiles`, or a path) -> its share of the workers, in this order. `simulate`
    # without one: 30 TX2, 40 Xavier NX, 10 AGX Xavier, the paper's testbed.
    fleet: dict[str, PositiveInt] = Field(default_factory=dict)
    ps_flops_per_second: PositiveFloat = 5e12  # effective, of the parameter server's GPU [ours]
    ps_link_mbit_per_second: PositiveFloat = 1000.0  # shared by all workers, in each direction [ours]
    availability_trace: Path | None = None  # CSV: worker_id,seconds,available
    bandwidth_trace: Path | None = None  # CSV: worker_id,seconds,mbit_per_second


class OutputConfig(Section):
    """What a run leaves behind."""

    folder: Path = Path("runs")
    checkpoint_every_rounds: PositiveInt = 5
    tensorboard: Switch = True
    plots: Switch = True
    export: Switch = True


# What a method is made of beside its program, where the configuration is silent. The figures: benchmarks/README.md.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "mergesfl+": {
        "method": {"model_averaging": 0.5, "top_momentum": 0.9},
        "control": {
            "estimate_memory": 0.2,
            "idle_weight_nats": 0.05,
            "reference": "data",
            "survey_every_rounds": 5,
        },
    }
}
PLUS_KEYS = ("top_momentum", "logit_adjustment", "proximal", "model_averaging")


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]*$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    training: TrainingConfig = TrainingConfig()
    control: ControlConfig = ControlConfig()
    codec: CodecConfig = CodecConfig()
    cluster: ClusterConfig = ClusterConfig()
    simulation: SimulationConfig = SimulationConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check_plus(self) -> RunConfig:
        """A switch that the method does not know would be a promise that nobody keeps."""
        for key in PLUS_KEYS:
            value = getattr(self.method, key)
            if value and self.method.name != "mergesfl+":
                raise ValueError(f"method.{key} = {value} is for method.name = 'mergesfl+', not '{self.method.name}'")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> RunConfig:
        """At the barrier a part would wait for all the others, and nothing would be gained."""
        parts, merge = self.training.parts_per_step, self.training.merge
        if parts > 1 and merge == "barrier":
            raise ValueError(
                f"training.parts_per_step = {parts} is for a server that answers features as they arrive: set "
                "training.merge = 'streaming' or 'streaming-in-order', or training.parts_per_step = 1"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where this run writes: output.folder / name."""
        return self.output.folder / self.name


def _legal_keys(section: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The legal keys of the section at this place below another."""
    for part in location:
        annotation = section.model_fields[str(part)].annotation if str(part) in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def explain(error: ValidationError, source: str, root: type[BaseModel]) -> ConfigError:
    """Turns pydantic's list into lines that name key, value, limit and the nearest legal name."""
    lines = []
    for item in error.errors():
        *section, key = item["loc"] or ("",)
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{name}': {nearest(str(key), _legal_keys(root, section))}")
        elif not item["loc"]:  # of several keys together: the message names them
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"'{name}' = {item['input']!r}: {item['msg']}")
    return ConfigError(f"{source}:\n  " + "\n  ".join(lines))


def parse_config(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Checks a nested mapping, laid over the preset of its method if there is one.

    Raises ConfigError with one line for every wrong key or value.
    """
    method = values.get("method")
    preset = PRESETS.get(str(method.get("name")), {}) if isinstance(method, Mapping) else {}
    try:
        return RunConfig.model_validate(_laid_over(preset, values))
    except ValidationError as error:
        raise explain(error, source, RunConfig) from None


def _laid_over(preset: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and the preset's where a section does not name a key; what is no section is left to the check."""
    result = dict(values)
    for section, defaults in preset.items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            result[section] = {**defaults, **given}
    return result


def _parse_value(text: str) -> Any:
    """The value of `--set key=value`: TOML where it parses, else plain text; a date is text, no key takes one."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text in ("none", "None", "null") else text
    return text if isinstance(value, (datetime.date, datetime.time)) else value


def apply_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Applies `section.key=value` texts to a nested mapping, in order, and returns a new one.

    Raises ConfigError for a text without '=' or a key that leads through a value.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for setting in settings:
        key, separator, text = setting.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise ConfigError(f"--set '{setting}': expected section.key=value, for example training.num_rounds=60")
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set '{setting}': '{part}' is a value, not a section")
        place[parts[-1]] = _parse_value(text.strip())
    return result


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drops empty entries, so that a written configuration reads back as the defaults it came from."""
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def load_config(path: Path | None, settings: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML or JSON file (None: all defaults) and applies `--set` texts.

    Raises ConfigError naming the file, the key, the value and what would be legal.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ConfigError(
                f"cannot read the configuration {path}: {error.strerror}; give the path of a .toml file"
            ) from None
        except (ValueError, RecursionError) as error:  # of the parsers, of UTF-8, of numbers with 5,000 digits
            raise ConfigError(f"{path} is not valid {path.suffix or 'TOML'}: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a table of sections, got {type(values).__name__}")
    return parse_config(_without_none(apply_settings(values, settings)), str(path or "configuration"))


def config_values(config: RunConfig) -> dict[str, Any]:
    """The effective configuration as plain JSON values; `load_config` reads it back."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values
