"""`mergesfl simulate`: durations by hand, the parameters of a real run to the bit, the same journal twice, traces."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from mergesfl.cluster import run_cluster
from mergesfl.config import RunConfig
from mergesfl.errors import ConfigError, QuorumError
from mergesfl.processes import profile_names
from mergesfl.runtime.process import StopFlag
from mergesfl.simulation.fleet import top_flops_per_sample, with_fleet
from mergesfl.simulation.run import simulate
from ps.run import build_network
from ps.switchboard import InterruptedRunError
from tests.memory_cluster import FEATURE_BYTES, checkpoint_of, journal_of, same_tensors, small_config, without

RATE_BYTES_PER_SECOND = 125_000.0  # 1 Mb/s
LATENCY_SECONDS = 0.01
OVERHEAD_SECONDS = 0.05
FLOPS_PER_SECOND = 1e7
PS_FLOPS_PER_SECOND = 1e8

# The cnn on 1 x 8 x 8 samples and 3 classes, a multiply-add as two: 2 * Cin * 9 * Cout * pixels.
CONV1_FLOPS, CONV2_FLOPS, CONV3_FLOPS = 2 * 1 * 9 * 12 * 64, 2 * 12 * 9 * 32 * 16, 2 * 32 * 9 * 64 * 4
BOTTOM_FORWARD_FLOPS = CONV1_FLOPS + CONV2_FLOPS
BOTTOM_BACKWARD_FLOPS = CONV1_FLOPS + 2 * CONV2_FLOPS  # nobody asks for the gradient of the input
TOP_FORWARD_FLOPS = CONV3_FLOPS + 2 * 256 * 1024 + 2 * 1024 * 3
TOP_FLOPS = 3 * TOP_FORWARD_FLOPS  # its input's gradient goes back to the worker
FULL_FLOPS = BOTTOM_FORWARD_FLOPS + BOTTOM_BACKWARD_FLOPS + TOP_FLOPS


def write_profile(folder: Path, jitter: float = 0.0, mbit_per_second: tuple[float, float] = (1.0, 1.0)) -> Path:
    """A device of one power mode whose every figure stands above."""
    path = folder / "plain.toml"
    path.write_text(
        f'name = "plain"\nsource = "this test"\npeak_flops_per_second = {2 * FLOPS_PER_SECOND}\nefficiency = 0.5\n'
        f"power_modes = [1.0]\nstep_overhead_seconds = {OVERHEAD_SECONDS}\n"
        f"link_mbit_per_second = {list(mbit_per_second)}\nlink_latency_seconds = {LATENCY_SECONDS}\n"
        f"compute_jitter = {jitter}\nlink_jitter = {jitter}\nredraw_every_rounds = 2\nmemory_bytes = 1000000000\n"
    )
    return path


def config_of(tmp_path: Path, *settings: str, num_workers: int = 3, **profile: object) -> RunConfig:
    path = write_profile(tmp_path, **profile)  # type: ignore[arg-type]
    return small_config(
        tmp_path,
        f'simulation.fleet={{"{path}" = 1}}',
        f"simulation.ps_flops_per_second={PS_FLOPS_PER_SECOND}",
        "simulation.ps_link_mbit_per_second=1000.0",
        f"cluster.num_workers={num_workers}",
        *settings,
    )


def play(config: RunConfig, resume: bool = False) -> None:
    simulate(config, resume, not resume, Console(quiet=True), StopFlag())


def test_the_flops_of_the_top_by_hand(tmp_path: Path) -> None:
    from mergesfl.data import load_dataset

    config = config_of(tmp_path)
    dataset = load_dataset(config.data.dataset)
    assert top_flops_per_sample(build_network(config, dataset), dataset.sample_shape) == TOP_FLOPS


@pytest.mark.parametrize(
    ("codecs", "bytes_per_number"), [((), 4 + 4), (("codec.features=int8", "codec.gradients=fp16"), 1 + 2)]
)
def test_a_split_round_by_hand(tmp_path: Path, codecs: tuple[str, ...], bytes_per_number: int) -> None:
    """One worker, tau = 2, d = 40: assign, forward, up, top, down, backward + forward, up, top, down, backward, update.

    Bytes are the journal's; pings and pongs are too small to be carried by the link, a few dozen bytes of them count.
    """
    config = config_of(
        tmp_path, "method.name=splitfed-v1", "training.num_rounds=1", "training.batch_size=40", *codecs, num_workers=1
    )
    play(config)
    (line,) = journal_of(config)
    carried_seconds = (line["ingress_bytes"] + line["egress_bytes"]) / RATE_BYTES_PER_SECOND
    latency_seconds = 6 * LATENCY_SECONDS  # assign, 2 features, 2 gradients, update
    worker_flops = 2 * 40 * (BOTTOM_FORWARD_FLOPS + BOTTOM_BACKWARD_FLOPS)
    worker_seconds = 3 * OVERHEAD_SECONDS + worker_flops / FLOPS_PER_SECOND  # 3 stretches
    ps_seconds = 2 * 40 * TOP_FLOPS / PS_FLOPS_PER_SECOND
    expected_seconds = carried_seconds + latency_seconds + worker_seconds + ps_seconds
    assert line["round_seconds"] == pytest.approx(expected_seconds, abs=100 / RATE_BYTES_PER_SECOND)
    # what the worker reports: its own computing, and features and gradients on the link; not the waiting for the server
    model_seconds = latency_seconds / 3 + (carried_seconds - 2 * 40 * 32 * 4 * bytes_per_number / RATE_BYTES_PER_SECOND)
    assert line["observed_seconds"][0] == pytest.approx(expected_seconds - ps_seconds - model_seconds, rel=0.02)
    assert line["idle_seconds"] == 0.0


def test_streaming_saves_the_slowest_worker_the_computing_for_the_other_by_hand(tmp_path: Path) -> None:
    """Two workers, tau = 2, d = 8 each; one at 1 Mb/s, one at 2 Mb/s: its 16 KiB of features are there 65 ms earlier,
    and the top takes 16 ms for them. At the barrier the slow one waits for the top over 16 samples in each step,
    streaming for the top over its own 8: for the other's the server has computed before, or does so afterwards."""
    flops_per_second = 10 * PS_FLOPS_PER_SECOND
    lines = {}
    for merge in ("barrier", "streaming", "streaming-in-order"):
        trace = tmp_path / "bandwidth.csv"
        trace.write_text("worker_id,seconds,mbit_per_second\nworker-01,0,2.0\n", encoding="utf-8")
        settings = (f"training.merge={merge}", "method.regulation=false", "training.num_rounds=1", f"name={merge}")
        world = (f"simulation.bandwidth_trace={trace}", f"simulation.ps_flops_per_second={flops_per_second}")
        config = config_of(tmp_path, *settings, *world, num_workers=2)
        play(config)
        (lines[merge],) = journal_of(config)
    step_seconds = 8 * TOP_FLOPS / flops_per_second  # of the top over the samples of one worker
    for merge in ("streaming", "streaming-in-order"):
        saved_seconds = lines["barrier"]["round_seconds"] - lines[merge]["round_seconds"]
        assert saved_seconds == pytest.approx(2 * step_seconds, abs=100 / RATE_BYTES_PER_SECOND)  # pings
        saved_waiting_seconds = lines["barrier"]["waiting_seconds"] - lines[merge]["waiting_seconds"]
        assert saved_waiting_seconds == pytest.approx(2 * step_seconds, abs=100 / RATE_BYTES_PER_SECOND)


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("mbit_per_second", [0.1, 1.0])
def test_a_round_in_parts_by_hand(tmp_path: Path, num_parts: int, mbit_per_second: float) -> None:
    """One worker, tau = 1, d = 40, a server that computes in no time.

    At 0.1 Mb/s a part's way takes longer than its forward or backward: after the first forward the parts go up one
    behind the other, the last comes down when it is there, and goes backward: P + 1 ways instead of 2 P.
    At 1 Mb/s its ways there and back take less than a forward or backward: all that is to be seen is computing.
    The worker reports what it computed, and as transfer what the step took beyond that. Labels and headers are small.
    """
    settings = ("training.merge=streaming", f"training.parts_per_step={num_parts}", "training.local_steps=1")
    world = ("simulation.ps_flops_per_second=1e15", "method.regulation=false", "training.num_rounds=1")
    link = (mbit_per_second, mbit_per_second)
    config = config_of(tmp_path, *settings, *world, "training.batch_size=40", num_workers=1, mbit_per_second=link)
    play(config)
    (line,) = journal_of(config)
    size, bytes_per_second = 40 // num_parts, mbit_per_second * RATE_BYTES_PER_SECOND
    way_seconds = size * FEATURE_BYTES / bytes_per_second
    forward_seconds = OVERHEAD_SECONDS + size * BOTTOM_FORWARD_FLOPS / FLOPS_PER_SECOND
    backward_seconds = OVERHEAD_SECONDS + size * BOTTOM_BACKWARD_FLOPS / FLOPS_PER_SECOND
    if mbit_per_second < 1.0:
        assert way_seconds > max(forward_seconds, backward_seconds)
        step_seconds = forward_seconds + (num_parts + 1) * way_seconds + 2 * LATENCY_SECONDS + backward_seconds
    else:
        assert 2 * (way_seconds + LATENCY_SECONDS) < min(forward_seconds, backward_seconds)
        step_seconds = num_parts * (forward_seconds + backward_seconds)
    slack_seconds = (num_parts + 1) * (150 + 8 * size) / bytes_per_second
    assert step_seconds - 1e-9 <= line["observed_seconds"][0] <= step_seconds + slack_seconds
    model_bytes = 2 * 4 * ((9 + 1) * 12 + (12 * 9 + 1) * 32)  # of the bottom, down and up
    model_seconds = model_bytes / bytes_per_second + 2 * LATENCY_SECONDS
    left_seconds = line["round_seconds"] - model_seconds - line["observed_seconds"][0]
    assert 0.0 <= left_seconds <= 2 * 500 / bytes_per_second  # headers of the two models
    assert line["waiting_seconds"] == pytest.approx(0.0, abs=1e-6)


