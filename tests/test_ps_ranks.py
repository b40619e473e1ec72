"""A parameter server of two real ranks under torchrun with real workers: equal to one rank, and hard to kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import load_config
from mergesfl.errors import ConfigError, TransportError
from mergesfl.methods import METHODS
from mergesfl.runtime.checkpoint import load_checkpoint
from mergesfl.runtime.process import StopFlag
from ps.following import require_merging
from ps.ranks import Ranks, is_follower, num_ranks, threads_of
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import MEASURED
from tests.processes import ROOT, SMALL, declared, free_port, is_alive, journal, kill_group, start, wait_until

PATIENCE_SECONDS = 200.0
LOOSE = MEASURED | {"observed_seconds", "idle_seconds", "ingress_bytes", "egress_bytes"}  # pings come as time goes by


def torchrun(*words: str, settings: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`torchrun --nproc-per-node=2 -m ps WORDS --set ...` in a group of its own; its output goes to the file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ps", *words]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, *(part for text in settings for part in ("--set", text))],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )


def pids_of_ranks(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of ranks 0 and 1, which torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith("RANK=")}
    return [found[rank] for rank in range(2)]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:  # asked first: torchrun's children are in groups of their own
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        kill_group(process)


def start_workers(address: str, partition: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Two workers that outlive their server, with the speeds of `declared(2)`."""
    workers = []
    for index in range(2):
        words = ["--connect", address, "--id", f"worker-{index:02d}", "--index", str(index), "--threads", "1"]
        words += ["--partition", str(partition), "--device", "cpu"]
        words += ["--declared-compute-seconds-per-sample", str(round(0.001 * (index + 1), 6))]
        words += ["--declared-transfer-seconds-per-sample", "0.0005"]
        workers.append(start("worker", *words, log=folder / f"worker-{index}.log"))
    return workers


def play_on_one_rank(settings: Sequence[str]) -> None:
    """The same run in this process, its workers as threads."""
    config = load_config(None, [*settings, "cluster.transport=memory"])
    run_cluster(config, False, False, Console(quiet=True), StopFlag())


@pytest.mark.timeout(600)
def test_two_ranks_survive_a_kill_and_a_signal_and_end_as_one_rank_does(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Rank 1 is killed, then the resumed run is stopped by SIGTERM, then resumed again to its end."""
    every = [*SMALL, *declared(2), f"output.folder={tmp_path}"]
    play_on_one_rank([*every, "name=shares", "training.num_rounds=1"])
    address, folder, log = f"tcp://127.0.0.1:{free_port()}", tmp_path / "run", tmp_path / "log"
    workers = start_workers(address, tmp_path / "shares" / "partition.npz", tmp_path)
    processes += workers
    mine = [*every, "name=run", "training.num_rounds=2000"]

    first = torchrun("--bind", address, settings=mine, log=log)
    processes.append(first)
    wait_until(lambda: len(journal(folder)) >= 2, "two rounds", PATIENCE_SECONDS)
    ranks = pids_of_ranks(first)
    os.kill(ranks[1], signal.SIGKILL)
    assert first.wait(PATIENCE_SECONDS) != 0
    assert not any(is_alive(pid) for pid in ranks)
    said = log.read_text()
    assert "error: a rank of the parameter server has ended or does not answer" in said
    assert "start all ranks again with --resume" in said
    done = len(journal(folder))
    assert load_checkpoint(folder / "checkpoints").round_num == done

    second = torchrun("--bind", address, "--resume", settings=mine, log=log)
    processes.append(second)
    wait_until(lambda: len(journal(folder)) >= done + 2, "two rounds more", PATIENCE_SECONDS)
    ranks = pids_of_ranks(second)
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait(PATIENCE_SECONDS) != 0
    assert not any(is_alive(pid) for pid in ranks)
    assert "error: stopped on request" in log.read_text()
    done = len(journal(folder))
    assert load_checkpoint(folder / "checkpoints").round_num == done

    length = f"training.num_rounds={done + 2}"
    third = torchrun("--bind", address, "--resume", settings=[*mine, length], log=log)
    processes.append(third)
    assert third.wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert all(worker.poll() is None for worker in workers)  # the same ones throughout
    play_on_one_rank([*every, "name=alone", length])
    assert largest_difference(folder, tmp_path / "alone") < 1e-3
    assert largest_difference(folder, tmp_path / "shares") > 1e-2  # they have moved
    for line, other in zip(journal(folder), journal(tmp_path / "alone"), strict=True):
        for key in line.keys() - LOOSE:
            if isinstance(line[key], float):
                assert line[key] == pytest.approx(other[key], abs=0.01), key
            else:
                assert line[key] == other[key], key


def largest_difference(one: Path, other: Path) -> float:
    """Of any parameter, between the last checkpoints of two runs."""
    a, b = (load_checkpoint(folder / "checkpoints").tensors for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rank_that_dies(port: int) -> None:
    os.environ.update(place_of_rank(1, port))
    Ranks.join().open("cpu")
    os._exit(1)


def place_of_rank(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of two."""
    facts = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in facts.items()}


