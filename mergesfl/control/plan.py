"""A round plan: who takes part in a round, with which batch size, and what the planner expects of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundPlan:
    """The decision for one round; the plan order of workers is the order of the merged sequence.

    Attributes:
        round_num: h, counted from 0.
        worker_ids: S in plan order.
        batch_sizes: d_i in samples, in plan order.
        num_steps: tau, local steps of every worker.
        num_exchanges: tau for a split method (features up, gradients down), 0 for a federated one.
        predicted_seconds: t_i of Eq. 7, in plan order.
        predicted_idle_seconds: W, mean over S of (max_j t_j - t_i).
        kl_before_nats: KL(Phi || Phi_0) of Eq. 12 of the set S before the fine-tuning of the batch sizes (Eq. 14).
        kl_after_nats: the same for the batch sizes of this plan.
        ingress_budget_bytes: B of Eq. 10, per step; 0 when the method has no budget.
        ingress_bytes_per_step: sum of d_i * c.
    """

    round_num: int
    worker_ids: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    num_steps: int
    num_exchanges: int
    predicted_seconds: tuple[float, ...]
    predicted_idle_seconds: float
    kl_before_nats: float
    kl_after_nats: float
    ingress_budget_bytes: int
    ingress_bytes_per_step: int

    def batch_size_of(self, worker_id: str) -> int:
        """d_i of one worker of the plan. Raises KeyError for a worker that is not in it."""
        try:
            return self.batch_sizes[self.worker_ids.index(worker_id)]
        except ValueError:
            raise KeyError(worker_id) from None
