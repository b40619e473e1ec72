"""Algorithm 1: which workers take part in a round, with which batch sizes. And the plain plan of the baselines.

Legend: N workers, n chosen workers, C classes, d_i samples per step of worker i, D their sum, c bytes per sample at the
cut, B bytes that the ingress takes per step, tau steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mergesfl.control.batching import batch_caps, regulated_batch_sizes
from mergesfl.control.divergence import idle_seconds, kl_nats, mixture, round_seconds
from mergesfl.control.facts import FleetFacts
from mergesfl.control.filling import fill_budget
from mergesfl.control.finetuning import finetune
from mergesfl.control.fleet import FleetView, IntArray
from mergesfl.control.genetic import GeneticSettings, genetic
from mergesfl.control.objective import SelectionProblem
from mergesfl.control.plan import RoundPlan
from mergesfl.control.searching import brute_force
from mergesfl.errors import ConfigError

# Up to here all 2^N sets are tried, in about 2 ms: faster than the genetic search, and the best there is. [ours]
EXACT_MAX_WORKERS = 12


@dataclass(frozen=True)
class ControlSettings:
    """Settings of the control module.

    Attributes:
        max_batch_size: D_max, batch size of the fastest worker (Eq. 9). [paper]
        ingress_budget_bytes: B of Eq. 10, feature bytes that the server's ingress takes per step. [paper]
        num_steps: tau.
        num_exchanges: tau for a split method, 0 for a federated one.
        kl_epsilon_nats: bound on the KL of the merged labels (Eq. 14); 0.05 [paper].
        fill_budget: scale all d_i by one factor to fill the budget. [paper]
        allow_above_max: whether that factor may take d_i past D_max (never past the worker's own samples). [ours]
        max_participants: most workers of a round; None: as many as the budget takes.
        max_slowdown: fine-tuning (Eq. 14) may make a merged sample take at most so many times longer; inf: as in the
            paper. Without a limit one sample more from a worker 100 times slower can stall a whole round. [ours]
        fill_weight_nats: KL that a set may be worse for filling all of the budget instead of nothing. [ours]
        priority_weight_nats: KL that a set may be worse for workers that were never chosen. [ours]
        genetic: how long to search.
    """

    max_batch_size: int
    ingress_budget_bytes: int
    num_steps: int
    num_exchanges: int
    kl_epsilon_nats: float = 0.05
    fill_budget: bool = True
    allow_above_max: bool = True
    max_participants: int | None = None
    max_slowdown: float = 4.0
    fill_weight_nats: float = 0.02
    priority_weight_nats: float = 0.02
    genetic: GeneticSettings = field(default_factory=GeneticSettings)

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "ingress_budget_bytes", "num_steps"):
            _at_least(1, name, getattr(self, name))
        for name in ("num_exchanges", "kl_epsilon_nats", "fill_weight_nats", "priority_weight_nats"):
            _at_least(0, name, getattr(self, name))
        _at_least(1, "max_slowdown", self.max_slowdown)
        if self.max_participants is not None:
            _at_least(1, "max_participants", self.max_participants)


def plan_round(
    round_num: int, fleet: FleetView, settings: ControlSettings, generator: np.random.Generator
) -> RoundPlan:
    """Plans one round of MergeSFL: batch sizes, set, fine-tuning, filling of the budget (Algorithm 1). [paper]

    Details decided here [ours]: D_max is lowered to the budget if it is larger, else the fastest could never take part;
    an unknown speed is taken as the median of the known ones; the set is the one of least cost in `objective`, searched
    exactly up to EXACT_MAX_WORKERS workers; the budget is filled as far as the KL stays within epsilon, or, where it is
    above already, grows by at most 1 %. While no speed at all is known the predicted seconds are 0.

    Returns: the plan; workers in the order of the fleet. Its sum of d_i * c is at most B, every d_i at least 1.
    Raises: ConfigError if no worker has samples, or the budget is less than one sample.
    """
    facts = FleetFacts.of(fleet)
    sample_bytes = fleet.feature_bytes_per_sample
    budget_samples = settings.ingress_budget_bytes // sample_bytes
    if budget_samples < 1:
        raise ConfigError(
            f"ingress budget of {settings.ingress_budget_bytes} bytes per step is less than one sample at the cut, "
            f"{sample_bytes} bytes: raise ingress_budget_bytes or cut where features are smaller"
        )
    max_batch_size = min(settings.max_batch_size, budget_samples)
    sizes = regulated_batch_sizes(facts.seconds_per_sample, facts.num_samples, max_batch_size)  # (N,) Eq. 9
    problem = SelectionProblem.of(
        sizes,
        facts.distributions,
        facts.reference,
        facts.priorities,
        budget_samples,
        settings.max_participants,
        settings.fill_weight_nats,
        settings.priority_weight_nats,
    )
    if problem.num_workers <= EXACT_MAX_WORKERS:
        members = brute_force(problem)
    else:
        members = genetic(problem, settings.genetic, generator)
    chosen = np.flatnonzero(members)  # (n,)

    caps = batch_caps(facts.num_samples[chosen], max_batch_size, settings.allow_above_max)  # (n,)
    tuning = finetune(
        sizes[chosen],
        caps,
        facts.seconds_per_sample[chosen],
        facts.distributions[chosen],
        facts.reference,
        settings.kl_epsilon_nats,
        settings.max_slowdown,
    )
    total = int(sizes[chosen].sum())  # D
    limit_nats = max(settings.kl_epsilon_nats, 1.01 * tuning.kl_nats)
    largest = min(budget_samples, int(caps.sum())) if settings.fill_budget else total
    batch_sizes = fill_budget(
        tuning.weights,
        caps,
        total,
        largest,
        limit_nats,
        facts.distributions[chosen],
        facts.reference,
        facts.seconds_per_sample[chosen],
    )
    kl = kl_nats(mixture(batch_sizes, facts.distributions[chosen]), facts.reference)
    if kl > max(limit_nats, tuning.kl_before_nats):  # rounding so few samples did more harm than tuning did good
        batch_sizes = sizes[chosen]
    return _plan(
        round_num,
        fleet,
        facts,
        chosen,
        batch_sizes,
        kl_before_nats=tuning.kl_before_nats,
        num_steps=settings.num_steps,
        num_exchanges=settings.num_exchanges,
        ingress_budget_bytes=settings.ingress_budget_bytes,
    )


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
        _at_least(1, name, value)
    facts = FleetFacts.of(fleet)
    candidates = np.flatnonzero(facts.num_samples > 0)
    chosen = np.sort(generator.choice(candidates, size=min(num_participants, len(candidates)), replace=False))
    sizes: IntArray = np.minimum(batch_size, facts.num_samples[chosen])
    return _plan(
        round_num,
        fleet,
        facts,
        chosen,
        sizes,
        kl_before_nats=None,
        num_steps=num_steps,
        num_exchanges=num_exchanges,
        ingress_budget_bytes=0,
    )


def _at_least(least: float, name: str, value: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {value}, expected at least {least}: change it in the configuration")


def _plan(
    round_num: int,
    fleet: FleetView,
    facts: FleetFacts,
    chosen: IntArray,
    batch_sizes: IntArray,
    kl_before_nats: float | None,
    num_steps: int,
    num_exchanges: int,
    ingress_budget_bytes: int,
) -> RoundPlan:
    """Everything that a plan reports about (n,) chosen workers and their batch sizes."""
    kl_after_nats = kl_nats(mixture(batch_sizes, facts.distributions[chosen]), facts.reference)
    seconds = facts.seconds_per_sample[chosen] if facts.are_seconds_known else np.zeros(len(chosen))  # (n,)
    predicted_seconds = round_seconds(batch_sizes, seconds, num_steps)
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
