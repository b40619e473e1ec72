"""A worker's survey of itself by hand: a link that echoes and moves the clock. Legend: d = 4 samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergesfl.methods import METHODS
from mergesfl.methods.base import Assignment, Work
from mergesfl.methods.flops import WorkFlops, count_work_flops
from mergesfl.models import build_model
from mergesfl.protocol.messages import Echo, Gradient, Message, Probe, Report, Survey
from mergesfl.training.split import SplitModel
from tests.memory_cluster import HandClock
from workers.link import Link, SessionLostError
from workers.pace import DeclaredPace, MeasuredPace, Pace, Stretch
from workers.survey import SelfSurvey, pass_bottom, pass_whole

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
WORK_SECONDS = 2.0  # what the network takes for the batch
SURVEY = Survey(1200, num_samples=4, whole_network=False, num_probe_samples=5, probe_bytes=20, echo_bytes=20)


class FakeLink:
    """Sending takes 0.5 s, the echo comes 2 s later; the server says that it held the probe for 1.5 s."""

    def __init__(self, clock: HandClock, answer: Message | None) -> None:
        self.sent: list[Message] = []
        self.num_answered = 0
        self._clock = clock
        self._answer = answer

    def send(self, message: Message) -> None:
        self.sent.append(message)
        self._clock.seconds += 0.5

    def receive(self) -> Message:
        self._clock.seconds += 2.0
        asked = self.sent[self.num_answered]
        self.num_answered += 1
        assert isinstance(asked, Probe)
        return self._answer or Echo(asked.round_num, 1.5, asked.payload, asked.part)


class FakeModels:
    """One network, whose every pass takes WORK_SECONDS."""

    def __init__(self, model: SplitModel, clock: HandClock) -> None:
        self.model = model
        self.counted: list[str] = []
        self._clock = clock
        model.bottom.register_forward_hook(self._take_time)

    def _take_time(self, module: nn.Module, x: tuple[Tensor], z: Tensor) -> None:
        self._clock.seconds += WORK_SECONDS

    @contextlib.contextmanager
    def lend(self) -> Iterator[SplitModel]:
        yield self.model

    def prepare(self, welcome: object, device: torch.device) -> tuple[int, ...]:
        raise AssertionError("a survey comes when the model is built")

    def work_flops(self, name: str, work: Work, assignment: Assignment) -> WorkFlops:
        self.counted.append(name)
        return WorkFlops(0.0, 0.0)


class NotingPace:
    """Writes down what it is told of; reports nothing."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.stretches: list[tuple[float, Stretch]] = []

    def begin_round(self, round_num: int, count_flops: Callable[[], WorkFlops]) -> None:
        self.rounds.append(round_num)
        count_flops()

    def compute_seconds(self, measured_seconds: float, num_samples: int) -> float:
        return 0.0

    def transfer_seconds(self, measured_seconds: float, num_samples: int) -> float:
        return 0.0

    def throttle(self, measured_seconds: float, stretch: Stretch) -> None:
        self.stretches.append((measured_seconds, stretch))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(4, *SHAPE, generator=generator), torch.tensor([0, 1, 2, 0])  # (4, 1, 8, 8), (4,)


class Bench:
    """A survey over a fake link, on the small cnn."""

    def __init__(self, pace: Pace | None = None, answer: Message | None = None, slowdown: float = 1.0) -> None:
        self.clock = HandClock()
        self.link = FakeLink(self.clock, answer)
        self.models = FakeModels(build_model("cnn", None, SHAPE, 3, 0), self.clock)
        self.survey = SelfSurvey(
            cast(Link, self.link), self.clock, pace or MeasuredPace(self.clock, slowdown), CPU, self.models
        )

    def report(self, survey: Survey = SURVEY) -> Report:
        return self.survey.report(survey, batches())


def test_compute_is_the_pass_and_transfer_the_exchange_less_what_was_held() -> None:
    """By hand: 2 s for 4 samples; 0.5 + 2 s of which 1.5 s were held, for the bytes of 5 samples."""
    bench = Bench()
    assert bench.report() == Report(1200, pytest.approx(2.0 / 4), pytest.approx(1.0 / 5))  # type: ignore[arg-type]
    (probe,) = bench.link.sent
    assert isinstance(probe, Probe) and probe.round_num == 1200
    assert (probe.payload.shape, probe.payload.dtype, probe.payload.any()) == ((20,), np.uint8, False)


IN_TWO = Survey(1200, 3, False, num_probe_samples=3, probe_bytes=30, echo_bytes=30, parts_per_step=2)


def three_batches() -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches():
        yield x[:3], y[:3]


