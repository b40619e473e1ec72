"""Which time model predicts better, linear (Eq. 7) or affine: replayed over the journals of real runs.

python -m benchmarks.micro.time_model runs/*/journal.jsonl

For every worker and round both models predict the seconds of a step from the rounds before, then see what it took.
Printed is the median over all predictions of |predicted - observed| / observed.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from mergesfl.control.estimates import AffineEstimates, Estimates
from mergesfl.runtime.journal import read_journal


def errors_of(journal: Path, num_steps: int) -> dict[str, list[float]]:
    """Relative errors of each model over one journal; num_steps: tau of that run."""
    linear, affine = Estimates(), AffineEstimates()
    errors: dict[str, list[float]] = {"linear": [], "affine": []}
    for line in read_journal(journal):
        for name, batch_size, seconds in zip(
            line["worker_ids"], line["batch_sizes"], line["observed_seconds"], strict=True
        ):
            if not seconds:
                continue
            step_seconds = seconds / num_steps
            for label, model in (("linear", linear), ("affine", affine)):
                predicted_seconds = model.step_seconds(name, batch_size)
                if predicted_seconds is not None:
                    errors[label].append(abs(predicted_seconds - step_seconds) / step_seconds)
            linear.observe(name, step_seconds / batch_size, 0.0)
            affine.observe(name, batch_size, step_seconds)
    return errors


def main(paths: list[str]) -> None:
    """One line per journal."""
    print("| journal | predictions | linear | affine |\n|---|---:|---:|---:|")
    for path in map(Path, paths):
        errors = errors_of(path, num_steps=1)  # relative errors do not depend on tau
        linear, affine = (statistics.median(errors[label]) for label in ("linear", "affine"))
        print(f"| {path.parent.name} | {len(errors['linear'])} | {100 * linear:.1f} % | {100 * affine:.1f} % |")


if __name__ == "__main__":
    main(sys.argv[1:])
