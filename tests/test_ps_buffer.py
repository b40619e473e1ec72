"""The memory in which features are merged: places in it, and what whole runs do with it.

Legend: d = 8 samples of a worker's step, F... = (32, 2, 2), 128 numbers at the cut of the small run.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergesfl.config import RunConfig
from mergesfl.control.plan import RoundPlan
from mergesfl.errors import RemoteProtocolError
from mergesfl.methods import METHODS
from mergesfl.methods.base import StepFeatures
from mergesfl.models import cnn_har
from mergesfl.protocol.arrays import is_channels_last
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.coding import PLAIN, RunCodecs
from mergesfl.protocol.messages import Features, Leave, Message, round_of
from mergesfl.training import merging
from mergesfl.training.merging import OpenStep, joined
from ps import server
from ps.buffer import ALIGNMENT, MergeBuffer, on_device, room_of
from ps.content import NotFiniteError, read_features
from ps.exchange import RoundExchange
from tests.memory_cluster import (
    NAMES,
    HandClock,
    ScriptedCluster,
    ScriptedWorker,
    at,
    checkpoint_of,
    journal_of,
    late,
    same_tensors,
    small_config,
)

torch.set_num_threads(1)

CPU = torch.device("cpu")
ALL = "method.regulation=false"  # all three workers are in every plan, each with batches of 8
STREAMING, IN_ORDER = "training.merge=streaming", "training.merge=streaming-in-order"
ROOM = 8 * 128  # of one worker's step


# Places.


def places_of(buffer: MergeBuffer, shapes: Sequence[tuple[int, ...]], channels_last: Sequence[bool]) -> list[Tensor]:
    begins = itertools.accumulate((room_of(shape) for shape in shapes), initial=0)
    return [buffer.place(*one) for one in zip(begins, shapes, channels_last, strict=False)]


def buffer_of(num_numbers: int) -> MergeBuffer:
    buffer = MergeBuffer()
    buffer.reserve(num_numbers)
    return buffer


@pytest.mark.parametrize("channels_last", [False, True])
def test_places_one_behind_the_other_are_the_merged_batch(channels_last: bool) -> None:
    shapes = [(d, 4, 8, 2) for d in (2, 1, 3)]  # 64 numbers a sample
    places = places_of(buffer_of(6 * 64), shapes, [channels_last] * 3)
    for index, place in enumerate(places):
        assert is_channels_last(place.numpy()) == channels_last and place.data_ptr() % 64 == 0
        place.numpy()[...] = np.arange(place.numel()).reshape(place.shape) + 1000 * index
    copied = [place.clone() for place in places]
    whole = joined(places)
    assert whole.data_ptr() == places[0].data_ptr()
    assert torch.equal(whole, torch.cat(copied)) and whole.stride() == torch.cat(copied).stride()
    assert joined(places[1:]).data_ptr() == places[1].data_ptr()


def test_a_place_that_would_not_be_aligned_begins_later_and_leaves_a_gap() -> None:
    """15 and 30 numbers: the next one begins at the 16th and at the 48th."""
    assert ALIGNMENT == 16 and [room_of((d, 15)) for d in (0, 1, 2, 16)] == [0, 16, 32, 240]
    places = places_of(buffer_of(64), [(1, 15), (2, 15), (1, 15)], [False] * 3)
    assert [place.storage_offset() for place in places] == [0, 16, 48]
    for index, place in enumerate(places):
        place.fill_(index)
    assert joined(places)[:, 0].tolist() == [0, 1, 1, 2] and joined(places).data_ptr() != places[0].data_ptr()


def test_places_of_two_orders_are_joined_in_c_order_whoever_comes_first() -> None:
    for orders in itertools.product([False, True], repeat=3):
        places = places_of(buffer_of(6 * 64), [(2, 4, 8, 2)] * 3, orders)
        for place in places:
            place.numpy()[...] = np.arange(128).reshape(place.shape)
        whole = joined(places)
        assert torch.equal(whole, torch.arange(128.0).reshape(2, 4, 8, 2).repeat(3, 1, 1, 1))
        assert is_channels_last(whole.numpy()) == all(orders)


def test_it_grows_and_stays() -> None:
    buffer = buffer_of(64)
    first = buffer.place(0, (4, 16), False).data_ptr()
    for num_numbers in (64, 16, 0):
        buffer.reserve(num_numbers)
        assert buffer.place(16, (3, 16), False).data_ptr() == first + 64
    buffer.reserve(128)
    buffer.place(0, (8, 16), False).fill_(1)
    with pytest.raises(AssertionError, match="reserved"):
        buffer.place(16, (8, 16), False)


def test_places_move_to_another_device_at_once_and_keep_their_layout() -> None:
    """torch's device "meta" has shapes and no memory."""
    places = places_of(buffer_of(9 * 64), [(3, 4, 8, 2)] * 3, [True, True, False])[1:]
    here = [StepFeatures(name, place, torch.arange(3), 1) for name, place in zip("ab", places, strict=True)]
    moved = on_device(here, torch.device("meta"))
    assert [(one.worker_id, one.part) for one in moved] == [("a", 1), ("b", 1)]
    features, labels = [one.features for one in moved], [one.labels for one in moved]
    assert {one.device.type for one in (*features, *labels)} == {"meta"}
    assert [(one.shape, one.stride()) for one in features] == [(one.shape, one.stride()) for one in places]
    assert [one.storage_offset() for one in features] == [0, 3 * 64]
    assert features[0].untyped_storage().nbytes() == 4 * 6 * 64
    assert [one.shape for one in labels] == [(3,), (3,)] and labels[0]._base is labels[1]._base
    assert on_device(here, CPU) == here and on_device([], torch.device("meta")) == []


