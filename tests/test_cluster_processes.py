"""Whole clusters of real processes over real sockets: equal to the bit, and hard to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import load_config
from mergesfl.protocol.codec import encode
from mergesfl.protocol.layout import Frame
from mergesfl.protocol.messages import PROTOCOL_VERSION, Features, Leave, Ping, Ready, Register, Update
from mergesfl.runtime.checkpoint import load_checkpoint
from mergesfl.runtime.process import StopFlag
from mergesfl.transport.area import Area
from mergesfl.transport.shared import SharedMemory
from tests.memory_cluster import MEASURED
from tests.processes import SMALL, declared, free_port, is_alive, journal, kill_group, run, start, wait_until


def play(tmp_path: Path, name: str, *settings: str) -> Path:
    """One small run in this process, with its workers wherever the transport puts them; returns its folder."""
    every = [*SMALL, *declared(3), f"name={name}", f"output.folder={tmp_path}", "training.num_rounds=3", *settings]
    run_cluster(load_config(None, every), False, False, Console(quiet=True), StopFlag())
    return tmp_path / name


def same_parameters(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same parameters, to the bit."""
    a, b = (load_checkpoint(folder / "checkpoints") for folder in (one, other))
    assert a.round_num == b.round_num
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    return play(tmp_path, "memory", "cluster.transport=memory")


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_processes_give_the_same_parameters_as_memory_to_the_bit(
    tmp_path: Path, undisturbed: Path, transport: str
) -> None:
    other = play(tmp_path, transport, f"cluster.transport={transport}")
    assert same_parameters(undisturbed, other)
    # A planted difference is seen: another seed gives other parameters.
    seeded = play(tmp_path, "seeded", "cluster.transport=memory", "seed=1")
    assert not same_parameters(undisturbed, seeded)
    for one, two in zip(journal(undisturbed), journal(other), strict=True):
        # Pings and pongs come as time goes by, so bytes may differ by a few of them; all decisions are equal.
        loose = {"ingress_bytes", "egress_bytes"} | MEASURED
        assert {k: v for k, v in one.items() if k not in loose} == {k: v for k, v in two.items() if k not in loose}


def test_what_lies_in_common_memory_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and gradients of a real run, in parts, many large enough to lie there, in both directions."""
    wide = (
        "model.cut=conv1",
        "training.batch_size=64",
        "training.parts_per_step=2",
        "training.merge=streaming-in-order",
    )
    one = play(tmp_path, "memory", "cluster.transport=memory", *wide)
    num_bytes = {"read": 0, "written": 0}
    view, put = SharedMemory._view, Area.put

    def counted_view(shared: SharedMemory, offset: int, size: int) -> memoryview:
        num_bytes["read"] += size
        return view(shared, offset, size)

    def counted_put(area: Area, frame: Frame, size: int) -> int | None:
        num_bytes["written"] += size
        return put(area, frame, size)

    monkeypatch.setattr(SharedMemory, "_view", counted_view)
    monkeypatch.setattr(Area, "put", counted_put)
    other = play(tmp_path, "ipc", "cluster.transport=ipc", *wide)
    assert same_parameters(one, other)
    for what, field in (("read", "ingress_bytes"), ("written", "egress_bytes")):
        assert num_bytes[what] > sum(line[field] for line in journal(other)) / 4  # the rest: small parts, states


def test_a_surveyed_run_is_the_same_over_memory_and_sockets_to_the_bit(tmp_path: Path, undisturbed: Path) -> None:
    """With declared speeds the reports are equal, and with them plans and parameters; only the first plan, which knew
    nothing of any speed, is another one than without the survey."""
    survey = "control.survey_every_rounds=2"
    one = play(tmp_path, "surveyed", "cluster.transport=memory", survey)
    other = play(tmp_path, "sockets", "cluster.transport=ipc", survey)
    assert same_parameters(one, other)
    loose = {"ingress_bytes", "egress_bytes"} | MEASURED
    for line, again in zip(journal(one), journal(other), strict=True):
        assert {k: v for k, v in line.items() if k not in loose} == {k: v for k, v in again.items() if k not in loose}
        assert (line["survey_seconds"] > 0) is (again["survey_seconds"] > 0) is (line["round_num"] % 2 == 0)
    assert journal(one)[0]["predicted_seconds"] != journal(undisturbed)[0]["predicted_seconds"]


def test_streaming_in_order_is_the_same_over_memory_and_sockets_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever comes first: threads, processes. Another policy gives other dropout masks, and other parameters."""
    one = play(tmp_path, "streamed", "cluster.transport=memory", "training.merge=streaming-in-order")
    assert "draws the top's dropout masks for each worker and part on its own" in caplog.text
    other = play(tmp_path, "sockets", "cluster.transport=tcp", "training.merge=streaming-in-order")
    assert same_parameters(one, other)
    loose = {"ingress_bytes", "egress_bytes"} | MEASURED
    for line, again in zip(journal(one), journal(other), strict=True):
        assert {k: v for k, v in line.items() if k not in loose} == {k: v for k, v in again.items() if k not in loose}
    assert not same_parameters(one, play(tmp_path, "memory", "cluster.transport=memory"))


