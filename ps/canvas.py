"""What all pictures share: the style, the colours, lines with holes, tick labels that never overlap, and the file.

Colours: the Okabe-Ito set and a map from pale yellow to dark blue ("YlGnBu"); both keep their order for colour-blind
readers and in grey. No pyplot: figures are objects, so nothing waits for a screen.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergesfl.errors import ConfigError
from mergesfl.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito, "Color Universal Design" (2008).
BLUE, ORANGE, VERMILION, GREY = "#0072B2", "#E69F00", "#D55E00", "#7A7A7A"
NOTHING = "#EDEDED"  # a cell of a heat map without a value
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "text.parse_math": False,  # titles and labels come from data: "$" is a dollar
    "figure.dpi": 150,
    "savefig.dpi": "figure",
}
MAX_TICK_LABELS = 45  # rows or columns with a label each; above, every 2nd, 5th, 10th...
MAX_MARKED_POINTS = 60  # points are drawn on a line up to here


class Canvas:
    """A figure in the common style; written to its path in one go when the block ends without an error.

    Raises ConfigError when matplotlib is not installed, OSError when the file cannot be written.
    """

    def __init__(self, path: Path, width_inches: float, height_inches: float, title: str) -> None:
        try:
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("plots need matplotlib, which is not installed: pip install mergesfl[ps]") from error
        self._path = path
        self._style = matplotlib.rc_context(STYLE)
        self._style.__enter__()
        self._figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        FigureCanvasAgg(self._figure)
        self._figure.suptitle(title, fontsize=11)

    def __enter__(self) -> Figure:
        return self._figure

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                buffer = io.BytesIO()
                self._figure.savefig(buffer, format="png")
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._path, buffer.getvalue())
        finally:
            self._style.__exit__(None, None, None)


def draw_line(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], colour: str, label: str, dashed: bool = False
) -> None:
    """One line through the finite points of (R,): a round that was not evaluated leaves no gap. May draw nothing."""
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return
    few = known.sum() <= MAX_MARKED_POINTS
    axes.plot(
        x[known],
        y[known],
        color=colour,
        label=label,
        linewidth=1.4 if few else 1.0,
        linestyle=(0, (4, 2)) if dashed and few else "-",
        marker="o" if few else "",
        markersize=3.2,
    )


def label_ticks(axis: Any, labels: Sequence[str], room_inches: float) -> None:
    """One tick per label while they are few, then every 2nd, 5th, 10th...; x labels turn when the room is too small."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if len(labels) <= step * MAX_TICK_LABELS)
    shown = labels[::step]
    size_points = 7.0 if len(shown) > 20 else 8.0
    needed_inches = len(shown) * (max(map(len, shown), default=0) + 1.5) * 0.6 * size_points / 72.0
    turned = axis.axis_name == "x" and needed_inches > room_inches
    axis.set_ticks(range(0, len(labels), step), shown, rotation=90.0 if turned else 0.0)
    axis.set_tick_params(labelsize=size_points, length=2.0)


def number_rounds(axes: Axes, rounds: NDArray[np.float64]) -> None:
    """Whole numbers on the round axis, (R,) rounds with half a round of room at both ends."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if rounds.size:
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)


def colour_map() -> Any:
    """Pale yellow to dark blue; cells without a value are grey."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    # From 0.12 on: the lowest colour must differ from the grey of an empty cell.
    return ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 1.0, 256))).with_extremes(bad=NOTHING)


def colour_scale(kind: str, lowest: float, largest: float) -> Any:
    """Value -> 0..1 of the colour map: "log", or "sqrt", which spreads small values less and knows 0."""
    from matplotlib.colors import LogNorm, PowerNorm

    return LogNorm(lowest, largest) if kind == "log" else PowerNorm(0.5, lowest, largest)


def show_colours(figure: Figure, image: Any, axes: Axes, ticks: Sequence[float], label: str) -> None:
    """A colour bar at the right side of the axes with whole numbers on it."""
    bar = figure.colorbar(image, ax=axes, pad=0.012, fraction=0.05, aspect=22, label=label)
    bar.ax.grid(visible=False)
    bar.set_ticks(list(ticks), labels=[f"{tick:,.0f}" for tick in ticks])
    bar.minorticks_off()


def even_ticks(largest: float, kind: str) -> list[float]:
    """Tick values up to largest: powers of two ("log"), or squares' neighbourhood ("sqrt": 0, 1/16, 1/4, 9/16, 1)."""
    if kind == "log":
        return [2.0**power for power in range(int(np.log2(largest)) + 1)]
    return sorted({float(round(largest * part)) for part in (0.0, 1 / 16, 1 / 4, 9 / 16, 1.0)})