# What arrives.


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "fp8", "topk(0.1)"])
def test_a_step_of_ten_workers_makes_no_second_copy_of_its_features(codec: str) -> None:
    """numpy tells tracemalloc of every array: of 5 MiB of features that are merged, less than a twentieth."""
    run, shape = RunCodecs(0, codec, "fp32", "fp32"), (32, 64, 8, 8)
    buffer = buffer_of(10 * room_of(shape))
    rng = np.random.default_rng(0)
    sent: list[Any] = []
    for index in range(10):
        features = rng.standard_normal(shape).astype(np.float32)
        message = run.encode_features(Features(1, 0, features, np.zeros(32, np.int64)), f"worker-{index}")
        sent.append(decode([bytes(frame) for frame in encode(message)]))
    tracemalloc.start()
    places = []
    for index, message in enumerate(sent):
        places.append(buffer.place(index * room_of(shape), shape, False))
        read_features("a", message, places[-1].numpy(), 3, run)
    merged = joined(places)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert merged.data_ptr() == places[0].data_ptr()
    assert peak_bytes < 0.05 * merged.nbytes


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_was_received_is_let_go_when_it_is_accepted(codec: str) -> None:
    run, num_samples = RunCodecs(0, codec, "fp32", "fp32"), 8192
    honest = Features(1, 0, np.ones((num_samples, 128), np.float32), np.full(num_samples, 2))
    memories = [np.frombuffer(bytes(frame), np.uint8) for frame in encode(run.encode_features(honest, "a"))]
    held = [weakref.ref(memory) for memory in memories[1:]]
    assert len(held) == 2, "neither features nor labels are part of the header"
    message: Any = decode([memories[0].tobytes(), *(memory.data for memory in memories[1:])])
    nobody: Any = SimpleNamespace(by_id={"a": None})
    plan = RoundPlan(0, ("a",), (num_samples,), 1, 1, (1.0,), 0.0, 0.0, 0.0, 0, 0)
    exchange = RoundExchange(
        plan, nobody, nobody, HandClock(), (128,), 3, 5.0, 1, run, lambda name, update: None, MergeBuffer()
    )
    exchange._open_places()
    arrival = exchange._arrival("a", message, 0.0)
    del memories, message
    gc.collect()
    assert all(one() is None for one in held)
    assert isinstance(arrival.message, StepFeatures) and arrival.magnitude == pytest.approx(1, rel=0.01)
    assert np.allclose(arrival.message.features, 1, rtol=0.01) and (arrival.message.labels == 2).all()


# Whole runs.


@dataclasses.dataclass
class Fed:
    """One group that was fed to a merged top."""

    features: list[Tensor]
    merged: Tensor
    copy: Tensor  # of it, as it was then
    alone: Tensor  # the same, of what it was made of

    @property
    def is_copied(self) -> bool:
        return self.merged.data_ptr() != self.features[0].data_ptr()


