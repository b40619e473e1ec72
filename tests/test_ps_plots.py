"""Pictures: the marks on the figure are the numbers of the records, and no label covers another."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesfl.errors import ConfigError
from mergesfl.runtime.record import DroppedWorker, RoundRecord
from ps import canvas
from ps.plots import plot_accuracy, plot_batch_sizes, plot_partition

pytest.importorskip("matplotlib")
HAR = ["walking", "upstairs", "downstairs", "sitting", "standing", "laying"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is drawn in a test."""
    drawn: list[Any] = []
    enter = canvas.Canvas.__enter__

    def remember(self: canvas.Canvas) -> Any:
        drawn.append(enter(self))
        return drawn[-1]

    monkeypatch.setattr(canvas.Canvas, "__enter__", remember)
    return drawn


def record(round_num: int, worker_ids: Sequence[str], batch_sizes: Sequence[int], **changes: Any) -> RoundRecord:
    values: dict[str, Any] = {
        "round_num": round_num,
        "accuracy": 0.5,
        "loss_nats": 1.5,
        "train_loss_nats": 1.25,
        "worker_ids": tuple(worker_ids),
        "batch_sizes": tuple(batch_sizes),
        "finished_worker_ids": tuple(worker_ids),
        "dropped": (),
        "kl_before_nats": 0.5,
        "kl_after_nats": 0.125,
        "merged_kl_nats": 0.25,
        "predicted_seconds": tuple(1.0 for _ in worker_ids),
        "observed_seconds": tuple(2.0 for _ in worker_ids),
        "predicted_idle_seconds": 0.25,
        "idle_seconds": 1.0,
        "ingress_bytes": 1000,
        "egress_bytes": 900,
        "samples_trained": 120,
        "planning_seconds": 0.0625,
        "round_seconds": 2.0,
        "evaluation_seconds": 0.25,
        "learning_rate": 0.5,
    }
    return RoundRecord(**{**values, **changes})


def many_rounds(num_rounds: int, num_workers: int, every: int = 1) -> list[RoundRecord]:
    generator = np.random.default_rng(0)
    rows = []
    for round_num in range(num_rounds):
        ids = sorted(generator.choice(num_workers, max(1, num_workers // 2), replace=False))
        names = [f"worker-{number:02d}" for number in ids]
        lost = (DroppedWorker(names[0], 1, "deadline"),) if round_num % 10 == 3 else ()
        accuracy = float(generator.random()) if round_num % every == 0 else None
        sizes = [int(size) for size in generator.integers(1, 65, len(ids))]
        rows.append(record(round_num, names, sizes, accuracy=accuracy, loss_nats=accuracy, dropped=lost))
    return rows


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def assert_nothing_overlaps(figure: Any) -> None:
    """No two texts share a pixel, and none leaves the figure. Annotations inside cells count too."""
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *(text for axes in figure.axes for text in axes.texts)]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible() and text.get_text()
    ]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for (text, box), (other_text, other) in itertools.combinations(boxes, 2):
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(width, height) <= 1.0, f"'{text}' covers '{other_text}'"


def assert_is_png(path: Path) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert not path.with_name(path.name + ".tmp").exists()


def test_partition_shows_the_counts_and_their_row_sums(tmp_path: Path, figures: list[Any]) -> None:
    counts = np.array([[5, 0, 1], [0, 0, 0], [30, 4, 0]])  # (N 3, C 3)
    plot_partition(tmp_path / "new" / "partition.png", counts, ["a", "b", "c"], "digits", 0.25)
    assert_is_png(tmp_path / "new" / "partition.png")
    heat, bars, colours = figures[0].axes
    shown = heat.images[0].get_array()
    assert np.array_equal(shown.filled(0), counts)
    assert np.array_equal(shown.mask, counts == 0)  # no samples: the colour of nothing
    written = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in heat.texts}
    assert written == {(0, 0): "5", (0, 2): "1", (2, 0): "30", (2, 1): "4"}
    assert [bar.get_width() for bar in bars.patches] == [6, 0, 34]
    assert figures[0]._suptitle.get_text() == "digits\n3 workers (1 empty), 40 samples, mean KL 0.250 nats"
    assert [tick.get_text() for tick in heat.get_xticklabels()] == ["a", "b", "c"]
    assert (heat.get_xlabel(), heat.get_ylabel(), bars.get_xlabel()) == ("class", "worker", "samples")
    assert colours.get_ylim() == (0.0, 30.0)


