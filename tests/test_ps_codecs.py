"""Runs with codecs: planted faults against a real server, what is planned, what crosses the wire, over which transport.

Legend: d = 8 samples of a worker's step, F... = (32, 2, 2), 128 numbers at the cut of the small run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesfl.errors import ConfigError
from mergesfl.protocol.messages import Assign, Features, Gradient, Message, Refuse, Release, Update, wire_round
from tests.memory_cluster import (
    FEATURE_SHAPE,
    NAMES,
    ScriptedCluster,
    ScriptedWorker,
    at,
    checkpoint_of,
    journal_of,
    small_config,
)
from tests.test_cluster_processes import play, same_parameters

torch.set_num_threads(1)

ALL = "method.regulation=false"  # all three workers in every plan, batches of 8
CODECS = ("codec.features=int8", "codec.gradients=fp16", "codec.weights=int8")
TOPK = ("codec.features=topk(0.1)",)  # 13 of 128 numbers

Plant = Callable[[Any], Any]


def part(name: str, value: Callable[[Any], Any]) -> Plant:
    return lambda sent: dataclasses.replace(sent, parts={**sent.parts, name: value(sent.parts.get(name))})


def values(change: Callable[[Any], Any]) -> Plant:
    return lambda sent: dataclasses.replace(sent, features=change(sent.features))


def spoilt(index: Any, value: float) -> Callable[[Any], Any]:
    def spoil(array: Any) -> Any:
        array = array.copy()
        array[index] = value
        return array

    return spoil


def first_weight(sent: Update, part_name: str) -> str:
    return next(key for key in sent.parts if key.endswith(f":{part_name}"))


POISON: dict[str, tuple[tuple[str, ...], int | None, Plant, str]] = {
    "not encoded": (
        CODECS, 0, lambda f: dataclasses.replace(f, features=np.zeros((8, *FEATURE_SHAPE), np.float32), parts={}),
        "sent features parts ['values'], expected ['scale', 'values', 'zero'] (codec int8)",
    ),
    "floats for codes": (
        CODECS, 1, values(lambda codes: codes.astype(np.float32)),
        "sent features float32(8, 32, 2, 2), expected uint8(8, 32, 2, 2)",
    ),
    "a scale of another shape": (
        CODECS, 0, part("scale", lambda scale: scale[:-1]), "sent features scale float32(31,), expected float32(32,)",
    ),
    "a scale that is NaN": (
        CODECS, 1, part("scale", spoilt(3, np.nan)), "sent features scale with nan, expected numbers that are not neg",
    ),
    "a negative scale": (CODECS, 0, part("scale", spoilt(0, -1.0)), "scale with -1.0"),
    "a part too many": (CODECS, 0, part("places", lambda none: np.zeros((8, 3), np.int16)), "parts ['places', 'scale'"),
    "a place out of range": (TOPK, 0, part("places", spoilt((2, 12), 128)), "expected 0 to 127"),
    "a place below 0": (TOPK, 1, part("places", spoilt((2, 0), -1)), "places from -1"),
    "a place twice": (
        TOPK, 0, part("places", lambda p: np.concatenate([p[:, :1], p[:, :-1]], axis=1)), "each once and in order",
    ),
    "more than k": (
        TOPK, 0, values(lambda kept: np.concatenate([kept, kept], axis=1)),
        "sent features float32(8, 26), expected float32(8, 13)",
    ),
    "one sample too many": (
        TOPK, 0, lambda f: dataclasses.replace(
            f, features=np.zeros((9, 13), np.float32), labels=np.zeros(9, np.int64),
            parts={"places": np.tile(np.arange(13, dtype=np.int16), (9, 1))},
        ),
        "sent features float32(9, 13), expected float32(8, 13)",
    ),
    "a weight's scale that is NaN": (
        CODECS, None, lambda u: part(first_weight(u, "scale"), spoilt(0, np.nan))(u), "scale with nan",
    ),
    "a weight of another shape": (
        CODECS, None, lambda u: part(first_weight(u, "values"), lambda codes: codes[..., :-1])(u), "expected float32(",
    ),
    "a weight as it is": (
        CODECS, None, lambda u: dataclasses.replace(u, state={**u.state, "w": np.zeros((2, 2), np.float32)}),
        "sent 'w': float32(2, 2) as it is (codec int8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", POISON)
def test_only_the_worker_that_sends_what_its_codec_does_not_make_is_closed(tmp_path: Path, case: str) -> None:
    codecs, step, plant, words = POISON[case]
    config = small_config(tmp_path, ALL, *codecs)
    cluster = ScriptedCluster(config)
    cluster["worker-01"].script = at(1, step, lambda worker, answer: plant(answer))
    cluster.run()
    lines = journal_of(config)
    (lost,) = lines[1]["dropped"]
    assert (lost["worker_id"], lost["step"]) == (NAMES[1], 2 if step is None else step)
    assert words in lost["reason"] and lost["reason"].startswith("worker 'worker-01' sent ")
    assert cluster["worker-01"].told(Refuse) == [Refuse(lost["reason"])]
    assert lines[1]["finished_worker_ids"] == lines[2]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_of(config).tensors.values())
    for name in (NAMES[0], NAMES[2]):
        assert cluster[name].told(Refuse) == cluster[name].told(Release) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "fp8", "topk(0.1)"])
def test_an_honest_worker_whose_arithmetic_broke_down_is_seen_through_every_codec_and_not_closed(
    tmp_path: Path, codec: str, value: float
) -> None:
    config = small_config(tmp_path, ALL, f"codec.features={codec}", "codec.weights=int8")
    cluster = ScriptedCluster(config)
    worker = cluster["worker-01"]

    def break_down(worker: ScriptedWorker, answer: Message) -> Message:
        assert isinstance(answer, Features)
        x = np.zeros((8, *FEATURE_SHAPE), np.float32)
        x[3, 7, 1, 1] = value
        return worker.codecs.encode_features(dataclasses.replace(answer, features=x, parts={}), worker.worker_id)

    worker.script = at(1, 0, break_down)
    cluster.run()
    lines = journal_of(config)
    (lost,) = lines[1]["dropped"]
    assert lost["reason"] == "worker 'worker-01' sent features that are not finite"
    assert worker.told(Refuse) == []
    assert worker.told(Release) == [Release(wire_round(1, 1), lost["reason"])]
    assert lines[2]["finished_worker_ids"] == [*NAMES]


def test_all_that_a_worker_is_sent_is_of_the_runs_codecs(tmp_path: Path) -> None:
    cluster = ScriptedCluster(small_config(tmp_path, ALL, *CODECS, "training.num_rounds=1"))
    cluster.run()
    worker = cluster["worker-00"]
    (assign,) = worker.told(Assign)
    assert all(array.ndim < 2 for array in assign.state.values())
    assert {array.dtype.name for key, array in assign.parts.items() if key.endswith(":values")} == {"uint8"}
    assert [gradient.gradient.dtype.name for gradient in worker.told(Gradient)] == ["float16"] * 2


# What is planned.


def test_the_budget_is_of_encoded_bytes_and_means_as_many_samples(tmp_path: Path) -> None:
    """3 workers x 8 samples x 512 bytes, or 128 with int8: 24 samples either way. A budget in bytes takes more."""
    budgets, samples = {}, {}
    for name, settings in {
        "plain": (),
        "coded": ("codec.features=int8",),
        "narrow": ("control.ingress_budget_bytes=6144",),
        "narrow-coded": ("control.ingress_budget_bytes=6144", "codec.features=int8"),
    }.items():
        config = small_config(tmp_path, f"name={name}", "training.num_rounds=1", *settings)
        ScriptedCluster(config).run()
        (line,) = journal_of(config)
        budgets[name], samples[name] = line["ingress_budget_bytes"], sum(line["batch_sizes"])
    assert budgets == {"plain": 24 * 512, "coded": 24 * 128, "narrow": 6144, "narrow-coded": 6144}
    assert samples["plain"] == samples["coded"] <= 24
    assert samples["narrow"] <= 12 < samples["narrow-coded"] <= 48


def test_a_budget_below_one_encoded_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less than one sample at the cut, 128 bytes"):
        ScriptedCluster(small_config(tmp_path, "codec.features=int8", "control.ingress_budget_bytes=127")).run()


# Whole runs with real daemons.


def test_int8_features_and_fp16_gradients_divide_all_bytes_of_a_run_by_two_and_a_half(tmp_path: Path) -> None:
    """By hand: 128 numbers per sample are 1024 bytes up and down, or 384; 8 bytes of label stay. 24 steps of 64 are
    1032 * 1536 = 1.585 MB, or 392 * 1536 = 0.602 MB. The bottom of 3,608 numbers, 28.9 kB there and back, stays. So the
    ratio is 1.614 / 0.631 = 2.56, and the headers take a little of it."""
    large = (
        "cluster.transport=memory",
        "training.batch_size=64",
        "training.local_steps=24",
        "training.num_rounds=1",
        ALL,
    )
    plain = play(tmp_path, "plain", *large)
    saved = play(tmp_path, "saved", *large, *CODECS[:2])
    assert 2.5 <= total_bytes(plain) / total_bytes(saved) <= 2.56
    assert not same_parameters(plain, saved)


def total_bytes(folder: Path) -> int:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return sum(line["ingress_bytes"] + line["egress_bytes"] for line in lines)


@pytest.mark.parametrize("codecs", [CODECS, ("codec.features=topk(0.1)", "codec.gradients=int8", "codec.weights=bf16")])
def test_a_run_with_codecs_is_the_same_over_memory_and_sockets_to_the_bit(
    tmp_path: Path, codecs: tuple[str, ...]
) -> None:
    """With a survey, whose probe and echo are of different sizes."""
    survey = "control.survey_every_rounds=2"
    one = play(tmp_path, "memory", "cluster.transport=memory", survey, *codecs)
    other = play(tmp_path, "tcp", "cluster.transport=tcp", survey, *codecs)
    assert same_parameters(one, other)
    assert not same_parameters(one, play(tmp_path, "plain", "cluster.transport=memory", survey))  # they were at work
