"""Plans whose batch sizes follow the sizes of the data sets: in fixed proportion (SCALA), or drawn (GPSL).

Both fix B, the samples of one merged step, whatever the number of workers. No speed and no label plays a part.
Legend: N workers, n chosen workers, n_i samples of the data set of worker i, d_i samples per step, tau steps.
"""

from __future__ import annotations

import numpy as np

from mergesfl.control.batching import scale_to_total
from mergesfl.control.facts import FleetFacts
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import draw_participants, report_plan
from mergesfl.errors import ConfigError


def plan_in_proportion(
    round_num: int,
    fleet: FleetView,
    num_participants: int,
    merged_samples: int,
    num_steps: int,
    generator: np.random.Generator,
) -> RoundPlan:
    """Workers drawn at random, d_i = B * n_i / sum_j n_j over those drawn (SCALA). [paper]

    Rounded by largest remainder, at least 1 and never more than n_i; a worker without samples is never drawn. [ours]

    Args:
        merged_samples: B, samples of one merged step; the plan's sum of d_i, or of all n_i if that is less.
    Returns: the plan; workers in the order of the fleet, fewer than num_participants if not so many have samples.
    Raises: ConfigError if no worker has samples, or B is less than one sample per participant.
    """
    facts = FleetFacts.of(fleet)
    if not 1 <= num_participants <= merged_samples:
        raise ConfigError(
            f"{merged_samples} merged samples for {num_participants} participants, expected at least 1 participant and "
            "1 sample for each: change control.participants_per_round or training.batch_size"
        )
    chosen = draw_participants(facts, num_participants, generator)  # (n,)
    num_samples = facts.num_samples[chosen]  # (n,)
    sizes = scale_to_total(num_samples, num_samples, merged_samples)  # (n,)
    return report_plan(round_num, fleet, facts, chosen, sizes, num_steps, num_exchanges=num_steps)


def plan_pooled(
    round_num: int, fleet: FleetView, merged_samples: int, num_steps: int, generator: np.random.Generator
) -> RoundPlan:
    """d_i of all workers at once: how many of B samples drawn from the pool, without replacement, are theirs (GPSL).

    (d_1, ..., d_N) is multivariate hypergeometric: the mean of d_i is B * n_i / sum_j n_j, and d_i <= n_i. [paper]
    A worker drawn no sample is not in the plan.

    Args:
        merged_samples: B, samples of one merged step; the plan's sum of d_i, or of all n_i if that is less.
    Returns: the plan; workers in the order of the fleet.
    Raises: ConfigError if no worker has samples, or B is less than 1.
    """
    facts = FleetFacts.of(fleet)
    if merged_samples < 1:
        raise ConfigError(f"{merged_samples} merged samples, expected at least 1: change training.batch_size")
    num_drawn = min(merged_samples, int(facts.num_samples.sum()))
    sizes = generator.multivariate_hypergeometric(facts.num_samples, num_drawn, method="marginals")  # (N,)
    chosen = np.flatnonzero(sizes)  # (n,)
    return report_plan(round_num, fleet, facts, chosen, sizes[chosen], num_steps, num_exchanges=num_steps)
