"""A plan whose batch sizes follow the speeds of workers that were drawn at random (AdaSFL). No label plays a part.

Legend: N workers, n chosen workers, d_i samples per step, t_i seconds per sample of worker i, tau steps.
"""

from __future__ import annotations

import numpy as np

from mergesfl.control.batching import regulated_batch_sizes
from mergesfl.control.facts import FleetFacts
from mergesfl.control.fleet import FleetView
from mergesfl.control.plan import RoundPlan
from mergesfl.control.selection import draw_participants, report_plan
from mergesfl.errors import ConfigError


def plan_by_speed(
    round_num: int,
    fleet: FleetView,
    num_participants: int,
    max_batch_size: int,
    num_steps: int,
    generator: np.random.Generator,
) -> RoundPlan:
    """Workers drawn at random, d_i = max(1, floor(D_max * t_min / t_i)), t_min of the fastest drawn (AdaSFL). [paper]

    Never more than the worker's own samples; a worker without samples is never drawn. [ours]

    Args:
        max_batch_size: D_max.
    Returns: the plan; workers in the order of the fleet, fewer than num_participants if not so many have samples.
    Raises: ConfigError if no worker has samples, or fewer than one worker is asked for.
    """
    if num_participants < 1:
        raise ConfigError(
            f"{num_participants} participants, expected at least 1: change control.participants_per_round"
        )
    facts = FleetFacts.of(fleet)
    chosen = draw_participants(facts, num_participants, generator)  # (n,)
    sizes = regulated_batch_sizes(
        facts.seconds_per_sample[chosen],
        facts.num_samples[chosen],
        max_batch_size,
        facts.fixed_seconds_per_step[chosen],
    )  # (n,)
    return report_plan(round_num, fleet, facts, chosen, sizes, num_steps, num_exchanges=num_steps)