def test_in_two_parts_the_second_is_computed_while_the_first_is_out() -> None:
    """By hand, parts of 2 and 1: pass 2 s, probe 0.5 s, forward 2 s, probe 0.5 s, echo 2 s, backward, echo 2 s.
    Computed in 4 s. From the first probe to the last echo 7 s, of these 2 s of computing; held were 1.5 s: 3.5 s."""
    bench = Bench()
    report = bench.survey.report(IN_TWO, three_batches())
    assert report == Report(1200, pytest.approx(4.0 / 3), pytest.approx(3.5 / 3))  # type: ignore[arg-type]
    probes = [one for one in bench.link.sent if isinstance(one, Probe)]
    assert [(one.part, len(one.payload)) for one in probes] == [(0, 20), (1, 10)]


def test_in_parts_the_pace_is_told_of_every_stretch_as_in_a_round() -> None:
    """The backward of the first part and the forward of it are one stretch: between two steps they are."""
    pace = NotingPace()
    Bench(pace).survey.report(IN_TWO, three_batches())
    assert [stretch for _, stretch in pace.stretches] == [
        Stretch(num_full_samples=2),
        Stretch(num_forward_samples=1),
        Stretch(num_backward_samples=1),
    ]


def test_a_survey_in_parts_of_other_samples_than_are_computed_ends_the_session() -> None:
    odd = Survey(1200, 3, False, num_probe_samples=5, probe_bytes=30, echo_bytes=30, parts_per_step=2)
    with pytest.raises(SessionLostError, match="a probe of 5 samples in parts, expected 3"):
        Bench().survey.report(odd, three_batches())


def test_a_slowdown_lengthens_the_pass_alone() -> None:
    bench = Bench(slowdown=3.0)
    report = bench.report()
    assert report.compute_seconds_per_sample == pytest.approx(3 * 2.0 / 4)
    assert report.transfer_seconds_per_sample == pytest.approx(1.0 / 5)
    assert bench.clock.seconds == pytest.approx(3 * 2.0 + 2.5)


def test_declared_durations_replace_both() -> None:
    report = Bench(DeclaredPace(0.25, 0.125)).report()
    assert (report.compute_seconds_per_sample, report.transfer_seconds_per_sample) == (0.25, 0.125)


@pytest.mark.parametrize(("whole_network", "name"), [(False, "survey bottom"), (True, "survey whole")])
def test_the_pace_is_told_of_one_stretch_of_forward_and_backward(whole_network: bool, name: str) -> None:
    pace = NotingPace()
    bench = Bench(pace)
    bench.report(Survey(1200, 4, whole_network, 5, 20, 20))
    assert pace.rounds == [12]
    assert pace.stretches == [(WORK_SECONDS, Stretch(num_full_samples=4))]
    assert bench.models.counted == [name]


@pytest.mark.parametrize(("work", "method"), [(pass_bottom, "mergesfl"), (pass_whole, "fedavg")])
def test_it_costs_the_flops_of_a_step_of_the_method(work: Work, method: str) -> None:
    """So that an emulated device is surveyed as fast as it will work."""
    model = build_model("cnn", None, SHAPE, 3, 0)
    state = model.bottom.state_dict() if method == "mergesfl" else model.joined_state_dict()
    step = Assignment(0, 1, 4, {"learning_rate": 0.1}, state, 0)
    surveyed = count_work_flops(work, model, Assignment(0, 1, 4, {}, {}, 0), SHAPE)
    worked = count_work_flops(METHODS[method].work, model, step, SHAPE)
    assert surveyed.full_flops_per_sample == worked.full_flops_per_sample > 0


@pytest.mark.parametrize("work", [pass_bottom, pass_whole])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed_by_it(work: Work, training: bool) -> None:
    """M5 has batch-norm, whose statistics a pass in training mode would change; the cnn of HAR has dropout, which would
    raise here: it has no seed yet."""
    for name, shape in (("m5", (1, 8000)), ("cnn", SHAPE)):
        model = build_model(name, None, shape, 3, 0)
        model.train(training)
        before = {key: tensor.clone() for key, tensor in model.joined_state_dict().items()}
        random_state = torch.get_rng_state()
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))  # (4, *shape)
        work(model, Assignment(0, 1, 4, {}, {}, 0), iter([(x, torch.tensor([0, 1, 2, 0]))]), lambda step, z, y: z.clone)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.joined_state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert {part.training for part in model.modules()} == {training}
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Gradient(1200, 0, 0.0, np.zeros(20, np.float32)), "expected Echo, got Gradient"),
        (Echo(1200, 0.0, np.zeros(19, np.uint8)), "echo of 19 bytes, expected 20"),
    ],
)
def test_an_answer_that_is_no_echo_ends_the_session(answer: Message, words: str) -> None:
    with pytest.raises(SessionLostError, match=words):
        Bench(answer=answer).report()
