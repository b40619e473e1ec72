"""Whose features were out of all proportion: whom to blame when a round has become infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Largest |z| that is above suspicion. Networks that train in float16 keep their activations below its end, 65,504; this
# is fifteen times more, and its square is far from the end of float32 (3e38). [ours]
MAX_MAGNITUDE = 1e6
# An outlier is so many times above the (lower) median worker of the same step. When a learning rate is too high all
# workers' features grow, and nobody is to blame. [ours]
MIN_RATIO_TO_MEDIAN = 1e3


class Outliers:
    """Watches the features of one round, step by step.

    The first step with an outlier counts: from the next on its gradients may have spoilt honest workers, too.
    """

    def __init__(self) -> None:
        self.magnitudes: dict[str, float] = {}  # worker_id -> max |z| of those to blame

    def note(self, magnitudes: Mapping[str, float]) -> None:
        """Takes in max |z| of every worker that answered one step; infinite or NaN: its own arithmetic broke down."""
        finite = {name: magnitude for name, magnitude in magnitudes.items() if math.isfinite(magnitude)}
        if self.magnitudes or not finite:
            return
        median = sorted(finite.values())[(len(finite) - 1) // 2]
        bound = max(MAX_MAGNITUDE, MIN_RATIO_TO_MEDIAN * median)
        self.magnitudes = {name: magnitude for name, magnitude in finite.items() if magnitude > bound}
