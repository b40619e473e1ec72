"""The command line as a person meets it: what it says when something is wrong, and that nothing is lost then."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mergesfl.cli import app
from tests.processes import SMALL, declared, journal
from tests.processes import run as run_process


@dataclass(frozen=True)
class Ended:
    """What a command left on the terminal."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Commands take over SIGINT and SIGTERM; here they run in the test's own process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run(*words: str, settings: Sequence[str] = ()) -> Ended:
    """The command line, in this process (a new one takes seconds to import torch)."""
    result = CliRunner().invoke(app, [*words, *(part for text in settings for part in ("--set", text))])
    return Ended(result.exit_code, result.stdout, result.stderr)


QUICK = [*SMALL, *declared(2), "cluster.transport=memory", "training.num_rounds=1"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.num_round=3", "unknown key 'training.num_round': did you mean 'num_rounds'?"),
        ("method.name=mergefsl", "unknown method 'mergefsl': did you mean 'mergesfl'?"),
        ("model.name=cn", "unknown model 'cn': did you mean 'cnn'?"),
        ("model.cut=conv9", "unknown cut 'conv9'"),
        ("data.dataset=digitz", "unknown data set 'digitz': did you mean 'digits'?"),
        ("data.dataset=har:/no/such/place", "/no/such/place"),
        ("data.partition=dirichle(0.1)", "unknown partition 'dirichle': did you mean 'dirichlet'?"),
        ("cluster.device=cuda:99", "cuda"),
        ("cluster.slowdowns=[1,2,3]", "cluster.slowdowns has 3 entries for 2 workers"),
        ("training.learning_rate=-1", "'training.learning_rate' = -1"),
        ("control.ingress_budget_bytes=10", "ingress budget of 10 bytes per step is less than one sample at the cut"),
    ],
)
def test_a_wrong_setting_is_one_clear_line_and_exit_code_two(tmp_path: Path, setting: str, expected: str) -> None:
    ended = run("run", settings=[*QUICK, f"output.folder={tmp_path}", setting])
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: ")


def test_a_wrong_setting_leaves_no_folder_behind_that_blocks_the_right_one(tmp_path: Path) -> None:
    settings = [*QUICK, f"output.folder={tmp_path}", "name=twice"]
    assert run("run", settings=[*settings, "data.dataset=har:/no/such/place"]).returncode == 2
    assert run("run", settings=settings).returncode == 0
    again = run("run", settings=settings)
    assert again.returncode == 2
    assert "already holds a run: continue it with --resume, replace it with --overwrite" in again.stderr
    assert len(journal(tmp_path / "twice")) == 1


def test_the_same_holds_for_the_real_command(tmp_path: Path) -> None:
    ended = run_process("run", settings=[*QUICK, f"output.folder={tmp_path}", "training.num_round=3"])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: configuration:\n  unknown key 'training.num_round'")
    assert "Traceback" not in ended.stderr


def test_missing_and_broken_configuration_files_are_named(tmp_path: Path) -> None:
    missing = run("run", str(tmp_path / "no.toml"))
    assert missing.returncode == 2 and "no.toml" in missing.stderr
    (tmp_path / "broken.toml").write_text("name = ")
    broken = run("run", str(tmp_path / "broken.toml"))
    assert broken.returncode == 2 and "broken.toml is not valid" in broken.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--connect", "carrier-pigeon://x"], "carrier-pigeon"),
        (["--connect", "tcp://127.0.0.1:5", "--dataset", "npz:/no/such.npz"], "/no/such.npz"),
        (["--connect", "tcp://127.0.0.1:5", "--slowdown", "0.5"], "--slowdown 0.5"),
        (["--connect", "tcp://127.0.0.1:5", "--declared-compute-seconds-per-sample", "1"], "declare both"),
        (["--connect", "tcp://127.0.0.1:5", "--log-level", "loud"], "log level 'loud'"),
    ],
)
def test_a_worker_that_cannot_start_says_why(words: list[str], expected: str) -> None:
    ended = run("worker", *words)
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_refuses_a_share_that_is_not_there_or_of_other_data(tmp_path: Path) -> None:
    drawn = run("partition", "--out", str(tmp_path), settings=["cluster.num_workers=2", "output.plots=false"])
    assert drawn.returncode == 0 and "2 shares" in drawn.stdout
    words = ["--connect", "tcp://127.0.0.1:5", "--partition", str(tmp_path / "partition.npz")]
    beyond = run("worker", *words, "--index", "2")
    assert beyond.returncode == 2 and "has the shares 0 to 1" in beyond.stderr
    other = tmp_path / "other.npz"
    x = np.zeros((20, 1, 8, 8), np.float32)
    y = np.arange(20) % 2
    np.savez(other, X_train=x, y_train=y, X_test=x, y_test=y)
    wrong = run("worker", *words, "--index", "0", "--dataset", f"npz:{other}")
    assert wrong.returncode == 2 and "drawn for other labels" in wrong.stderr


def test_a_server_refuses_an_address_that_is_taken_and_the_method_without_workers(tmp_path: Path) -> None:
    settings = [*SMALL, f"output.folder={tmp_path}"]
    bad = run("ps", "--bind", "tcp://256.0.0.1:99999", settings=settings)
    assert bad.returncode in (1, 2) and "error: " in bad.stderr and "Traceback" not in bad.stderr
    central = run("ps", settings=[*settings, "method.name=central"])
    assert central.returncode == 2 and "mergesfl run" in central.stderr


def test_a_server_without_workers_gives_up_with_numbers(tmp_path: Path) -> None:
    settings = [*SMALL, f"output.folder={tmp_path}", "cluster.start_deadline_seconds=0.5", "cluster.num_workers=4"]
    ended = run("ps", "--bind", "tcp://127.0.0.1:*", settings=settings)
    assert ended.returncode == 3
    assert "0 of 4 workers registered within 0.5 s (cluster.start_deadline_seconds), 2 are needed" in ended.stderr


def test_cuts_takes_a_shape_a_data_set_or_the_models_own() -> None:
    by_data = run("cuts", "cnn", "--dataset", "digits")
    assert by_data.returncode == 0 and "32x2x2" in by_data.stdout
    by_shape = run("cuts", "alexnet", "--sample-shape", "3,64,64", "--num-classes", "7")
    assert by_shape.returncode == 0 and "256x8x8" in by_shape.stdout
    wrong = run("cuts", "cnn", "--sample-shape", "3,x")
    assert wrong.returncode == 2 and "--sample-shape 3,x" in wrong.stderr


@pytest.mark.parametrize("package", ["ps", "workers"])
def test_each_package_is_a_command_of_its_own(package: str) -> None:
    ended = subprocess.run([sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True)
    assert "--bind" in ended.stdout or "--connect" in ended.stdout