@pytest.mark.parametrize(
    ("num_workers", "names"),
    [(1, HAR), (10, HAR), (80, HAR), (2, ["0", "1"]), (80, [f"n{number:08d}" for number in range(100)])],
)
def test_partition_labels_stay_apart(tmp_path: Path, figures: list[Any], num_workers: int, names: list[str]) -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 3000, (num_workers, len(names))) * generator.integers(
        0, 2, (num_workers, len(names))
    )
    plot_partition(tmp_path / "p.png", counts, names, "a title", 1.5)
    assert_nothing_overlaps(figures[0])
    assert len(figures[0].axes[0].get_yticks()) <= canvas.MAX_TICK_LABELS
    assert max(figures[0].get_size_inches()) <= 16


def test_partition_without_a_single_sample(tmp_path: Path, figures: list[Any]) -> None:
    plot_partition(tmp_path / "p.png", np.zeros((2, 3), dtype=np.int64), ["a", "b", "c"], "nothing", 0.0)
    assert "2 workers (2 empty), 0 samples" in figures[0]._suptitle.get_text()


def test_accuracy_marks_the_best_and_adds_up_the_time(tmp_path: Path, figures: list[Any]) -> None:
    records = [
        record(0, ["a"], [8], accuracy=0.25, loss_nats=2.0, train_loss_nats=3.0, round_seconds=1.0),
        record(1, ["a"], [8], accuracy=0.9, loss_nats=0.1, round_seconds=2.0),  # void: counts as time only
        record(1, ["a"], [8], accuracy=None, loss_nats=None, train_loss_nats=2.5, round_seconds=4.0, attempt=2),
        record(2, ["a"], [8], accuracy=0.75, loss_nats=1.0, train_loss_nats=None, round_seconds=8.0),
        record(3, ["a"], [8], accuracy=0.5, loss_nats=1.25, train_loss_nats=1.0, round_seconds=16.0),
    ]
    plot_accuracy(tmp_path / "a.png", records, "digits")
    assert_is_png(tmp_path / "a.png")
    over_rounds, over_time, loss, loss_over_time = figures[0].axes
    # By hand: 1 s, + (2 + 4) s of both attempts, + 8 s, + 16 s.
    seconds = [1.0, 7.0, 15.0, 31.0]
    assert lines_of(over_rounds) == {
        "test": ([0, 2, 3], [25.0, 75.0, 50.0]),
        "best: 75.00 % (round 2)": ([2], [75.0]),
    }
    assert lines_of(over_time)["test"][0] == [seconds[0], seconds[2], seconds[3]]
    assert lines_of(over_time)["best: 75.00 % (15 s)"] == ([15.0], [75.0])
    assert lines_of(loss)["test"] == ([0, 2, 3], [2.0, 1.0, 1.25])
    assert lines_of(loss)["train (mean over the round)"] == ([0, 1, 3], [3.0, 2.5, 1.0])
    assert lines_of(loss_over_time)["train (mean over the round)"][0] == [seconds[0], seconds[1], seconds[3]]
    assert loss_over_time.get_xlabel() == "training time (s)"
    assert loss.get_ylim()[0] == 0.0
    assert_nothing_overlaps(figures[0])


@pytest.mark.parametrize(
    ("round_seconds", "unit", "last"), [(100.0, "s", 500.0), (120.0, "min", 10.0), (1440.0, "h", 2.0)]
)
def test_time_axis_has_a_handy_unit(
    tmp_path: Path, figures: list[Any], round_seconds: float, unit: str, last: float
) -> None:
    plot_accuracy(tmp_path / "a.png", [record(h, ["a"], [8], round_seconds=round_seconds) for h in range(5)], "t")
    assert figures[0].axes[3].get_xlabel() == f"training time ({unit})"
    assert lines_of(figures[0].axes[1])["test"][0][-1] == pytest.approx(last)


def test_accuracy_says_when_nothing_was_evaluated(tmp_path: Path, figures: list[Any]) -> None:
    plot_accuracy(tmp_path / "a.png", [record(0, ["a"], [8], accuracy=None, loss_nats=None)], "t")
    assert [axes.texts[0].get_text() for axes in figures[0].axes[:2]] == ["no round was evaluated"] * 2


