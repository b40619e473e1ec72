"""What a set of workers costs: the one objective that greedy, genetic and exhaustive search share.

    cost(S) = KL(Phi(S) || Phi_0)                             Eq. 12 [paper]
            + fill_weight     * (1 - D(S) / D_full)           [ours]  D_full = min(budget, sum of all d_i)
            + priority_weight * (1 - mean over S of p_i / p_max)      [ours]

The paper minimises KL alone. On a large fleet very many sets are nearly optimal, and KL alone (a) likes tiny sets: one
worker whose labels happen to be balanced beats twenty; (b) chooses the same set every round, so the others' data are
never used. So among sets of nearly equal KL (a few hundredths of a nat, the two weights) the one that fills more of the
budget and whose members were chosen less often wins. Weights of 0 give the paper's objective.

Legend: N workers, C classes, K candidate sets; d_i, D samples; p_i priority (Eq. 13).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergesfl.control.divergence import kl_of_masses, log_reference
from mergesfl.control.fleet import FloatArray, IntArray

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class SelectionProblem:
    """One choice of a set under the budget, prepared for many evaluations.

    Everything the cost needs is a sum over the members, so a set is summed up in one row of C + 3 numbers, its totals,
    and adding, dropping or swapping a worker is adding and subtracting rows.

    Attributes:
        rows: (N + 1, C + 3) per worker: d_i V_i (C), d_i, p_i / p_max, 1. The last row is zero: "nobody", so that
            adding and dropping are swaps with nobody.
        batch_sizes: (N,) d_i.
        eligible: (N,) d_i >= 1 and within the budget.
        priorities: (N,) p_i, 0 for workers that are not eligible.
        log_reference: (C,) ln Phi_0.
        budget_samples: most samples per step (Eq. 10).
        max_participants: most workers of a set.
        full_samples: D_full.
        fill_weight_nats: see the module.
        priority_weight_nats: see the module.
    """

    rows: FloatArray
    batch_sizes: IntArray
    eligible: BoolArray
    priorities: FloatArray
    log_reference: FloatArray
    budget_samples: int
    max_participants: int
    full_samples: int
    fill_weight_nats: float
    priority_weight_nats: float

    @classmethod
    def of(
        cls,
        batch_sizes: IntArray,
        distributions: FloatArray,
        reference: FloatArray,
        priorities: FloatArray,
        budget_samples: int,
        max_participants: int | None = None,
        fill_weight_nats: float = 0.0,
        priority_weight_nats: float = 0.0,
    ) -> SelectionProblem:
        """Prepares the problem from (N,) d_i, (N, C) V_i, (C,) Phi_0 and (N,) p_i. ValueError if no set is possible."""
        sizes = np.asarray(batch_sizes, dtype=np.int64)
        eligible = (sizes >= 1) & (sizes <= budget_samples)  # (N,)
        num_workers, num_classes = distributions.shape
        limit = num_workers if max_participants is None else max_participants
        if not eligible.any() or limit < 1:
            raise ValueError(
                f"no set of workers is possible: batch sizes {sizes.tolist()[:10]}, budget {budget_samples} samples, "
                f"at most {limit} workers: raise the budget"
            )
        rows = np.zeros((num_workers + 1, num_classes + 3))
        rows[:-1, :num_classes] = sizes[:, None] * distributions
        rows[:-1, num_classes] = sizes
        rows[:-1, num_classes + 1] = priorities / priorities[eligible].max()
        rows[:-1, num_classes + 2] = 1
        return cls(
            rows=rows,
            batch_sizes=sizes,
            eligible=eligible,
            priorities=np.where(eligible, priorities, 0.0),
            log_reference=log_reference(reference),
            budget_samples=int(budget_samples),
            max_participants=int(limit),
            full_samples=int(min(budget_samples, sizes[eligible].sum())),
            fill_weight_nats=fill_weight_nats,
            priority_weight_nats=priority_weight_nats,
        )

    @property
    def num_workers(self) -> int:
        """N."""
        return len(self.batch_sizes)

    def totals(self, sets: BoolArray) -> FloatArray:
        """(K, C + 3) totals of K sets, given as (K, N) membership."""
        return np.asarray(sets.astype(np.float64) @ self.rows[:-1], dtype=np.float64)

    def costs_of_totals(self, totals: FloatArray) -> FloatArray:
        """(K,) cost of each set in nats; infinite if a set is empty, over the budget or has too many workers."""
        merged, priority, members = totals[:, -3], totals[:, -2], totals[:, -1]  # (K,) each
        allowed = (merged < self.budget_samples + 0.5) & (members < self.max_participants + 0.5) & (members > 0.5)
        masses = np.maximum(totals[:, :-3], 0.0)  # subtracting rows may leave -1e-17
        cost = kl_of_masses(masses, self.log_reference)
        cost = cost + self.fill_weight_nats * (1 - merged / self.full_samples)
        cost = cost + self.priority_weight_nats * (1 - priority / np.maximum(members, 1))
        return np.where(allowed, cost, np.inf)

    def costs(self, sets: BoolArray) -> FloatArray:
        """(K,) cost of (K, N) sets in nats; infinite for a set that is not allowed."""
        cost = self.costs_of_totals(self.totals(sets))
        return np.where((sets & ~self.eligible).any(axis=1), np.inf, cost)

    def cost(self, members: BoolArray) -> float:
        """Cost of one (N,) set in nats."""
        return float(self.costs(members[None])[0])