def test_a_run_that_is_stopped_because_a_rank_died_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun then signals rank 0, which may be waiting for workers and has seen nothing yet."""
    port = free_port()
    other = multiprocessing.get_context("spawn").Process(target=rank_that_dies, args=(port,))
    other.start()
    for key, value in place_of_rank(0, port).items():
        monkeypatch.setenv(key, value)
    ranks = Ranks.join()
    ranks.open("cpu")
    other.join(60)
    with pytest.raises(TransportError, match="a rank of the parameter server has ended"), ranks:
        raise InterruptedRunError("stopped on request")


def test_a_refused_run_ends_all_ranks_and_says_why_once(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    settings = [*SMALL, "name=run", f"output.folder={tmp_path}", "method.name=splitfed-v1"]
    launcher = torchrun("--bind", f"tcp://127.0.0.1:{free_port()}", settings=settings, log=tmp_path / "log")
    processes.append(launcher)
    assert launcher.wait(PATIENCE_SECONDS) != 0
    said = (tmp_path / "log").read_text()
    assert said.count("error: method 'splitfed-v1' has no merged batch that several ranks could share") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [*METHODS, "central"])
def test_only_methods_that_merge_run_on_several_ranks(name: str) -> None:
    config = load_config(None, [f"method.name={name}"])
    if name in ("mergesfl", "mergesfl+", "minibatch-sfl", "scala", "gpsl"):
        require_merging(config)
        return
    with pytest.raises(ConfigError, match=f"'{name}' has no merged batch .* one of mergesfl, mergesfl\\+, minibatch"):
        require_merging(config)


def test_several_ranks_keep_one_graph_each() -> None:
    require_merging(load_config(None, ["training.merge=streaming"]))
    with pytest.raises(ConfigError, match="'streaming-in-order' keeps the top's graph of every worker"):
        require_merging(load_config(None, ["training.merge=streaming-in-order"]))


def test_mergesfl_without_merging_has_a_top_per_worker() -> None:
    with pytest.raises(ConfigError, match="'mergesfl without merging' has no merged batch"):
        require_merging(load_config(None, ["method.merging=false"]))


@pytest.mark.parametrize(
    ("name", "num_gpus", "is_legal"),
    [
        *(("cpu", 0, True), ("cpu", 2, True), ("auto", 0, True), ("auto", 2, True), ("cuda", 2, True)),
        *(("auto", 1, False), ("cuda", 1, False), ("cuda", 0, False), ("cuda:1", 2, False)),
    ],
)
def test_every_rank_has_a_gpu_of_its_own_or_none_has(name: str, num_gpus: int, is_legal: bool) -> None:
    ranks = Ranks(0, 2, num_gpus)
    if is_legal:
        ranks.require_device(name)
        return
    with pytest.raises(ConfigError, match=f"'{name}' with 2 ranks, {num_gpus} of which have a GPU"):
        ranks.require_device(name)


def test_what_torchrun_puts_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    assert num_ranks() == 1 and not is_follower()
    alone = threads_of(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert num_ranks() == 2 and not is_follower()
    assert threads_of(None) == max(1, alone // 2) and threads_of(5) == 5
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"):
        Ranks.join()
    monkeypatch.setenv("RANK", "1")
    assert is_follower()