def test_who_waits_for_others_in_parts_reports_the_same_as_who_does_not(tmp_path: Path) -> None:
    """One link is eight times as fast as the other: its worker waits in every step but the first for the parts of the
    other. What it reports is what it reports when it is alone. Device and batch are the same."""
    observed = {}
    for num_workers in (1, 2):
        trace = tmp_path / f"bandwidth-{num_workers}.csv"
        fast = f"worker-{num_workers - 1:02d}"
        trace.write_text(f"worker_id,seconds,mbit_per_second\n{fast},0,0.8\n", encoding="utf-8")
        settings = ("training.merge=streaming", "training.parts_per_step=2", f"name={num_workers}-workers")
        world = (f"simulation.bandwidth_trace={trace}", "simulation.ps_flops_per_second=1e15")
        plan = ("method.regulation=false", "training.num_rounds=1", "training.local_steps=5")
        every = (*settings, *world, *plan, "training.batch_size=20")
        config = config_of(tmp_path, *every, num_workers=num_workers, mbit_per_second=(0.1, 0.1))
        play(config)
        (line,) = journal_of(config)
        observed[num_workers] = line["observed_seconds"][-1]
        assert (line["waiting_seconds"] > 1.0) is (num_workers == 2)
    assert observed[2] == pytest.approx(observed[1], rel=0.02)


