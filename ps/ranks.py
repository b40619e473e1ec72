"""The processes that share the top of one parameter server (torchrun): rank 0 has the sockets, the others follow it.

Two process groups. Commands travel over gloo, where a follower may wait for its next one as long as the server waits
for workers. Tensors travel over gloo or NCCL, and only while all ranks work on the same step: silence is an error then.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mergesfl.errors import ConfigError, TransportError
from mergesfl.runtime.devices import usable_cores
from ps.switchboard import InterruptedRunError

DESCRIBE, FORWARD, BACKWARD, END = range(4)
NUM_ARGUMENTS = 2  # of a command
# Commands: longer than any run waits for its workers; a rank that dies closes its connections and is noticed at once.
COMMAND_TIMEOUT = datetime.timedelta(days=365)
# Tensors: a rank that is silent for so long in one step of the top has stopped, or its machine is gone [ours].
STEP_TIMEOUT = datetime.timedelta(minutes=10)


def num_ranks() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether another rank has the sockets."""
    return num_ranks() > 1 and int(os.environ.get("RANK", "0")) > 0


class Ranks:
    """One process's end of the group. As a context on rank 0 it tells the followers when all is over.

    Args:
        rank: of this process, 0 leads.
        num_ranks: of the group.
        num_gpus: ranks that have a GPU of their own.
    """

    def __init__(self, rank: int, num_ranks: int, num_gpus: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_gpus = num_gpus
        self.in_step = False  # in the middle of a step, when a follower waits for tensors and reads no commands
        self._tensors: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> Ranks:
        """Meets the other ranks at the place that torchrun put into the environment.

        Raises ConfigError when the environment names no place, TransportError when nobody is there.
        """
        missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {num_ranks()}, but {', '.join(missing)} not set: start with torchrun, or unset it"
            )
        with _link("the ranks did not meet", "see whether all were started and reach MASTER_ADDR"):
            dist.init_process_group("gloo", timeout=COMMAND_TIMEOUT)
            has_gpu = torch.cuda.is_available() and _local_rank() < torch.cuda.device_count()
            gpus = torch.tensor(int(has_gpu))
            dist.all_reduce(gpus)
        return cls(dist.get_rank(), dist.get_world_size(), int(gpus))

    def require_device(self, name: str) -> None:
        """Checks the run's device. Raises ConfigError when the ranks cannot all have one like it."""
        if name == "cpu" or (name == "auto" and not self.num_gpus):
            return
        if name not in ("auto", "cuda") or self.num_gpus < self.num_ranks:
            raise ConfigError(
                f"cluster.device = '{name}' with {self.num_ranks} ranks, {self.num_gpus} of which have a GPU of their "
                "own: start as many ranks as there are GPUs with cluster.device=cuda, or set cluster.device=cpu"
            )

    def open(self, device_type: str) -> torch.device:
        """Gets ready for tensors on "cpu" or "cuda", all ranks at once; returns this rank's device."""
        with _link():
            backend = "nccl" if device_type == "cuda" else "gloo"
            group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "all ranks are in the group"
        self._tensors = group
        if device_type == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(_local_rank())
        return torch.device("cuda", _local_rank())

    def command(self, kind: int, *arguments: int) -> None:
        """Rank 0: what all followers do next."""
        numbers = [kind, *arguments, *[0] * (NUM_ARGUMENTS - len(arguments))]
        self._tell(torch.tensor(numbers))

    def next_command(self) -> tuple[int, list[int]]:
        """A follower: waits for it."""
        kind, *arguments = self._hear(1 + NUM_ARGUMENTS, torch.int64).tolist()
        return int(kind), arguments

    def tell_seeds(self, seeds: Sequence[int]) -> None:
        """Rank 0: non-negative integers below 2**64."""
        if seeds:
            self._tell(torch.tensor([seed - (seed >> 63 << 64) for seed in seeds]))  # as int64

    def hear_seeds(self, number: int) -> list[int]:
        """A follower: so many of them."""
        return [seed % 2**64 for seed in self._hear(number, torch.int64).tolist()] if number else []

    def describe(self, values: Mapping[str, Any]) -> None:
        """Rank 0: what the followers are to build."""
        data = json.dumps(values).encode()
        self.command(DESCRIBE, len(data))
        self._tell(torch.tensor(list(data), dtype=torch.uint8))

    def hear_description(self) -> dict[str, Any] | None:
        """A follower: waits for it; None when there is nothing to do."""
        kind, (length, *_) = self.next_command()
        if kind != DESCRIBE:
            return None
        values: dict[str, Any] = json.loads(bytes(self._hear(length, torch.uint8).tolist()))
        return values

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors of every follower with those of rank 0."""
        with _link():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0, group=self._tensors)
                if self.rank > 0 and whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    def send(self, tensor: Tensor, rank: int) -> dist.Work:
        """Sends a contiguous tensor on its way; keep it unchanged until the returned handle is waited for."""
        with _link():
            work = dist.isend(tensor, rank, group=self._tensors)
        assert work is not None, "this rank is in the group"
        return work

    def wait(self, works: Sequence[dist.Work]) -> None:
        """Waits until these are sent."""
        with _link():
            for work in works:
                work.wait()

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fills a contiguous tensor, and returns it."""
        with _link():
            dist.recv(tensor, rank, group=self._tensors)
        return tensor

    def add_up(self, tensor: Tensor) -> None:
        """On rank 0: replaces a contiguous tensor by the sum of those of all ranks."""
        with _link():
            dist.reduce(tensor, 0, group=self._tensors)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rank 0 says END, unless the followers would not read it: they notice when this process ends.

        torchrun stops all ranks when one has died. So an interrupted run may be one that has lost a follower: then
        TransportError says so.
        """
        try:
            if self.rank == 0 and not self.in_step:
                self.command(END)
        except TransportError:
            if isinstance(error, InterruptedRunError):
                raise
        finally:
            self._tensors = None
            dist.destroy_process_group()

    def _tell(self, tensor: Tensor) -> None:
        with _link():
            dist.broadcast(tensor, 0)

    def _hear(self, length: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(length, dtype=dtype)
        self._tell(tensor)
        return tensor


def threads_of(num_threads: int | None) -> int:
    """torch threads of this rank: as configured, or its share of the cores of its machine."""
    return num_threads or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


@contextlib.contextmanager
def _link(
    what: str = "a rank of the parameter server has ended or does not answer",
    next_step: str = "see what that rank said, then start all ranks again with --resume",
) -> Iterator[None]:
    """torch.distributed reports a lost peer as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).partition("\n")[0]  # without the place in gloo's source
        raise TransportError(f"{what} ({reason}): {next_step}") from error