def test_steps_in_parts_are_the_same_over_memory_and_sockets_to_the_bit(tmp_path: Path) -> None:
    """In order, whoever comes first: threads, processes; with codecs that draw. Unsplit steps give other masks."""
    settings = ("training.merge=streaming-in-order", "codec.features=int8", "codec.gradients=fp16")
    parts = "training.parts_per_step=3"
    one = play(tmp_path, "memory", "cluster.transport=memory", *settings, parts)
    other = play(tmp_path, "sockets", "cluster.transport=tcp", *settings, parts)
    assert same_parameters(one, other)
    loose = {"ingress_bytes", "egress_bytes"} | MEASURED
    for line, again in zip(journal(one), journal(other), strict=True):
        assert {k: v for k, v in line.items() if k not in loose} == {k: v for k, v in again.items() if k not in loose}
        assert line["dropped"] == [] and line["samples_trained"] == sum(line["batch_sizes"]) * 3  # tau
    assert not same_parameters(one, play(tmp_path, "unsplit", "cluster.transport=memory", *settings))


def test_ten_thousand_mutated_messages_do_not_disturb_a_live_server(tmp_path: Path) -> None:
    """Peers without samples may register, so they are never chosen; whatever they say then, the run is the same."""
    rounds = "training.num_rounds=80"
    reference = play(tmp_path, "undisturbed", "cluster.transport=memory", rounds)
    folder = tmp_path / "attacked"
    num_rounds_when_done: list[int] = []

    def attack() -> None:
        """In bursts, one per closed round: so that it trains while it is attacked."""
        wait_until(lambda: len(journal(folder)) >= 1, "the first round")
        address = json.loads((folder / "cluster.json").read_text())["address"]
        for burst in send_mutations(address, number=10_000, burst=400):
            before = len(journal(folder))
            wait_until(lambda before=before: len(journal(folder)) > before, f"a round after burst {burst}")
        num_rounds_when_done.append(len(journal(folder)))

    attacker = threading.Thread(target=attack)
    attacker.start()
    play(tmp_path, "attacked", "cluster.transport=tcp", rounds)
    attacker.join()
    assert 25 < num_rounds_when_done[0] < 80
    assert same_parameters(reference, folder)
    assert all(not line["dropped"] for line in journal(folder))


def send_mutations(address: str, number: int, burst: int) -> Iterator[int]:
    """Sends damaged messages from twenty peers, half of which have registered properly before; yields after a burst."""
    rng = np.random.default_rng(0)
    seeds = [
        encode(Register("mallory", PROTOCOL_VERSION, "cpu", {"mergesfl": "0"}, 0, (), (), (1, 8, 8))),
        encode(Ready((32, 2, 2), 512)),
        encode(Features(0, 0, np.zeros((2, 32, 2, 2), np.float32), np.zeros(2, np.int64))),
        encode(Update(0, 3, 0.1, 0.1, {"w": np.zeros(3, np.float32)}, {})),
        encode(Ping()),
        encode(Leave("x")),
    ]
    context = zmq.Context()
    sockets = []
    for index in range(20):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 5000)
        socket.connect(address)
        if index % 2:
            mine = Register(f"mallory-{index}", PROTOCOL_VERSION, "cpu", {}, 0, (), (), (1, 8, 8))
            socket.send_multipart([bytes(frame) for frame in encode(mine)])
        sockets.append(socket)
    for count in range(number):
        frames = [bytearray(frame) for frame in seeds[int(rng.integers(len(seeds)))]]
        for _ in range(int(rng.integers(1, 6))):
            victim = frames[int(rng.integers(len(frames)))]
            if victim:
                victim[int(rng.integers(len(victim)))] ^= 1 << int(rng.integers(8))
        if rng.random() < 0.2:
            frames.append(bytearray(rng.bytes(20)))
        if rng.random() < 0.1 and len(frames) > 1:
            frames.pop()
        sockets[count % 20].send_multipart([bytes(frame) for frame in frames])
        if (count + 1) % burst == 0:
            yield count // burst
    for socket in sockets:
        socket.close()
    context.term()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        kill_group(process)