def test_a_federated_round_by_hand(tmp_path: Path) -> None:
    """The whole network down, two steps of forward and backward, the whole network up."""
    config = config_of(tmp_path, "method.name=fedavg", "training.num_rounds=1", num_workers=1)
    play(config)
    (line,) = journal_of(config)
    carried_seconds = (line["ingress_bytes"] + line["egress_bytes"]) / RATE_BYTES_PER_SECOND
    worker_seconds = 2 * (OVERHEAD_SECONDS + 8 * FULL_FLOPS / FLOPS_PER_SECOND)
    expected_seconds = carried_seconds + 2 * LATENCY_SECONDS + worker_seconds
    assert line["round_seconds"] == pytest.approx(expected_seconds, abs=100 / RATE_BYTES_PER_SECOND)


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2", "fedavg"])
def test_it_trains_as_a_real_run_does_to_the_bit(tmp_path: Path, method: str) -> None:
    """These methods' plans do not depend on speeds, so the parameters must not depend on the clock."""
    settings = (f"method.name={method}", "control.participants_per_round=2")
    simulated = config_of(tmp_path, *settings, "name=simulated", jitter=0.2, mbit_per_second=(1.0, 30.0))
    real = small_config(tmp_path, *settings, "name=real")
    play(simulated)
    run_cluster(real, False, False, Console(quiet=True), StopFlag())
    assert same_tensors(checkpoint_of(simulated), checkpoint_of(real))
    assert [line["accuracy"] for line in journal_of(simulated)] == [line["accuracy"] for line in journal_of(real)]
    other = config_of(tmp_path, *settings, "name=other", "seed=1")
    play(other)
    assert not same_tensors(checkpoint_of(simulated), checkpoint_of(other))