class Watch:
    """What became of the features of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[MergeBuffer] = []
        self.steps: list[list[Fed]] = [[]]
        self.gradients: list[Tensor] = []
        merge, close, answer = merging.merge_features, OpenStep.close, RoundExchange._answer

        class Watched(MergeBuffer):
            def __init__(buffer) -> None:
                super().__init__()
                self.buffers.append(buffer)

        def merge_features(features: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            merged, targets = merge(features, labels)
            self.steps[-1].append(Fed([*features], merged.detach(), merged.detach().clone(), torch.cat([*features])))
            return merged, targets

        def watched_close(step: OpenStep, *arguments: Any) -> float:
            for fed in self.steps[-1]:
                assert torch.equal(fed.copy, fed.alone)
                assert torch.equal(fed.merged, fed.copy), "written over while the step was open"
            self.steps.append([])
            return close(step, *arguments)

        def watched_answer(exchange: RoundExchange, one: Any, step: int, gradient: Tensor, seconds: float) -> None:
            self.gradients.append(gradient)
            answer(exchange, one, step, gradient, seconds)

        monkeypatch.setattr(server, "MergeBuffer", Watched)
        monkeypatch.setattr(merging, "merge_features", merge_features)
        monkeypatch.setattr(OpenStep, "close", watched_close)
        monkeypatch.setattr(RoundExchange, "_answer", watched_answer)

    @property
    def buffer(self) -> MergeBuffer:
        (buffer,) = self.buffers
        return buffer

    @property
    def begin(self) -> int:
        return self.buffer._memory.data_ptr()

    def offset(self, tensor: Tensor) -> int:
        """In numbers from the begin of the buffer."""
        return (tensor.data_ptr() - self.begin) // 4

    def holds(self, tensor: Tensor) -> bool:
        return 0 <= self.offset(tensor) < self.buffer._memory.numel()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def run(folder: Path, *settings: str, scripts: Sequence[Callable[..., Any]] = ()) -> RunConfig:
    config = small_config(folder, ALL, *settings)
    cluster = ScriptedCluster(config)
    for worker, script in zip(cluster.workers, scripts, strict=False):
        worker.script = script
    cluster.run()
    return config


def delayed(*delays_seconds: float) -> Callable[..., Message | None]:
    """Features of step k take so long."""

    def script(worker: ScriptedWorker, answer: Message) -> Message | None:
        if isinstance(answer, Features) and delays_seconds[answer.step]:
            return late(delays_seconds[answer.step])(worker, answer)
        return answer

    return script


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk(0.1)"])
def test_at_the_barrier_the_merged_batch_is_the_buffer_in_every_step_of_every_round(
    tmp_path: Path, codec: str, watch: Watch
) -> None:
    """3 rounds of 2 steps; the last of the plan comes first. 3 workers x 8 samples x 128 numbers and no more."""
    run(tmp_path, f"codec.features={codec}", scripts=[delayed(0.2, 0.1), delayed(0.1, 0.2)])
    *steps, after = watch.steps
    assert len(steps) == 6 and not after
    for (fed,) in steps:
        assert [watch.offset(one) for one in fed.features] == [0, ROOM, 2 * ROOM]
        assert not fed.is_copied and watch.offset(fed.merged) == 0 and fed.merged.shape == (24, 32, 2, 2)
    assert watch.buffer._memory.numel() == 3 * ROOM
    assert not torch.equal(steps[0][0].copy, steps[1][0].copy)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("merge", [STREAMING, IN_ORDER])
def test_streaming_a_group_is_a_stretch_of_one_half_of_the_buffer(
    tmp_path: Path, merge: str, num_parts: int, watch: Watch
) -> None:
    """worker-00 is late in step 0, when the others have long sent step 1, and worker-02 in step 2."""
    run(
        tmp_path, merge, "training.local_steps=3", f"training.parts_per_step={num_parts}", "codec.features=fp16",
        scripts=[delayed(1.0, 0.0, 0.0), delayed(0.0, 0.0, 0.0), delayed(0.0, 0.0, 1.0)],
    )  # fmt: skip
    *steps, after = watch.steps
    assert len(steps) == 9 and not after
    for index, step in enumerate(steps):
        expected = index % 3 % 2 * 3 * ROOM  # the half of this step of its round
        for fed in step:  # one behind the other, in the order in which they came
            assert not fed.is_copied
            for one in fed.features:
                assert watch.offset(one) == expected
                expected += one.numel()
        assert expected % (3 * ROOM) == 0
    assert watch.buffer._memory.numel() == 2 * 3 * ROOM
    if merge == STREAMING:
        assert any(len(fed.features) > 1 for step in steps for fed in step)


def test_streaming_features_of_the_next_step_are_kept_apart_from_those_of_the_open_one(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker's rows of a step are what it has sent in it, also when most of it came while another was open."""
    sent: dict[tuple[int, int, str], np.ndarray[Any, Any]] = {}

    def noting(inner: Callable[..., Message | None]) -> Callable[..., Message | None]:
        def script(worker: ScriptedWorker, answer: Message) -> Message | None:
            if isinstance(answer, Features):
                sent[round_of(answer.round_num), answer.step, worker.worker_id] = np.array(answer.features)
            return inner(worker, answer)

        return script

    delays = [delayed(0.5, 0.0, 0.5), delayed(0.0, 0.5, 0.0), delayed(0.0, 0.0, 0.0)]
    run(tmp_path, IN_ORDER, "training.local_steps=3", scripts=[noting(one) for one in delays])
    for (round_num, step), fed in zip(itertools.product(range(3), range(3)), watch.steps, strict=False):
        rows = sorted(one.copy.numpy().tobytes() for one in fed)
        assert rows == sorted(sent[round_num, step, name].tobytes() for name in NAMES)


