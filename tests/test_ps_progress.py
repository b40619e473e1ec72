"""What a person sees: lines whose words are known."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mergesfl.runtime.journal import DroppedWorker, RoundRecord
from ps.progress import Progress, bytes_text

RECORD = RoundRecord(
    round_num=4,
    accuracy=0.8125,
    loss_nats=0.5,
    train_loss_nats=0.75,
    worker_ids=("a", "b"),
    batch_sizes=(8, 5),
    finished_worker_ids=("a", "b"),
    dropped=(),
    kl_before_nats=0.1,
    kl_after_nats=0.05,
    merged_kl_nats=0.0625,
    predicted_seconds=(1.0, 2.0),
    observed_seconds=(1.0, 2.0),
    predicted_idle_seconds=0.5,
    idle_seconds=0.5,
    ingress_bytes=1,
    egress_bytes=2,
    samples_trained=13,
    planning_seconds=0.0,
    round_seconds=2.25,
    evaluation_seconds=0.0,
    learning_rate=0.1,
)


def shown(record: RoundRecord) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200))
    progress.round_closed(record)
    progress.close()
    return out.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (8192, "8.2 kB"),
        (20_971_520, "21.0 MB"),
        (3.5e9, "3.5 GB"),
        (7e12, "7.0 TB"),
    ],
)
def test_bytes_as_people_read_them(num_bytes: float, text: str) -> None:
    assert bytes_text(num_bytes) == text


def test_a_round_is_one_line() -> None:
    assert shown(RECORD) == (
        "round    5  accuracy 81.25%  train loss 0.750  workers   2  D   13  KL 0.062  idle  0.500 s  round   2.25 s\n"
    )


def test_what_is_unknown_is_a_dash_and_what_went_wrong_is_named() -> None:
    lost = DroppedWorker("b", 1, "left")
    text = shown(
        replace(
            RECORD,
            accuracy=None,
            train_loss_nats=None,
            merged_kl_nats=None,
            idle_seconds=None,
            finished_worker_ids=("a",),
            dropped=(lost,),
            attempt=2,
        )
    )
    assert text == (
        "round    5  accuracy    -    train loss   -    workers   1  D   13  KL   -    "
        "idle  0.000 s  round   2.25 s attempt 2 lost b\n"
    )


def test_the_table_at_the_end_holds_every_figure_and_says_where_the_rest_is() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200))
    summary = {"method": "mergesfl", "dataset": "digits", "final_accuracy": 0.98765, "ingress_bytes": 8192}
    progress.finished({**summary, "egress_bytes": None}, "runs/run")
    lines = [line.strip(" │┃|\n") for line in out.getvalue().splitlines()]
    assert lines[0] == "mergesfl on digits"
    cells = {tuple(part.strip() for part in line.split("│")) for line in lines if "│" in line}
    assert ("final_accuracy", "0.9877") in cells
    assert ("ingress_bytes", "8192 (8.2 kB)") in cells
    assert ("egress_bytes", "None") in cells
    assert lines[-1] == "everything about this run is in runs/run"


def test_names_are_text_and_no_markup() -> None:
    lost = DroppedWorker("[/x]", 0, "left")
    assert shown(replace(RECORD, dropped=(lost,))).endswith(" lost [/x]\n")
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200))
    progress.finished({"method": "mergesfl", "dataset": "npz:[/a]"}, "runs/[/b]")
    assert out.getvalue().count("npz:[/a]") == 2
    assert out.getvalue().endswith("is in runs/[/b]\n")


def test_a_terminal_gets_a_bar_that_counts_workers_and_rounds() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=120, force_terminal=True, legacy_windows=False))
    progress.started(3, 20)
    progress.waiting(1, 4)
    progress.waiting(1, 4)  # said when it changes
    progress._bar.refresh()
    assert "workers 1/4" in out.getvalue()
    assert "3/20" in out.getvalue()
    progress.round_closed(RECORD)
    progress._bar.refresh()
    assert "5/20" in out.getvalue()
    progress.close()


def test_a_quiet_console_stays_quiet() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, quiet=True))
    progress.started(0, 2)
    progress.round_closed(RECORD)
    progress.finished({"method": "a", "dataset": "b"}, "c")
    assert out.getvalue() == ""