def test_two_runs_leave_the_same_journal(tmp_path: Path) -> None:
    """Everything in it, every second included; another seed gives another one."""
    every = ("training.num_rounds=4", "control.participants_per_round=3")
    texts = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        config = config_of(
            tmp_path, *every, f"name={name}", f"seed={seed}", num_workers=6, jitter=0.2, mbit_per_second=(1.0, 30.0)
        )
        play(config)
        texts.append((config.run_folder / "journal.jsonl").read_bytes())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_resumed_simulation_ends_with_the_same_parameters(tmp_path: Path) -> None:
    settings = ("method.name=splitfed-v1", "control.participants_per_round=2")
    whole = config_of(tmp_path, *settings, "name=whole", "training.num_rounds=4", mbit_per_second=(1.0, 30.0))
    play(whole)
    play(config_of(tmp_path, *settings, "name=parts", "training.num_rounds=2", mbit_per_second=(1.0, 30.0)))
    parts = config_of(tmp_path, *settings, "name=parts", "training.num_rounds=4", mbit_per_second=(1.0, 30.0))
    play(parts, resume=True)
    assert same_tensors(checkpoint_of(whole), checkpoint_of(parts))
    one, other = (without(journal_of(config), "ingress_bytes") for config in (whole, parts))
    for line, again in zip(one, other, strict=True):
        assert line["round_seconds"] == pytest.approx(again["round_seconds"], rel=1e-6)


def test_a_worker_that_leaves_is_dropped_and_takes_part_again_when_it_is_back(tmp_path: Path) -> None:
    plain = config_of(tmp_path, "method.name=splitfed-v1", "training.num_rounds=6")
    play(plain)
    begin_seconds = journal_of(plain)[0]["round_seconds"] + 0.1  # registering takes a little, too
    round_seconds = journal_of(plain)[1]["round_seconds"]
    trace = tmp_path / "availability.csv"
    away_seconds, back_seconds = begin_seconds + 0.5 * round_seconds, begin_seconds + 3.2 * round_seconds
    trace.write_text(
        f"worker_id,seconds,available\nworker-01,{away_seconds},0\nworker-01,{back_seconds},1\n", encoding="utf-8"
    )
    config = config_of(
        tmp_path,
        "name=traced",
        "method.name=splitfed-v1",
        "training.num_rounds=6",
        f"simulation.availability_trace={trace}",
    )
    play(config)
    lines = journal_of(config)
    finished = ["worker-01" in line["finished_worker_ids"] for line in lines]
    assert finished[0] and not finished[1] and finished[-1]
    lost = [(line["round_num"], one["worker_id"]) for line in lines for one in line["dropped"]]
    assert lost == [(1, "worker-01")]  # later rounds do not even plan with it
    assert all(line["attempt"] == 1 for line in lines)  # two of three are a quorum
    # a power cut is noticed by a probe, within a second, and costs no step deadline of 60 s
    assert max(line["round_seconds"] for line in lines) < round_seconds + 1.5


def test_a_worker_that_is_away_at_first_joins_later(tmp_path: Path) -> None:
    trace = tmp_path / "availability.csv"
    trace.write_text("worker_id,seconds,available\nworker-02,0,0\nworker-02,3.0,1\n", encoding="utf-8")
    config = config_of(
        tmp_path,
        "method.name=fedavg",
        "training.num_rounds=4",
        "cluster.start_deadline_seconds=1.0",
        f"simulation.availability_trace={trace}",
    )
    play(config)
    took_part = ["worker-02" in line["worker_ids"] for line in journal_of(config)]
    assert not took_part[0] and took_part[-1]


def test_a_bandwidth_trace_is_followed(tmp_path: Path) -> None:
    """From 0 s on at 2 Mb/s instead of 1: carrying takes half as long, the rest is the same."""
    settings = ("method.name=fedavg", "training.num_rounds=1")
    slow = config_of(tmp_path, *settings, "name=slow", num_workers=1)
    play(slow)
    trace = tmp_path / "bandwidth.csv"
    trace.write_text("worker_id,seconds,mbit_per_second\nworker-00,0,2.0\n", encoding="utf-8")
    fast = config_of(tmp_path, *settings, "name=fast", f"simulation.bandwidth_trace={trace}", num_workers=1)
    play(fast)
    (one,), (two,) = journal_of(slow), journal_of(fast)
    saved_seconds = 0.5 * (one["ingress_bytes"] + one["egress_bytes"]) / RATE_BYTES_PER_SECOND
    assert one["round_seconds"] - two["round_seconds"] == pytest.approx(saved_seconds, rel=1e-3)