@pytest.mark.parametrize("merge", ["training.merge=barrier", IN_ORDER])
@pytest.mark.parametrize("lost", NAMES)
def test_a_worker_that_is_lost_leaves_a_gap_and_the_others_are_merged(
    tmp_path: Path, lost: str, merge: str, watch: Watch
) -> None:
    """Lost in step 1 of round 0: at the barrier only the one in the middle leaves a gap between two others."""
    gone = at(0, 1, lambda worker, answer: worker.vanish())
    config = run(tmp_path, merge, scripts=[gone if name == lost else delayed(0.0, 0.0) for name in NAMES])
    assert journal_of(config)[0]["finished_worker_ids"] == [name for name in NAMES if name != lost]
    if merge != IN_ORDER:
        (fed,) = watch.steps[1]
        assert fed.merged.shape == (16, 32, 2, 2) and fed.is_copied == (lost == NAMES[1])
        (following,) = watch.steps[2]  # of two workers, from the begin on
        assert not following.is_copied and watch.offset(following.merged) == 0


def test_features_that_were_accepted_of_a_worker_that_is_then_lost_are_not_merged(tmp_path: Path, watch: Watch) -> None:
    """worker-01 leaves when it has sent step 0 and worker-02 is waited for."""
    cluster = ScriptedCluster(small_config(tmp_path, ALL, "training.num_rounds=1"))
    cluster[NAMES[2]].script = delayed(3.0, 0.0)

    def leave(worker: ScriptedWorker, answer: Message) -> Message:
        worker.say(Leave("enough"), 1.0)
        return answer

    cluster[NAMES[1]].script = at(0, 0, leave)
    cluster.run()
    assert journal_of(cluster.config)[0]["finished_worker_ids"] == [NAMES[0], NAMES[2]]
    (fed,) = watch.steps[0]
    assert [watch.offset(one) for one in fed.features] == [0, 2 * ROOM] and len(fed.merged) == 16


def test_a_round_that_is_repeated_and_one_with_a_larger_plan_find_room(tmp_path: Path, watch: Watch) -> None:
    """Round 0 is void, as worker-01 is late in step 1: played again. Then there is a fourth worker."""
    settings = ("cluster.quorum_fraction=0.75", "cluster.step_deadline_seconds=5.0", "cluster.num_workers=4")
    cluster = ScriptedCluster(small_config(tmp_path, ALL, *settings, "cluster.start_deadline_seconds=40.0"))
    times: list[int] = []

    def late_once(worker: ScriptedWorker, answer: Message) -> Message | None:
        times.append(1)
        return late(30.0)(worker, answer) if len(times) == 1 else answer

    def bring_another(worker: ScriptedWorker, answer: Message) -> Message:
        cluster.add("worker-03")
        return answer

    cluster[NAMES[1]].script = at(0, 1, late_once)
    cluster[NAMES[2]].script = at(0, None, bring_another)
    cluster.run()
    lines = journal_of(cluster.config)
    assert [(line["attempt"], len(line["worker_ids"])) for line in lines] == [(2, 3), (1, 4), (1, 4)]
    assert [len(fed.copy) for step in watch.steps for fed in step] == [24, 24, 24, 32, 32, 32, 32]
    assert not any(fed.is_copied for step in watch.steps for fed in step)
    assert watch.buffer._memory.numel() == 4 * ROOM


