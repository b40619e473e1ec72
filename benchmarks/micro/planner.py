"""How long planning takes, and how far the genetic search is from the best set: `python -m benchmarks.micro.planner`.

The fleets are like HAR's: 6 classes spread by Dir(0.1) over the workers, about 92 samples per worker (7,352 over 80),
speeds log-uniform over a factor of 100, 8,192 bytes per sample at the cut, and a budget for 10 workers x 64 samples.
Rounds follow each other with the participation counters that they lead to.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import numpy as np

from mergesfl.control.batching import regulated_batch_sizes
from mergesfl.control.divergence import label_distributions, mean_distribution, priorities
from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.control.genetic import GeneticSettings, genetic
from mergesfl.control.objective import SelectionProblem
from mergesfl.control.searching import brute_force, greedy
from mergesfl.control.selection import ControlSettings, plan_round

SAMPLE_BYTES = 8_192  # HAR's cut: 32 x 32 x 2 floats
BUDGET_SAMPLES = 640
SETTINGS = ControlSettings(
    max_batch_size=64, ingress_budget_bytes=BUDGET_SAMPLES * SAMPLE_BYTES, num_steps=10, num_exchanges=10
)


def har_like_fleet(num_workers: int, generator: np.random.Generator, level: float = 10.0) -> FleetView:
    """A fleet whose label counts follow Dir(1 / level) per class and whose speeds span a factor of 100."""
    num_classes, samples_per_class = 6, 1225 * num_workers // 80
    counts = np.zeros((num_workers, num_classes), dtype=np.int64)
    for label in range(num_classes):
        shares = generator.dirichlet(np.full(num_workers, 1 / level))
        counts[:, label] = generator.multinomial(samples_per_class, shares)
    seconds = 1e-4 * 100 ** generator.random(num_workers)
    workers = tuple(
        WorkerView(f"w{i:04d}", int(counts[i].sum()), tuple(counts[i].tolist()), seconds[i] / 2, seconds[i] / 2)
        for i in range(num_workers)
    )
    return FleetView(workers, SAMPLE_BYTES)


def small_problem(num_workers: int, generator: np.random.Generator, weight_nats: float) -> SelectionProblem:
    """A set choice of random size, heterogeneity and tightness of the budget."""
    distributions = label_distributions(
        [generator.multinomial(200, generator.dirichlet(np.full(6, 0.3))) for _ in range(num_workers)]  # type: ignore[misc]
    )
    seconds = 100 ** generator.random(num_workers)
    sizes = regulated_batch_sizes(seconds, generator.integers(1, 300, num_workers), 64)
    budget = max(int(sizes.max()), int(sizes.sum() * generator.uniform(0.2, 0.9)))
    turns = priorities(generator.integers(0, 20, num_workers))
    reference = mean_distribution(distributions)
    return SelectionProblem.of(sizes, distributions, reference, turns, budget, None, weight_nats, weight_nats)


def planning_row(num_workers: int, num_rounds: int) -> str:
    """One line: planning time and what the plans are like, over consecutive rounds of one fleet."""
    generator = np.random.default_rng(num_workers)
    fleet = har_like_fleet(num_workers, generator)
    seconds, before, after, chosen, fill = [], [], [], [], []
    counts = {worker.worker_id: 0 for worker in fleet.workers}
    for round_num in range(num_rounds):
        workers = tuple(dataclasses.replace(w, num_participations=counts[w.worker_id]) for w in fleet.workers)
        begin = time.perf_counter()
        plan = plan_round(round_num, dataclasses.replace(fleet, workers=workers), SETTINGS, generator)
        seconds.append(time.perf_counter() - begin)
        for worker_id in plan.worker_ids:
            counts[worker_id] += 1
        before.append(plan.kl_before_nats)
        after.append(plan.kl_after_nats)
        chosen.append(len(plan.worker_ids))
        fill.append(plan.ingress_bytes_per_step / plan.ingress_budget_bytes)
    with_samples = [worker.worker_id for worker in fleet.workers if worker.num_samples > 0]
    met = sum(counts[worker_id] > 0 for worker_id in with_samples)
    return (
        f"| {num_workers} | {num_rounds} | {1e3 * statistics.median(seconds):.1f} | {1e3 * max(seconds):.1f} | "
        f"{np.mean(chosen):.1f} | {100 * np.mean(fill):.0f} % | {np.mean(before):.4f} | {np.mean(after):.4f} | "
        f"{met} of {len(with_samples)} |"
    )


def gap_row(num_workers: int, num_problems: int, weight_nats: float) -> str:
    """One line: cost of greedy and of the genetic search above the best set's."""
    generator = np.random.default_rng(1000 + num_workers)
    gaps = []  # (greedy, genetic) in nats
    for _ in range(num_problems):
        problem = small_problem(num_workers, generator, weight_nats)
        best = problem.cost(brute_force(problem))
        found = genetic(problem, GeneticSettings(), generator)
        gaps.append((problem.cost(greedy(problem)) - best, problem.cost(found) - best))
    by_greedy, by_genetic = np.array(gaps).T
    return (
        f"| {num_workers} | {weight_nats} | {num_problems} | {by_greedy.mean():.2e} | {by_genetic.mean():.2e} | "
        f"{by_genetic.max():.2e} | {100 * np.mean(by_genetic < 1e-9):.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds planned per fleet size")
    parser.add_argument("--problems", type=int, default=100, help="small problems per size for the gap to brute force")
    arguments = parser.parse_args()
    print("| workers | rounds | ms, median | ms, max | chosen | budget used | KL before | KL after | ever chosen |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_workers in (10, 80, 1000):
        print(planning_row(num_workers, arguments.rounds))
    print("\n| workers | weights, nats | problems | greedy gap, mean | genetic gap, mean | max | optimal |")
    print("|---|---|---|---|---|---|---|")
    for num_workers in (6, 9, 12, 16):
        for weight_nats in (0.0, SETTINGS.fill_weight_nats):
            print(gap_row(num_workers, arguments.problems, weight_nats))


if __name__ == "__main__":
    main()