def test_batch_sizes_by_hand(tmp_path: Path, figures: list[Any]) -> None:
    records = [
        record(0, ["b", "a"], [4, 8], predicted_seconds=(1.0, 2.0), observed_seconds=(3.0, 4.0)),
        record(
            1,
            ["c", "new"],
            [2, 64],
            observed_seconds=(None, 5.0),
            dropped=(DroppedWorker("c", 3, "deadline"), DroppedWorker("never planned", 0, "left")),
            predicted_idle_seconds=None,
        ),
    ]
    plot_batch_sizes(tmp_path / "b.png", records, ["a", "b", "c"], "digits")
    assert_is_png(tmp_path / "b.png")
    heat, times, idle, colours = figures[0].axes
    sizes = heat.collections[0].get_array()
    #                                          round 0  1
    assert np.array_equal(sizes.filled(0), [[8, 0], [4, 0], [0, 2], [0, 64]])  # rows a, b, c, new
    assert [tick.get_text() for tick in heat.get_yticklabels()] == ["a", "b", "c", "new"]
    assert np.array_equal(heat.collections[1].get_offsets(), [[1, 2]])  # c in round 1
    assert heat.get_title(loc="left") == "batch size in samples (grey: not chosen; red cross: dropped, 1 time)"
    assert heat.get_ylim() == (3.5, -0.5)  # the first worker on top
    assert lines_of(times) == {"observed": ([0, 1], [4.0, 5.0]), "predicted": ([0, 1], [2.0, 1.0])}
    # idle share: observed 1 s of 4 s and of 5 s; predicted 0.25 s of 2 s, unknown in round 1.
    assert lines_of(idle) == {"observed": ([0, 1], [25.0, 20.0]), "predicted": ([0], [12.5])}
    assert [tick.get_text() for tick in colours.get_yticklabels()] == ["1", "2", "4", "8", "16", "32", "64"]
    assert_nothing_overlaps(figures[0])


@pytest.mark.parametrize(("num_rounds", "num_workers", "every"), [(1, 1, 1), (1, 10, 1), (60, 10, 2), (500, 80, 5)])
@pytest.mark.parametrize("draw", [plot_accuracy, lambda *a: plot_batch_sizes(a[0], a[1], ["worker-00"], a[2])])
def test_labels_stay_apart_in_small_and_large_runs(
    tmp_path: Path, figures: list[Any], num_rounds: int, num_workers: int, every: int, draw: Callable[..., None]
) -> None:
    draw(tmp_path / "x.png", many_rounds(num_rounds, num_workers, every), "MergeSFL on UCI HAR")
    assert_nothing_overlaps(figures[0])


def test_runs_without_rounds_and_rows_of_a_journal(tmp_path: Path, figures: list[Any]) -> None:
    plot_accuracy(tmp_path / "a.png", [], "empty")
    plot_batch_sizes(tmp_path / "b.png", [], ["a"], "empty")
    plot_accuracy(tmp_path / "c.png", [record(0, ["a"], [8]).to_json()], "rows")
    plot_batch_sizes(tmp_path / "d.png", [replace(record(0, ["a"], [8]), idle_seconds=None).to_json()], [], "rows")
    assert len(figures) == 4
    assert lines_of(figures[2].axes[0])["test"] == ([0], [50.0])


def test_names_are_text_and_no_formulas(tmp_path: Path) -> None:
    bad = "$\\foo$"  # the parser of formulas raises ValueError for it
    plot_partition(tmp_path / "p.png", np.ones((1, 1), dtype=np.int64), [bad], bad, 0.0)
    plot_batch_sizes(tmp_path / "b.png", [record(0, [bad], [8])], [bad], bad)
    plot_accuracy(tmp_path / "a.png", [record(0, [bad], [8])], bad)
    for name in "pba":
        assert_is_png(tmp_path / f"{name}.png")


def test_an_error_while_drawing_leaves_the_old_picture_and_the_old_style(tmp_path: Path) -> None:
    import matplotlib

    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), canvas.Canvas(path, 2.0, 2.0, "title"):
        assert matplotlib.rcParams["axes.grid"] is True
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install mergesfl\[ps\]"):
        plot_accuracy(tmp_path / "a.png", [], "t")
    with pytest.raises(ConfigError, match=r"pip install mergesfl\[ps\]"):
        plot_partition(tmp_path / "p.png", np.ones((1, 1), dtype=np.int64), ["a"], "t", 0.0)