@pytest.mark.parametrize(("merge", "parts"), [("barrier", 1), ("streaming", 1), ("streaming", 3)])
def test_two_killed_workers_do_not_stop_the_run_and_one_joins_again(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]], merge: str, parts: int
) -> None:
    folder = tmp_path / "killed"
    settings = [
        *SMALL,
        *(f"{key}" for key in ("name=killed", f"output.folder={tmp_path}", "data.partition=iid")),
        *("cluster.num_workers=5", "training.num_rounds=400", "training.local_steps=10", f"training.merge={merge}"),
        f"training.parts_per_step={parts}",
    ]
    cluster = start("run", settings=settings, log=tmp_path / "log")
    processes.append(cluster)
    wait_until(lambda: len(journal(folder)) >= 3, "three rounds")
    place = json.loads((folder / "cluster.json").read_text())
    for name in ("worker-01", "worker-03"):
        os.kill(place["worker_pids"][name], signal.SIGKILL)
    before = len(journal(folder))
    wait_until(lambda: len(journal(folder)) >= before + 5, "five rounds without the two")
    after_kill = journal(folder)[-1]
    assert set(after_kill["worker_ids"]) == {"worker-00", "worker-02", "worker-04"}
    words = ["--connect", place["address"], "--id", "worker-01", "--partition", str(folder / "partition.npz")]
    processes.append(start("worker", *words, "--index", "1", "--once", "--threads", "1", log=tmp_path / "again"))
    wait_until(lambda: "worker-01" in journal(folder)[-1]["finished_worker_ids"], "the restarted worker in a round")
    assert cluster.poll() is None
    os.kill(cluster.pid, signal.SIGTERM)
    assert cluster.wait(60) == 130
    assert processes[1].wait(60) == 0  # --once: the goodbye ends it
    assert not any(is_alive(pid) for pid in place["worker_pids"].values())


def test_workers_outlive_a_killed_server_and_the_resumed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    num_rounds = 12
    reference = play(tmp_path, "reference", "cluster.transport=memory", f"training.num_rounds={num_rounds}")
    address = f"tcp://127.0.0.1:{free_port()}"
    every = [*SMALL, *declared(3), "name=server", f"output.folder={tmp_path}", f"training.num_rounds={num_rounds}"]
    workers = []
    for index in range(3):
        words = ["--connect", address, "--id", f"worker-{index:02d}", "--index", str(index), "--threads", "1"]
        words += ["--partition", str(reference / "partition.npz"), "--device", "cpu"]
        words += ["--declared-compute-seconds-per-sample", str(round(0.001 * (index + 1), 6))]
        words += ["--declared-transfer-seconds-per-sample", "0.0005"]
        workers.append(start("worker", *words, log=tmp_path / f"worker-{index}.log"))
    processes += workers
    first = start("ps", "--bind", address, settings=every, log=tmp_path / "first.log")
    processes.append(first)
    wait_until(lambda: len(journal(tmp_path / "server")) >= 2, "two rounds")
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    done = len(journal(tmp_path / "server"))
    assert done < num_rounds, "the server was killed too late to show anything"
    second = start("ps", "--bind", address, "--resume", settings=every, log=tmp_path / "second.log")
    processes.append(second)
    assert second.wait(120) == 0, (tmp_path / "second.log").read_text()
    assert len(journal(tmp_path / "server")) == num_rounds
    assert same_parameters(reference, tmp_path / "server")
    assert all(worker.poll() is None for worker in workers)  # the same processes, waiting for the next run
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert [worker.wait(20) for worker in workers] == [0, 0, 0]


def test_ctrl_c_ends_everything_and_resume_finishes_the_run(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    every = [*SMALL, *declared(3), "name=run", f"output.folder={tmp_path}", "training.num_rounds=300"]
    cluster = start("run", settings=every, log=tmp_path / "log")
    processes.append(cluster)
    wait_until(lambda: len(journal(tmp_path / "run")) >= 2, "two rounds")
    pids = json.loads((tmp_path / "run" / "cluster.json").read_text())["worker_pids"].values()
    os.killpg(cluster.pid, signal.SIGINT)  # as a terminal does
    assert cluster.wait(60) == 130
    assert "--resume" in (tmp_path / "log").read_text()
    assert not any(is_alive(pid) for pid in pids)
    done = len(journal(tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "checkpoints").round_num == done
    resumed = run("run", "--resume", settings=[*every, f"training.num_rounds={done + 2}"])
    assert resumed.returncode == 0, resumed.stderr
    assert [line["round_num"] for line in journal(tmp_path / "run")] == list(range(done + 2))


def test_workers_end_when_the_process_that_started_them_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    every = [*SMALL, *declared(3), "name=run", f"output.folder={tmp_path}", "training.num_rounds=300"]
    cluster = start("run", settings=every, log=tmp_path / "log")
    processes.append(cluster)
    wait_until(lambda: len(journal(tmp_path / "run")) >= 1, "one round")
    pids = json.loads((tmp_path / "run" / "cluster.json").read_text())["worker_pids"].values()
    os.kill(cluster.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "the end of the workers", 30)


def test_workers_that_cannot_start_are_reported_with_their_last_words(tmp_path: Path) -> None:
    settings = [*SMALL, *declared(2), "name=run", f"output.folder={tmp_path}", "cluster.worker_device=cuda:7"]
    ended = run("run", settings=settings)
    assert ended.returncode == 3
    assert "all 2 worker processes have ended; worker-00 said: error:" in ended.stderr
    assert "cuda" in ended.stderr
