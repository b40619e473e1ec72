"""Algorithm 1: which workers take part in a round, with which batch sizes. And the plain plan of the baselines.

How the set is searched ("auto"): up to 12 workers all sets are tried. Above that it is greedy + swaps (`swapping`), by
measurement (benchmarks/micro/planner.py). With 10 places among 80 to 10,000 workers its sets cost 17 to 37 % less than
those of the genetic search and merge a sample in less than half of the time; it plans 10,000 workers in 0.1 to 0.5 s
where the genetic search takes 0.5 to 2.2 s. Where all sets can be tried it is within 0.0024 nats of the best on
average, the genetic search within 0.0009. With 100 places, or as many as the budget takes, the genetic search finds
sets that cost less by up to 0.003 nats: below what matters (epsilon is 0.05). It stays as the paper's: "genetic". The
convex relaxation ("convex") takes the least time up to 1,000 workers, but where few of many are chosen swaps do not win
back what rounding loses. What is uncertain: on 1,000 workers and more the cheaper sets are also the more alike ones, so
that fewer workers have had a turn after the same rounds; priority_weight_nats is there to change that.

Legend: N workers, n chosen workers, C classes, d_i samples per step of worker i, D their sum, c bytes per sample at the
cut, B bytes that the ingress takes per step, tau steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergesfl.control.batching import batch_caps, equal_time_sizes, regulated_batch_sizes
from mergesfl.control.convex import relax_and_round
from mergesfl.control.divergence import idle_seconds, kl_nats, mixture, round_seconds
from mergesfl.control.facts import FleetFacts
from mergesfl.control.filling import fill_budget
from mergesfl.control.finetuning import finetune
from mergesfl.control.fleet import FleetView, IntArray
from mergesfl.control.genetic import genetic
from mergesfl.control.objective import BoolArray, SelectionProblem
from mergesfl.control.plan import RoundPlan
from mergesfl.control.searching import brute_force
from mergesfl.control.settings import ControlSettings, at_least
from mergesfl.control.swapping import greedy_swaps
from mergesfl.errors import ConfigError

# Up to here all 2^N sets are tried, in about 2 ms: faster than any search, and the best there is. [ours]
EXACT_MAX_WORKERS = 12

_SEARCHES: dict[str, Callable[[SelectionProblem, ControlSettings, np.random.Generator], BoolArray]] = {
    "genetic": lambda problem, settings, generator: genetic(problem, settings.genetic, generator),
    "greedy-swaps": lambda problem, settings, generator: greedy_swaps(problem, generator),
    "convex": lambda problem, settings, generator: relax_and_round(problem, generator),
}


def find_set(problem: SelectionProblem, settings: ControlSettings, generator: np.random.Generator) -> BoolArray:
    """(N,) the set that the chosen search finds; "auto": see the module."""
    if settings.search != "auto":
        return _SEARCHES[settings.search](problem, settings, generator)
    if problem.num_workers <= EXACT_MAX_WORKERS:
        return brute_force(problem)
    return greedy_swaps(problem, generator)


def plan_round(
    round_num: int, fleet: FleetView, settings: ControlSettings, generator: np.random.Generator
) -> RoundPlan:
    """Plans one round of MergeSFL: batch sizes, set, fine-tuning, filling of the budget (Algorithm 1). [paper]

    Details decided here [ours]: D_max is lowered to the budget if it is larger, else the fastest could never take part;
    an unknown speed is taken as the median of the known ones; the set is the one of least cost in `objective`, searched
    as settings.search says; the budget is filled as far as the KL stays within epsilon, or, where it is
    above already, grows by at most 1 %. While no speed at all is known the predicted seconds are 0.

    Returns: the plan; workers in the order of the fleet. Its sum of d_i * c is at most B, every d_i at least 1.
    Raises: ConfigError if no worker has samples, or the budget is less than one sample.
    """
    facts = FleetFacts.of(fleet, settings.reference)
    sample_bytes = fleet.feature_bytes_per_sample
    budget_samples = settings.ingress_budget_bytes // sample_bytes
    if budget_samples < 1:
        raise ConfigError(
            f"ingress budget of {settings.ingress_budget_bytes} bytes per step is less than one sample at the cut, "
            f"{sample_bytes} bytes: raise ingress_budget_bytes or cut where features are smaller"
        )
    max_batch_size = min(settings.max_batch_size, budget_samples)
    problem = selection_problem(facts, budget_samples, max_batch_size, settings)
    chosen = np.flatnonzero(find_set(problem, settings, generator))  # (n,)
    batch_sizes, kl_before_nats = _sizes_of_set(
        facts, chosen, problem.batch_sizes[chosen], budget_samples, max_batch_size, settings
    )
    return report_plan(
        round_num,
        fleet,
        facts,
        chosen,
        batch_sizes,
        kl_before_nats=kl_before_nats,
        num_steps=settings.num_steps,
        num_exchanges=settings.num_exchanges,
        ingress_budget_bytes=settings.ingress_budget_bytes,
    )


def selection_problem(
    facts: FleetFacts, budget_samples: int, max_batch_size: int, settings: ControlSettings
) -> SelectionProblem:
    """The choice of the set, with the batch sizes of Eq. 9."""
    fixed, per_sample = facts.fixed_seconds_per_step, facts.seconds_per_sample  # (N,) each
    sizes = regulated_batch_sizes(per_sample, facts.num_samples, max_batch_size, fixed)  # (N,)
    return SelectionProblem.of(
        sizes,
        facts.distributions,
        facts.reference,
        facts.priorities,
        budget_samples,
        settings.max_participants,
        settings.fill_weight_nats,
        settings.priority_weight_nats,
        settings.idle_weight_nats,
        round_seconds(sizes, per_sample, 1, fixed),
    )


def _sizes_of_set(
    facts: FleetFacts,
    chosen: IntArray,
    regulated: IntArray,
    budget_samples: int,
    max_batch_size: int,
    settings: ControlSettings,
) -> tuple[IntArray, float]:
    """((n,) d_i after fine-tuning (Eq. 14) and filling, KL before both in nats) of the (n,) d_i of Eq. 9.

    In the linear time model one factor fills the budget and all still end together. With fixed costs that is not so:
    there the sizes of equal time are found anew for the filled budget, before the labels are looked at. [ours]
    """
    fixed, per_sample = facts.fixed_seconds_per_step[chosen], facts.seconds_per_sample[chosen]  # (n,) each
    distributions = facts.distributions[chosen]  # (n, C)
    caps = batch_caps(facts.num_samples[chosen], max_batch_size, settings.allow_above_max)  # (n,)
    least = int(regulated.sum())  # D
    most = min(budget_samples, int(caps.sum())) if settings.fill_budget else least
    sizes = equal_time_sizes(fixed, per_sample, caps, most) if fixed.any() and most > least else regulated
    tuning = finetune(
        sizes,
        caps,
        per_sample,
        distributions,
        facts.reference,
        settings.kl_epsilon_nats,
        settings.max_slowdown,
        fixed,
    )
    limit_nats = max(settings.kl_epsilon_nats, 1.01 * tuning.kl_nats)
    batch_sizes = fill_budget(
        tuning.weights, caps, least, most, limit_nats, distributions, facts.reference, per_sample, fixed
    )
    if kl_nats(mixture(batch_sizes, distributions), facts.reference) > max(limit_nats, tuning.kl_before_nats):
        batch_sizes = sizes  # rounding so few samples did more harm than tuning did good
    return batch_sizes, tuning.kl_before_nats


def plan_uniform(
    round_num: int,
    fleet: FleetView,
    num_participants: int,
    batch_size: int,
    num_steps: int,
    num_exchanges: int,
    generator: np.random.Generator,
) -> RoundPlan:
    """Plans one round without regulation: workers drawn at random, the same batch size for all (the baselines).

    A batch is never larger than the worker's own samples, and a worker without samples is never drawn. [ours]

    Returns: the plan; workers in the order of the fleet, fewer than num_participants if not so many have samples.
    Raises: ConfigError if no worker has samples, or fewer than one worker or sample is asked for.
    """
    for name, value in (("num_participants", num_participants), ("batch_size", batch_size), ("num_steps", num_steps)):
        at_least(1, name, value)
    facts = FleetFacts.of(fleet)
    chosen = draw_participants(facts, num_participants, generator)  # (n,)
    sizes: IntArray = np.minimum(batch_size, facts.num_samples[chosen])
    return report_plan(round_num, fleet, facts, chosen, sizes, num_steps, num_exchanges)


def draw_participants(facts: FleetFacts, num_participants: int, generator: np.random.Generator) -> IntArray:
    """(n,) workers drawn at random in the order of the fleet, none without samples; fewer if not so many have any."""
    candidates = np.flatnonzero(facts.num_samples > 0)
    return np.sort(generator.choice(candidates, size=min(num_participants, len(candidates)), replace=False))


def report_plan(
    round_num: int,
    fleet: FleetView,
    facts: FleetFacts,
    chosen: IntArray,
    batch_sizes: IntArray,
    num_steps: int,
    num_exchanges: int,
    kl_before_nats: float | None = None,
    ingress_budget_bytes: int = 0,
) -> RoundPlan:
    """Everything that a plan reports about (n,) chosen workers and their batch sizes.

    kl_before_nats: None where nothing was tuned; ingress_budget_bytes: 0 without a budget.
    """
    kl_after_nats = kl_nats(mixture(batch_sizes, facts.distributions[chosen]), facts.reference)
    predicted_seconds = np.zeros(len(chosen))  # (n,)
    if facts.are_seconds_known:
        fixed, per_sample = facts.fixed_seconds_per_step[chosen], facts.seconds_per_sample[chosen]  # (n,) each
        predicted_seconds = round_seconds(batch_sizes, per_sample, num_steps, fixed)
    return RoundPlan(
        round_num=round_num,
        worker_ids=tuple(fleet.workers[i].worker_id for i in chosen),
        batch_sizes=tuple(batch_sizes.tolist()),
        num_steps=num_steps,
        num_exchanges=num_exchanges,
        predicted_seconds=tuple(predicted_seconds.tolist()),
        predicted_idle_seconds=idle_seconds(predicted_seconds),
        kl_before_nats=kl_after_nats if kl_before_nats is None else kl_before_nats,
        kl_after_nats=kl_after_nats,
        ingress_budget_bytes=ingress_budget_bytes,
        ingress_bytes_per_step=int(batch_sizes.sum()) * fleet.feature_bytes_per_sample if num_exchanges else 0,
    )
