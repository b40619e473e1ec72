"""Round trips of our protocol against others: `python -m benchmarks.micro.roundtrips` prints one table.

Features go up and as many bytes of gradient come back, between two processes on this machine, connected over TCP's
loopback and over a UNIX socket (ipc); what is large of ours lies in common memory, except that of "ours by socket". All
contestants (benchmarks/micro/peers.py) are connected at the same time and take turns in every repeat. Told are, of the
repeats' figures, the medians: MB/s both ways together with NUM_IN_FLIGHT messages on the way (the parts of a step), p50
and p99 of a single message and its answer, and the ratios to bare pyzmq (multipart, copy=False), each taken within a
repeat.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer

from benchmarks.micro.peers import BARE, BATCH_SIZE, CONTESTANTS, NUM_IN_FLIGHT, Client, check_contestants
from benchmarks.micro.server_process import listening
from mergesfl.processes import local_address
from mergesfl.runtime.process import keep_freed_memory

SIZES_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
ROUND_TRIPS = (20, 400)  # fewest and most per repeat
FEWEST_BURSTS = 5  # per repeat
NUM_UNCOUNTED = 3  # before each measurement
BYTES_PER_REPEAT = 256 << 20  # so many one way, within these bounds


@dataclass(frozen=True)
class Times:
    """One contestant in one repeat.

    Attributes:
        num_bytes: of a message, in each direction.
        trip_seconds: of single round trips.
        burst_seconds: until NUM_IN_FLIGHT messages sent together were all answered.
    """

    num_bytes: int
    trip_seconds: tuple[float, ...]
    burst_seconds: tuple[float, ...]

    @property
    def megabytes_per_second(self) -> float:
        """10^6 bytes per second in bursts, both directions together."""
        return 2e-6 * self.num_bytes * NUM_IN_FLIGHT * len(self.burst_seconds) / sum(self.burst_seconds)

    def microseconds(self, percentile: float) -> float:
        """This percentile of a round trip."""
        return float(1e6 * np.percentile(self.trip_seconds, percentile))


def num_round_trips(num_bytes: int) -> int:
    """Many of the small, few of the large."""
    fewest, most = ROUND_TRIPS
    return max(fewest, min(most, BYTES_PER_REPEAT // num_bytes))


def measure(client: Client, num_bytes: int, num_trips: int) -> Times:
    """Round trips one after the other, then as many in bursts; a few more come before each and do not count."""
    features = np.zeros((BATCH_SIZE, num_bytes // (4 * BATCH_SIZE)), np.float32)  # (d, F)
    labels = np.zeros(BATCH_SIZE, np.int64)  # (d,)
    trips = timed(lambda: client.exchange(features, labels), num_trips)
    bursts = timed(lambda: client.burst(features, labels), max(FEWEST_BURSTS, num_trips // NUM_IN_FLIGHT))
    return Times(num_bytes, trips, bursts)


def timed(act: Callable[[], object], num_times: int) -> tuple[float, ...]:
    """Seconds of each time; what came back is let go before the next."""
    for _ in range(NUM_UNCOUNTED):
        act()
    seconds = []
    for _ in range(num_times):
        begin_seconds = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin_seconds)
    return tuple(seconds)


@contextlib.contextmanager
def connected(name: str, transport: str) -> Iterator[Client]:
    """A client of this contestant, and its server in another process."""
    with (
        local_address(transport) as address,
        listening("benchmarks.micro.peers", name, address) as bound,
        contextlib.closing(CONTESTANTS[name].client(bound)) as client,
    ):
        yield client


def compare(
    names: Sequence[str], transport: str, sizes_bytes: Sequence[int], num_repeats: int
) -> dict[int, dict[str, list[Times]]]:
    """Of every size and contestant the times of every repeat, measured in turns."""
    times: dict[int, dict[str, list[Times]]] = {size: {name: [] for name in names} for size in sizes_bytes}
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(connected(name, transport)) for name in names}
        for _ in range(num_repeats):
            for size in sizes_bytes:
                for name, client in clients.items():
                    times[size][name].append(measure(client, size, num_round_trips(size)))
    return times


def rows(times: Mapping[int, Mapping[str, Sequence[Times]]]) -> Iterator[str]:
    """The cells of one transport, by size and contestant."""
    for size, of_size in times.items():
        for name, repeats in of_size.items():
            pairs = list(zip(repeats, of_size[BARE], strict=True))
            speed = statistics.median(mine.megabytes_per_second / bare.megabytes_per_second for mine, bare in pairs)
            latency = statistics.median(mine.microseconds(50) / bare.microseconds(50) for mine, bare in pairs)
            rate = statistics.median(one.megabytes_per_second for one in repeats)
            p50, p99 = (statistics.median(one.microseconds(p) for one in repeats) for p in (50, 99))
            yield f"{size // 1024:,} | {name} | {rate:.0f} | {p50:.0f} | {p99:.0f} | {speed:.2f} | {latency:.2f}"


def main(
    transports: Annotated[str, typer.Option(help="of tcp, ipc")] = "tcp,ipc",
    contestants: Annotated[str, typer.Option(help="bare pyzmq must be among them")] = ",".join(CONTESTANTS),
    repeats: Annotated[int, typer.Option(help="repeats of all sizes")] = 5,
) -> None:
    """Prints the table."""
    keep_freed_memory()
    names = contestants.split(",")
    check_contestants(names)
    print("| transport | KiB | contestant | MB/s | p50 us | p99 us | MB/s / bare pyzmq | p50 / bare pyzmq |")
    print("|---|---|---|---|---|---|---|---|")
    for transport in transports.split(","):
        for row in rows(compare(names, transport, SIZES_BYTES, repeats)):
            print(f"| {transport} | {row} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