def channels_last(inner: Callable[..., Message | None]) -> Callable[..., Message | None]:
    def script(worker: ScriptedWorker, answer: Message) -> Message | None:
        if isinstance(answer, Features):
            moved = np.ascontiguousarray(answer.features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            answer = dataclasses.replace(answer, features=moved)
        return inner(worker, answer)

    return script


@pytest.mark.parametrize("settings", [(), (IN_ORDER,), ("method.name=splitfed-v1",), ("method.name=locfedmix-sl",)])
def test_workers_that_send_in_two_orders_train_the_same_bits_whoever_comes_first(
    tmp_path: Path, settings: tuple[str, ...], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """worker-01 sends channels last. A top that convolves would see it; here it is what the top is given."""
    monkeypatch.setattr(cnn_har, "DROPOUT", 0.0)
    runs, layouts = [], []
    for name, delays in (("forth", (0.1, 0.2, 0.3)), ("back", (0.3, 0.2, 0.1)), ("middle", (0.2, 0.1, 0.3))):
        scripts = [delayed(delay, delay) for delay in delays]
        scripts[1] = channels_last(scripts[1])
        watch.steps, watch.buffers = [[]], []
        runs.append(checkpoint_of(run(tmp_path, f"name={name}", *settings, scripts=scripts)))
        layouts.append([sorted(fed.merged.stride() for fed in step) for step in watch.steps])
    assert same_tensors(runs[0], runs[1]) and same_tensors(runs[0], runs[2])
    assert layouts[0] == layouts[1] == layouts[2]


SPLITTING = sorted(name for name, method in METHODS.items() if method.splits)


@pytest.mark.parametrize("name", SPLITTING)
def test_what_is_sent_never_lies_in_the_buffer_and_nothing_in_it_is_used_after_its_step(
    tmp_path: Path, name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, and one in which the buffer is spoilt after every step, end with the same bits."""
    calm = run(tmp_path, "name=calm", f"method.name={name}", "training.num_rounds=2")
    assert len(watch.gradients) == 2 * 2 * 3 and not any(watch.holds(gradient) for gradient in watch.gradients)
    watch.buffers.clear()
    answer = RoundExchange.answer

    def spoil(exchange: RoundExchange, *arguments: Any) -> None:
        watch.buffer._memory.fill_(math.nan)
        answer(exchange, *arguments)

    monkeypatch.setattr(RoundExchange, "answer", spoil)
    spoilt = run(tmp_path, "name=spoilt", f"method.name={name}", "training.num_rounds=2")
    assert same_tensors(checkpoint_of(calm), checkpoint_of(spoilt))


def larger(worker: ScriptedWorker, answer: Message) -> Message:
    assert isinstance(answer, Features)
    return dataclasses.replace(answer, features=np.zeros((4096, 32, 2, 2), np.float32), labels=np.zeros(4096, np.int64))


def of_nothing(worker: ScriptedWorker, answer: Message) -> Message:
    assert isinstance(answer, Features)
    return dataclasses.replace(answer, features=np.full((8, 32, 2, 2), np.nan, np.float32))


@pytest.mark.parametrize("merge", ["training.merge=barrier", STREAMING])
@pytest.mark.parametrize("plant", [larger, of_nothing])
def test_a_worker_cannot_make_it_larger_nor_spoil_what_others_have_sent(
    tmp_path: Path, plant: Callable[..., Message], merge: str, watch: Watch
) -> None:
    config = run(tmp_path, merge, scripts=[delayed(0.0, 0.0), at(0, 0, plant)])
    assert NAMES[1] not in journal_of(config)[0]["finished_worker_ids"]
    assert watch.buffer._memory.numel() == 3 * ROOM * (2 if merge == STREAMING else 1)
    assert all(torch.isfinite(fed.merged).all() for fed in watch.steps[1])


def test_an_error_names_the_worker_and_the_rows_of_others_stay(tmp_path: Path) -> None:
    buffer = buffer_of(3 * 16)
    buffer.place(0, (3, 16), False).fill_(7)
    place, labels = buffer.place(16, (1, 16), False), np.zeros(1, np.int64)
    for features, error in ((np.ones((2, 16)), RemoteProtocolError), (np.full((1, 16), np.inf), NotFiniteError)):
        with pytest.raises(error, match="worker 'a' sent"):
            read_features("a", Features(1, 0, features.astype(np.float32), labels), place.numpy(), 3, PLAIN)
    assert buffer.place(0, (3, 16), False)[::2].tolist() == [[7.0] * 16] * 2