def test_a_trace_of_an_unknown_worker_is_refused_before_anything_starts(tmp_path: Path) -> None:
    trace = tmp_path / "bandwidth.csv"
    trace.write_text("worker_id,seconds,mbit_per_second\nworker-77,0,2.0\n", encoding="utf-8")
    config = config_of(tmp_path, f"simulation.bandwidth_trace={trace}")
    with pytest.raises(ConfigError, match=r"worker-77.*worker-00 to worker-02"):
        play(config)
    assert not config.run_folder.exists()


def test_the_shared_link_of_the_server_slows_all_down(tmp_path: Path) -> None:
    """Three workers at 1 Mb/s through a server with 1 Mb/s: everything large takes three times as long."""
    settings = ("method.name=fedavg", "training.num_rounds=1")
    wide = config_of(tmp_path, *settings, "name=wide")
    narrow = config_of(tmp_path, *settings, "name=narrow", "simulation.ps_link_mbit_per_second=1.0")
    play(wide)
    play(narrow)
    (one,), (two,) = journal_of(wide), journal_of(narrow)
    carried_seconds = (one["ingress_bytes"] + one["egress_bytes"]) / 3 / RATE_BYTES_PER_SECOND  # of one worker
    assert two["round_seconds"] - one["round_seconds"] == pytest.approx(2 * carried_seconds, rel=1e-3)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, "method.name=splitfed-v1", "training.num_rounds=50")
    network_calls = 0

    class StopSoon(StopFlag):
        def is_set(self) -> bool:
            nonlocal network_calls
            network_calls += 1
            return network_calls > 100 or super().is_set()

    stop = StopSoon()
    with pytest.raises(InterruptedRunError, match="--resume"):
        simulate(config, False, True, Console(quiet=True), stop)
    assert 1 <= len(journal_of(config)) < 50
    assert checkpoint_of(config).round_num == len(journal_of(config))


def test_workers_that_cannot_take_part_end_the_run_with_a_reason(tmp_path: Path) -> None:
    trace = tmp_path / "availability.csv"
    trace.write_text(
        "worker_id,seconds,available\n" + "".join(f"worker-0{i},0,0\n" for i in range(3)), encoding="utf-8"
    )
    config = config_of(tmp_path, f"simulation.availability_trace={trace}", "cluster.start_deadline_seconds=5.0")
    with pytest.raises(QuorumError, match="0 of 3 workers"):
        play(config)


def test_a_silent_configuration_means_the_papers_80_devices() -> None:
    config = with_fleet(RunConfig())
    names = profile_names(config)
    assert config.cluster.num_workers == len(names) == 80
    assert [names.count(name) for name in ("jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier")] == [30, 40, 10]


def test_a_fleet_that_is_named_says_how_many_unless_the_cluster_does() -> None:
    named = with_fleet(RunConfig.model_validate({"simulation": {"fleet": {"raspberry-pi-5": 7}}}))
    assert named.cluster.num_workers == 7
    both = {"cluster": {"num_workers": 10_000}, "simulation": {"fleet": {"jetson-tx2": 3, "jetson-orin-nx": 1}}}
    scaled = with_fleet(RunConfig.model_validate(both))
    assert profile_names(scaled).count("jetson-tx2") == 7_500


def test_a_device_that_is_too_small_for_the_bottom_is_refused(tmp_path: Path) -> None:
    """conv1 and conv2 have 12 * 10 + 32 * 109 = 3,608 parameters: 14,432 bytes, and as many of gradients."""
    config = config_of(tmp_path)
    path = tmp_path / "plain.toml"
    path.write_text(path.read_text().replace("memory_bytes = 1000000000", "memory_bytes = 28863"))
    with pytest.raises(ConfigError, match=r"28864 bytes.* has 28863"):
        play(config)


def test_an_unknown_profile_is_named_with_the_known_ones(tmp_path: Path) -> None:
    config = small_config(tmp_path, 'simulation.fleet={"jetson-tx3" = 3}')
    with pytest.raises(ConfigError, match="jetson-tx2"):
        play(config)


def test_central_training_has_nothing_to_simulate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mergesfl run"):
        play(small_config(tmp_path, "method.name=central"))
