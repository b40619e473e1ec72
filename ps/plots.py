"""The pictures of a run: its partition, its accuracy, its batch sizes.

Each raises ConfigError when matplotlib is not installed, and OSError when the file cannot be written.
Legend: N workers, C classes, R rounds drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergesfl.runtime.record import RoundRecord, last_attempts
from ps.canvas import (
    BLUE,
    GREY,
    NOTHING,
    ORANGE,
    VERMILION,
    Canvas,
    colour_map,
    colour_scale,
    draw_line,
    even_ticks,
    label_ticks,
    number_rounds,
    show_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[RoundRecord | Mapping[str, Any]]
MAX_ANNOTATED_CELLS = 400


def plot_partition(
    path: Path, counts: NDArray[np.integer[Any]], class_names: Sequence[str], title: str, mean_kl_nats: float
) -> None:
    """Who holds what: samples of each worker and class as a heat map, samples of each worker as bars beside it.

    Args:
        path: PNG to write.
        counts: (N, C) samples of worker i with label c.
        class_names: (C,).
        title: e.g. the data set and the partitioner.
        mean_kl_nats: mean over workers of KL(worker's labels || all labels).
    """
    num_workers, num_classes = counts.shape
    largest = float(max(1, counts.max(initial=0)))
    annotate = counts.size <= MAX_ANNOTATED_CELLS and num_classes <= 25
    map_width = min(12.5, max(3.8, num_classes * (0.2 + 0.085 * len(str(int(largest))) if annotate else 0.2)))
    map_height = min(11.5, max(1.2, (0.26 if num_workers <= 40 else 0.13) * num_workers))
    totals = counts.sum(axis=1)  # (N,)
    facts = f"{_many(num_workers, 'worker')} ({int((totals == 0).sum())} empty), {int(totals.sum()):,} samples"
    full_title = f"{title}\n{facts}, mean KL {mean_kl_nats:.3f} nats"
    with Canvas(path, map_width + 3.2, map_height + 1.9, full_title) as figure:
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[map_width, 1.7])
        norm = colour_scale("sqrt", 0.0, largest)
        shown = np.ma.masked_equal(counts, 0)  # (N, C); an empty cell is grey, not the lowest colour
        image = heat.imshow(shown, aspect="auto", cmap=colour_map(), norm=norm, interpolation="nearest")
        if annotate:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if norm(float(count)) > 0.55 else "black"
                    heat.text(column, row, f"{count}", ha="center", va="center", fontsize=6.5, color=colour)
        label_ticks(heat.yaxis, [str(worker) for worker in range(num_workers)], map_height)
        label_ticks(heat.xaxis, list(class_names), map_width)
        heat.set(xlabel="class", ylabel="worker")
        heat.set_title("samples of each class (grey: none)", loc="left")
        heat.grid(visible=False)
        show_colours(figure, image, heat, even_ticks(largest, "sqrt"), "")
        bars.barh(np.arange(num_workers), totals, height=0.8, color=BLUE)
        bars.tick_params(axis="y", length=0, labelleft=False)
        bars.grid(visible=False, axis="y")
        bars.set_xlim(0, max(1, totals.max(initial=0)) * 1.08)
        bars.locator_params(axis="x", nbins=3)
        bars.set(xlabel="samples")
        bars.set_title("in all", loc="left")


def plot_accuracy(path: Path, records: Records, title: str) -> None:
    """Test accuracy (above) and loss (below) over rounds (left) and over training time (right); the best is marked.

    Args:
        path: PNG to write.
        records: journal lines; of a repeated round the last attempt counts, its time is that of all attempts.
        title: e.g. method, data set, workers.
    """
    rows = last_attempts(records)
    spent_seconds: dict[int, float] = {}
    for record in records:
        row = record.to_json() if isinstance(record, RoundRecord) else record
        spent_seconds[row["round_num"]] = spent_seconds.get(row["round_num"], 0.0) + float(row["round_seconds"])
    rounds = _column(rows, "round_num")
    seconds = np.cumsum([spent_seconds[row["round_num"]] for row in rows])  # (R,) at the end of each round
    scale, unit = _time_unit(float(seconds[-1]) if rows else 0.0)
    accuracy = 100.0 * _column(rows, "accuracy")  # (R,) percent, NaN where not evaluated
    with Canvas(path, 9.5, 5.6, title) as figure:
        axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=[1.35, 1.0])
        for column, x in enumerate((rounds, seconds / scale)):
            upper, lower = axes[0, column], axes[1, column]
            draw_line(lower, x, _column(rows, "train_loss_nats"), GREY, "train (mean over the round)")
            draw_line(lower, x, _column(rows, "loss_nats"), ORANGE, "test")
            draw_line(upper, x, accuracy, BLUE, "test")
            upper.margins(y=0.12)
            if np.isfinite(accuracy).any():
                best = int(np.nanargmax(accuracy))
                where = f"round {int(rounds[best])}" if column == 0 else f"{x[best]:.3g} {unit}"
                label = f"best: {accuracy[best]:.2f} % ({where})"
                upper.plot(x[best], accuracy[best], "*", color=VERMILION, markersize=11, label=label, zorder=5)
                upper.legend(loc="lower right")
            else:
                upper.text(0.5, 0.5, "no round was evaluated", transform=upper.transAxes, ha="center", va="center")
                upper.set_yticks([])
        axes[0, 0].set(ylabel="test accuracy (%)")
        axes[0, 0].set_title("over rounds", loc="left")
        axes[0, 1].set_title("over training time (without evaluations)", loc="left")
        axes[1, 0].set(ylabel="loss (nats)", xlabel="round")
        axes[1, 1].set(xlabel=f"training time ({unit})")
        if axes[1, 1].lines:
            axes[1, 1].legend(loc="best")
            _from_zero(axes[1, 0])
        number_rounds(axes[1, 0], rounds)
        axes[1, 1].set_xlim(0.0, float(seconds[-1]) / scale * 1.03 if rows and seconds[-1] > 0 else 1.0)
        figure.align_ylabels()


def plot_batch_sizes(path: Path, records: Records, worker_names: Sequence[str], title: str) -> None:
    """d_i of each worker and round as a heat map; below, predicted against observed round time, and the idle share.

    Args:
        path: PNG to write.
        records: journal lines; of a repeated round the last attempt is drawn.
        worker_names: (N,) worker ids, the order of the rows. Workers of the records that are missing are added.
        title: e.g. method, data set, workers.
    """
    rows = last_attempts(records)
    names = list(dict.fromkeys([*worker_names, *(name for row in rows for name in row["worker_ids"])]))
    rounds = _column(rows, "round_num")  # (R,)
    sizes, lost = _chosen(rows, names)  # (N, R) samples
    predicted = np.array([_largest(row["predicted_seconds"]) for row in rows])  # (R,) max_i t_i
    observed = np.array([_largest(row["observed_seconds"]) for row in rows])  # (R,)
    with np.errstate(divide="ignore", invalid="ignore"):
        idle_predicted = 100.0 * _column(rows, "predicted_idle_seconds") / predicted  # (R,) percent
        idle_observed = 100.0 * _column(rows, "idle_seconds") / observed  # (R,) percent
    map_height = min(9.5, max(1.2, (0.2 if len(names) <= 40 else 0.115) * len(names)))
    with Canvas(path, 9.5, map_height + 4.4, title) as figure:
        heat, times, idle = figure.subplots(3, 1, height_ratios=[map_height, 1.5, 1.3], sharex=True)
        largest = float(max(2.0, sizes.max(initial=0.0)))
        if rows and names:
            image = heat.pcolormesh(
                np.append(rounds[0], rounds + 1) - 0.5,  # (R + 1,) edges: rounds that were not run stretch the next one
                np.arange(len(names) + 1) - 0.5,
                np.ma.masked_equal(sizes, 0),
                cmap=colour_map(),
                norm=colour_scale("log", 1.0, largest),
            )
            show_colours(figure, image, heat, even_ticks(largest, "log"), "")
        note = "batch size in samples (grey: not chosen"
        if lost:
            marker_area = float(np.clip(2000.0 / (len(names) + len(rows)), 10.0, 30.0))
            x, y = zip(*lost, strict=True)
            heat.scatter(x, y, marker="x", s=marker_area, color=VERMILION, linewidths=1.3)
            note += f"; red cross: dropped, {_many(len(lost), 'time')}"
        heat.set_facecolor(NOTHING)
        heat.set_ylim(len(names) - 0.5, -0.5)
        heat.grid(visible=False)
        label_ticks(heat.yaxis, names, map_height)
        heat.set(ylabel="worker")
        heat.set_title(f"{note})", loc="left")
        for axes, expected, real in ((times, predicted, observed), (idle, idle_predicted, idle_observed)):
            draw_line(axes, rounds, real, BLUE, "observed")
            draw_line(axes, rounds, expected, ORANGE, "predicted", dashed=True)
            _from_zero(axes)
        times.set(ylabel="seconds")
        times.set_title("time of the slowest worker", loc="left")
        if times.lines:
            times.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1)
        idle.set(ylabel="%", xlabel="round")
        idle.set_title("idle share: mean waiting time of a worker / time of the slowest", loc="left")
        number_rounds(idle, rounds)


def _chosen(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[NDArray[np.float64], list[tuple[float, int]]]:
    """(N, R) batch sizes, 0 where a worker was not chosen; and (round, row) of every drop."""
    index = {name: number for number, name in enumerate(names)}
    sizes = np.zeros((len(names), len(rows)))  # (N, R)
    for column, row in enumerate(rows):
        for name, size in zip(row["worker_ids"], row["batch_sizes"], strict=True):
            sizes[index[name], column] = size
    lost = [
        (float(row["round_num"]), index[entry["worker_id"]])
        for row in rows
        for entry in row["dropped"]
        if entry["worker_id"] in index
    ]
    return sizes, lost


def _from_zero(axes: Axes) -> None:
    """The y axis from 0 (or the lowest value below it) to a little above the highest line."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines] or [np.zeros(1)])
    top = float(values.max())
    axes.set_ylim(min(0.0, float(values.min()) * 1.1), top * 1.1 if top > 0 else 1.0)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """(R,) one field of every row, NaN where it is unknown."""
    return np.array([math.nan if row[key] is None else float(row[key]) for row in rows], dtype=np.float64)


def _largest(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None and math.isfinite(value)), default=math.nan)


def _time_unit(seconds: float) -> tuple[float, str]:
    """(seconds per unit, unit) so that the axis shows handy numbers."""
    if seconds >= 2 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if seconds >= 600 else (1.0, "s")


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
