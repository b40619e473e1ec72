"""Every command of the README is run, word by word; `make demo` and `make test` are what CI and this suite are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

BLOCKS = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SET_UP = {"make demo\n", "make test\n"}  # these install; their recipes are checked below
SCRIPTS = [block for block in BLOCKS if block not in SET_UP]


@pytest.fixture
def fresh_folder(tmp_path: Path) -> Path:
    """A working folder that has the repository's files at hand, as after a clone, but no runs."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: " ".join(script.split()[:2]))
def test_console_blocks_run_as_they_stand(fresh_folder: Path, script: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-e", "-c", script], cwd=fresh_folder, env=os.environ | {"PATH": path}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summaries = sorted(fresh_folder.glob("runs/**/summary.json"))
    names = re.findall(r"name=(\S+)", re.sub(r"method\.name=\S+", "", script))
    assert {path.parent.name for path in summaries} >= set(names), ended.stdout + ended.stderr
    assert summaries
    for summary in summaries:
        assert json.loads(summary.read_text())["num_rounds"] in (2, 3)


def test_there_are_the_three_paths_and_the_two_commands() -> None:
    assert set(BLOCKS) > SET_UP
    assert len(SCRIPTS) == 5  # the second path has two: one rank, and two; the third: simulated, and on the real clock


def test_listed_commands_print_what_they_promise() -> None:
    for words, expected in (
        (["methods"], "splitfed-v2"),
        (["models"], "alexnet"),
        (["profiles"], "jetson-tx2"),
        (["datasets"], "fashion-mnist"),
        (["cuts", "cnn"], "8,192"),
        (["cuts", "torchvision:resnet18"], "layer2"),
    ):
        ended = subprocess.run([sys.executable, "-m", "mergesfl", *words], capture_output=True, text=True, check=True)
        assert expected in ended.stdout


def test_make_demo_and_make_test_are_what_the_readme_says() -> None:
    make = shutil.which("make")
    assert make is not None
    demo = subprocess.run([make, "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mergesfl run benchmarks/configs/demo.toml" in demo
    test = subprocess.run([make, "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in test
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    plain = subprocess.run([make], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make demo" in plain and "make check" in plain


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "benchmarks/LOG.md"])
def test_links_lead_to_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert links or page.endswith("LOG.md")
