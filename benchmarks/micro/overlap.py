"""Features encoded beside computing: `python -m benchmarks.micro.overlap` prints one table.

The steps in parts of ONE worker whose sender has a thread (workers/sender.py), against the same steps of one that
encodes between two parts. All of the worker is real: bottom, `work`, exchange, link and an ipc endpoint. Its server, in
another process (benchmarks/micro/answers.py), answers without computing: at once, or as a link of so many Mb/s would
let it. Both take turns in one process, a round each in every repeat, the one first that was second before. The first
step of a round, which no worker encodes beside computing, does not count; the others do as their mean. Told are the
medians over the repeats of milliseconds per step without the thread and of ratios with / without it, each taken within
a repeat: of a step, with its quartiles, and of the time from a step's batch until its first and its last part begin to
be sent.

A worker that a slow link holds up encodes in its computing thread even so (workers/exchange.py): 1 is expected there.
The thread wants a core: of two, the server and the transport's threads have their share, too.

No run takes steps of M5 in parts at its usual cut (batch-norm): here it stands for what such a bottom costs.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.micro.answers import codecs_of
from benchmarks.micro.samples import find_workload
from benchmarks.micro.server_process import listening
from mergesfl.methods.base import Assignment
from mergesfl.methods.split_program import work
from mergesfl.models import build_model
from mergesfl.parts import MAX_PARTS_PER_STEP
from mergesfl.processes import local_address
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Assign,
    Features,
    Message,
    Ready,
    Register,
    Update,
    Welcome,
    round_of,
)
from mergesfl.runtime.clock import WallClock
from mergesfl.runtime.process import keep_freed_memory
from mergesfl.training.split import SplitModel
from mergesfl.transport import connect
from workers.exchange import TimedExchange
from workers.link import Link
from workers.pace import MeasuredPace
from workers.sender import Sender

WORKER_ID = "w"
UNCOUNTED_STEPS = 1  # of a round
FEWEST_STEPS = 4
LINK_SECONDS = 0.5  # of a round, about: over slow links it has fewer steps, but not fewer than these


@dataclass(frozen=True)
class Case:
    """One row of the table; 0 Mb/s: as fast as it goes."""

    workload: str
    codec: str
    batch_size: int  # d
    num_parts: int
    megabits_per_second: float
    num_steps: int  # of a round


@dataclass(frozen=True)
class Times:
    """The counted steps of one round: their means."""

    step_seconds: float
    first_out_seconds: float  # from the step's batch until its first part begins to be sent
    last_out_seconds: float

    @staticmethod
    def of(begins: Sequence[float], sent: Sequence[float]) -> Times:
        """From when every step began and the last one ended, and when every part began to be sent."""
        steps = np.array(begins)  # (num_steps + 1,)
        outs = np.array(sent).reshape(len(steps) - 1, -1) - steps[:-1, np.newaxis]  # (num_steps, num_parts)
        means = (np.diff(steps), outs[:, 0], outs[:, -1])
        return Times(*(float(mean[UNCOUNTED_STEPS:].mean()) for mean in means))


class WatchedLink(Link):
    """A link that remembers when it began to send each Features, and in which thread."""

    def __init__(self, address: str, clock: WallClock) -> None:
        super().__init__(connect(address), clock, lambda: None)
        self._watch = clock
        self.sent_seconds: list[float] = []
        self.threads: list[int] = []

    def send(self, message: Message) -> None:
        """Sends as a link does."""
        if isinstance(message, Features):
            self.sent_seconds.append(self._watch.now_seconds())
            self.threads.append(threading.get_ident())
        super().send(message)


def build(name: str) -> tuple[SplitModel, tuple[int, ...]]:
    """The network of a workload, at its usual cut, and the shape of a sample. Raises ConfigError."""
    workload = find_workload(name)
    return build_model(workload.model, None, workload.sample_shape, workload.num_classes, 0), workload.sample_shape


class Worker:
    """A worker of one case, connected; every round starts from the same bottom and sees the same batch."""

    def __init__(self, case: Case, address: str) -> None:
        self._codecs = codecs_of(case.codec)
        self._clock = WallClock()
        self._model, shape = build(case.workload)
        self._state = {name: tensor.clone() for name, tensor in self._model.bottom.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(case.batch_size, *shape, generator=generator)  # (d, *sample)
        self._y = torch.zeros(case.batch_size, dtype=torch.int64)  # (d,)
        self.link = WatchedLink(address, self._clock)
        self.link.send(Register(WORKER_ID, PROTOCOL_VERSION, "cpu", {}, 1, (1,), ("0",), shape))
        assert isinstance(self.link.receive(), Welcome)
        feature_shape = self._model.feature_shape(shape)
        self.link.send(Ready(feature_shape, self._codecs.feature_bytes(feature_shape)))

    def play(self, has_thread: bool) -> tuple[Times, dict[str, Tensor]]:
        """One round with or without the thread: its times and the bottom it ends with."""
        begins: list[float] = []
        self.link.sent_seconds, self.link.threads = [], []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                begins.append(self._clock.now_seconds())
                yield self._x, self._y

        assign = self.link.receive()
        assert isinstance(assign, Assign)
        num_steps, num_parts = assign.num_steps, assign.parts_per_step
        round_num, size, settings = round_of(assign.round_num), assign.batch_size, assign.settings
        pace, cpu = MeasuredPace(self._clock), torch.device("cpu")
        with Sender(self.link, self._codecs, WORKER_ID, has_thread) as sender:
            exchange = TimedExchange(self.link, assign.round_num, size, self._clock, pace, cpu, self._codecs, sender)
            assignment = Assignment(round_num, num_steps, size, settings, self._state, 0, num_parts)
            result = work(self._model, assignment, batches(), exchange)
            begins.append(self._clock.now_seconds())
        exchange.finish(num_steps)
        spent = (exchange.compute_seconds, exchange.transfer_seconds)
        self.link.send(Update(assign.round_num, result.num_samples, *spent, {}))
        return Times.of(begins, self.link.sent_seconds), result.state


@contextlib.contextmanager
def connected(case: Case) -> Iterator[Worker]:
    """A worker, and its server in another process."""
    with local_address("ipc") as address:
        of_case = (case.codec, case.batch_size, case.num_parts, case.num_steps, case.megabits_per_second)
        with listening("benchmarks.micro.answers", address, *of_case) as bound:
            worker = Worker(case, bound)
            with contextlib.closing(worker.link):
                yield worker


def compare(case: Case, num_repeats: int) -> list[tuple[Times, Times]]:
    """(without, with) the thread of every repeat; one more comes before and does not count."""
    pairs = []
    with connected(case) as worker:
        for repeat in range(num_repeats + 1):
            order = (False, True) if repeat % 2 else (True, False)
            times = {has_thread: worker.play(has_thread)[0] for has_thread in order}
            pairs.append((times[False], times[True]))
    return pairs[1:]


def row(case: Case, pairs: Sequence[tuple[Times, Times]]) -> str:
    """The cells of one case."""
    steps = [mine.step_seconds / base.step_seconds for base, mine in pairs]
    low, middle, high = np.percentile(steps, (25, 50, 75))
    first = statistics.median(mine.first_out_seconds / base.first_out_seconds for base, mine in pairs)
    last = statistics.median(mine.last_out_seconds / base.last_out_seconds for base, mine in pairs)
    milliseconds = 1e3 * statistics.median(base.step_seconds for base, _ in pairs)
    rate = f"{case.megabits_per_second:g}" if case.megabits_per_second else "no limit"
    return (
        f"{case.workload} | {case.codec} | {case.batch_size} | {case.num_parts} | {rate} | {milliseconds:.2f} | "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) | {first:.3f} | {last:.3f}"
    )


def fitting_steps(num_bytes: int, megabits_per_second: float, most: int) -> int:
    """Steps of a round: fewer where the larger way of a step has so many bytes and the link needs long for them."""
    if not megabits_per_second:
        return most
    return min(most, max(FEWEST_STEPS, int(LINK_SECONDS * megabits_per_second / 8e-6 / num_bytes)))


def cases_of(
    name: str, codecs: Sequence[str], sizes: Sequence[int], num_parts: int, rates: Sequence[float], most_steps: int
) -> Iterator[Case]:
    """Every row of a table. Raises ConfigError."""
    model, sample_shape = build(name)
    shape = model.feature_shape(sample_shape)
    for rate, size, codec in itertools.product(rates, sizes, codecs):
        ways = codecs_of(codec)
        num_bytes = size * max(ways.feature_bytes(shape), ways.gradient_bytes(shape))
        yield Case(name, codec, size, num_parts, rate, fitting_steps(num_bytes, rate, most_steps))


def main(
    workload: Annotated[str, typer.Option(help="har, m5 or alexnet")] = "har",
    codecs: Annotated[str, typer.Option(help="of the features")] = "bf16,int8,fp8,topk(0.1)",
    batches: Annotated[str, typer.Option(help="samples per step")] = "16,64",
    parts: Annotated[int, typer.Option(min=1, max=MAX_PARTS_PER_STEP, help="parts of a step")] = 4,
    rates: Annotated[str, typer.Option(help="of the link, in Mb/s each way; 0: no limit")] = "0,100,16",
    steps: Annotated[int, typer.Option(min=2, help="steps per round; fewer over a slow link")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="repeats")] = 7,
) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes, limits = [int(text) for text in batches.split(",")], [float(text) for text in rates.split(",")]
    print("ratios: with the thread / without; medians of the repeats\n")
    print("| workload | codec | d | parts | Mb/s | step ms | step | first part out | last part out |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases_of(workload, codecs.split(","), sizes, parts, limits, steps):
        print(f"| {row(case, compare(case, repeats))} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
