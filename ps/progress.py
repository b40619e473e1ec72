"""What a person sees while a run goes on: one line per round, a bar on a terminal, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from mergesfl.runtime.journal import RoundRecord


def bytes_text(num_bytes: float) -> str:
    """Bytes as people read them.

    >>> bytes_text(8192)
    '8.2 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


class Progress:
    """Writes to one console; silent when it is quiet."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("rounds", total=None, visible=False)
        self._num_here = -1

    def started(self, next_round: int, num_rounds: int) -> None:
        """The run begins or goes on at this round."""
        self._bar.start()
        self._bar.update(self._task, total=num_rounds, completed=next_round, visible=True)

    def waiting(self, num_here: int, num_workers: int) -> None:
        """How many workers are here; said when it changes."""
        if num_here != self._num_here:
            self._num_here = num_here
            self._bar.update(self._task, description=f"workers {num_here}/{num_workers}")

    def round_closed(self, record: RoundRecord) -> None:
        """One line per round."""
        accuracy = "   -  " if record.accuracy is None else f"{100 * record.accuracy:5.2f}%"
        loss = "  -  " if record.train_loss_nats is None else f"{record.train_loss_nats:5.3f}"
        kl = "  -  " if record.merged_kl_nats is None else f"{record.merged_kl_nats:.3f}"
        dropped = "".join(f" [red]lost {escape(lost.worker_id)}[/red]" for lost in record.dropped)
        again = f" [yellow]attempt {record.attempt}[/yellow]" if record.attempt > 1 else ""
        self._console.print(
            f"round {record.round_num + 1:4d}  accuracy {accuracy}  train loss {loss}  "
            f"workers {len(record.finished_worker_ids):3d}  D {sum(record.batch_sizes):4d}  KL {kl}  "
            f"idle {record.idle_seconds or 0.0:6.3f} s  round {record.round_seconds:6.2f} s{again}{dropped}",
            highlight=False,
            soft_wrap=True,
        )
        self._bar.update(self._task, completed=record.round_num + 1, description="rounds")

    def finished(self, summary: Mapping[str, Any], folder: str) -> None:
        """The table at the end."""
        self.close()
        title = escape(f"{summary['method']} on {summary['dataset']}")
        table = Table(title=title, show_header=False, title_justify="left")
        for key, value in summary.items():
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            if key.endswith("_bytes") and value is not None:
                text = f"{value} ({bytes_text(float(value))})"
            table.add_row(key, escape(text))
        self._console.print(table)
        where = f"everything about this run is in [bold]{escape(folder)}[/bold]"
        self._console.print(where, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        self._bar.stop()
