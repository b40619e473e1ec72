"""Who is here: the workers that have registered, what they said of themselves, and what was observed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesfl.control.divergence import data_distribution
from mergesfl.control.estimates import AffineEstimates, Estimates
from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.messages import Register
from mergesfl.protocol.session import Session
from mergesfl.training.state_mean import MAX_WEIGHT


@dataclass
class Member:
    """One worker's session.

    Attributes:
        peer: its address on the endpoint.
        registered_seconds: when, on the server's clock.
        ready: it has built the model and may be chosen.
        silent: it missed a deadline and has not been heard since; not chosen until it speaks again.
    """

    worker_id: str
    peer: bytes
    session: Session
    device: str
    num_samples: int
    label_counts: tuple[int, ...]
    registered_seconds: float = 0.0
    ready: bool = False
    silent: bool = False
    gone_reason: str | None = None


@dataclass
class Fleet:
    """All workers, those away included, keyed by worker_id.

    Args:
        class_names: (C,) of the run in label order; a worker that holds samples of another class is refused.
        sample_shape: shape of one sample of the run.
        estimates: the smoothed speeds (Eq. 5 and 6).
        max_workers: so many ids are known at most, those away included, and so many are not ready at a time: what
            strangers can add to Phi_0, to the checkpoint and to memory is bounded.
        affine: the other time model; both learn from every observation.
        time_model: "linear" or "affine": which of the two a plan is told.
        reference: "uniform" or "data": how the workers' label distributions are averaged to Phi_0.
    """

    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    estimates: Estimates
    max_workers: int
    affine: AffineEstimates = field(default_factory=AffineEstimates)
    time_model: str = "linear"
    reference: str = "uniform"
    by_peer: dict[bytes, Member] = field(default_factory=dict)
    by_id: dict[str, Member] = field(default_factory=dict)
    known_label_counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    participations: dict[str, int] = field(default_factory=dict)
    _not_ready: dict[bytes, Member] = field(default_factory=dict)  # by peer; a part of by_peer
    num_removed: int = 0  # sessions that have ended: as long as it stands still, nobody is newly gone

    @property
    def num_classes(self) -> int:
        """C of the run."""
        return len(self.class_names)

    def admit(self, peer: bytes, message: Register, session: Session) -> Member:
        """Checks what a worker says of itself and adds it. Raises RemoteProtocolError: what is wrong, what to do."""
        if message.sample_shape != self.sample_shape:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds samples of shape {message.sample_shape}, this run is for "
                f"{self.sample_shape}: start it with the data set of the run"
            )
        names = message.class_names
        if len(names) != len(message.label_counts) or len(set(names)) != len(names):
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' counts {len(message.label_counts)} labels under {len(names)} names, "
                f"{len(set(names))} of them distinct: give each class a name of its own"
            )
        count_of = dict(zip(names, message.label_counts, strict=True))
        known = frozenset(self.class_names)
        strange = next((name for name in names if count_of[name] and name not in known), None)
        if strange is not None:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds samples of class '{strange}', this run knows the "
                f"{self.num_classes} classes {', '.join(self.class_names)}: start it with data of the run, or give its "
                "classes the names of the run (npz: the member 'classes')"
            )
        counts = tuple(count_of.get(name, 0) for name in self.class_names)
        if sum(counts) != message.num_samples:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds {message.num_samples} samples but counts {sum(counts)} labels"
            )
        if message.num_samples > MAX_WEIGHT:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds {message.num_samples} samples, the limit is {MAX_WEIGHT}: give it "
                "a smaller share of the data"
            )
        self._check_room(message.worker_id)
        member = Member(message.worker_id, peer, session, message.device, message.num_samples, counts)
        self.by_peer[peer] = self._not_ready[peer] = member
        self.by_id[member.worker_id] = member
        return member

    def get_ready(self, member: Member) -> None:
        """The worker may be chosen from now on, and its labels count for Phi_0. Raises RemoteProtocolError."""
        self._check_room(member.worker_id)
        self.known_label_counts[member.worker_id] = member.label_counts
        member.ready = True
        self._not_ready.pop(member.peer, None)

    def not_ready(self) -> list[Member]:
        """The workers that have registered and not said more."""
        return list(self._not_ready.values())

    @property
    def num_not_ready(self) -> int:
        """How many those are."""
        return len(self._not_ready)

    @property
    def num_ready(self) -> int:
        """How many workers have got ready: at least as many as are available, and known without looking at each."""
        return len(self.by_peer) - len(self._not_ready)

    def _check_room(self, worker_id: str) -> None:
        num_known = len(self.known_label_counts)
        if num_known >= self.max_workers and worker_id not in self.known_label_counts:
            raise RemoteProtocolError(
                f"{num_known} different worker ids have taken part in this run, the limit is {self.max_workers} "
                "(10 * cluster.num_workers + 1000): start the worker under one of its earlier --id"
            )

    def remove(self, member: Member, reason: str) -> None:
        """Takes a worker out; what is known of it stays."""
        member.gone_reason = member.gone_reason or reason
        self.num_removed += 1
        self.by_peer.pop(member.peer, None)
        self._not_ready.pop(member.peer, None)
        if self.by_id.get(member.worker_id) is member:
            del self.by_id[member.worker_id]

    def available(self) -> list[Member]:
        """The workers that may be chosen now, ordered by worker_id."""
        return [
            self.by_id[name] for name in sorted(self.by_id) if self.by_id[name].ready and not self.by_id[name].silent
        ]

    def finished(self, worker_ids: Sequence[str]) -> None:
        """K_i += 1 for the workers that finished the round."""
        for worker_id in worker_ids:
            self.participations[worker_id] = self.participations.get(worker_id, 0) + 1

    def observe(
        self, worker_id: str, batch_size: int, compute_seconds_per_sample: float, transfer_seconds_per_sample: float
    ) -> None:
        """Teaches both time models how long the steps of a round took, per sample, at this batch size.

        Raises ValueError, changing nothing, if a figure is no duration.
        """
        self.estimates.observe(worker_id, compute_seconds_per_sample, transfer_seconds_per_sample)
        step_seconds = batch_size * (compute_seconds_per_sample + transfer_seconds_per_sample)
        self.affine.observe(worker_id, batch_size, step_seconds)

    def step_time(self, worker_id: str) -> tuple[float | None, float | None, float]:
        """(mu_i, beta_i, a_i): seconds per sample of computing and transfer, and fixed seconds per step.

        The affine model knows the sum of the two slopes only; it is shared as in the linear model. A worker that only
        the linear model knows (from a checkpoint of before) is planned with that.
        """
        mu, beta = self.estimates.get(worker_id)
        fixed_seconds, slope = self.affine.get(worker_id)
        if self.time_model == "linear" or mu is None or beta is None or fixed_seconds is None or slope is None:
            return mu, beta, 0.0
        compute_share = mu / (mu + beta) if mu + beta > 0 else 1.0
        return slope * compute_share, slope * (1 - compute_share), fixed_seconds

    def view(self, feature_bytes_per_sample: int) -> FleetView:
        """What a plan may know. Phi_0 is the mean over all workers ever seen, also those that are away now [ours]."""
        workers = []
        for member in self.available():
            compute_seconds, transfer_seconds, fixed_seconds = self.step_time(member.worker_id)
            workers.append(
                WorkerView(
                    member.worker_id,
                    member.num_samples,
                    member.label_counts,
                    compute_seconds,
                    transfer_seconds,
                    self.participations.get(member.worker_id, 0),
                    fixed_seconds,
                )
            )
        return FleetView(tuple(workers), feature_bytes_per_sample, self._reference_distribution())

    def _reference_distribution(self) -> tuple[float, ...] | None:
        """Phi_0: mean of the label distributions, unweighted (Eq. 12) or by samples, in the order of worker_id."""
        rows = [self.known_label_counts[name] for name in sorted(self.known_label_counts)]
        if self.reference == "data" and any(map(sum, rows)):
            return tuple(data_distribution(rows).tolist())
        shares = [[count / sum(row) for count in row] for row in rows if sum(row)]
        if not shares:
            return None
        return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the workers before they are back."""
        return {
            "estimates": self.estimates.state_dict(),
            "affine_estimates": self.affine.state_dict(),
            "participations": dict(self.participations),
            "known_label_counts": {name: list(counts) for name, counts in self.known_label_counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned; older checkpoints hold no affine estimates."""
        self.estimates.load_state_dict(state["estimates"])
        self.affine.load_state_dict(state.get("affine_estimates", {"workers": {}}))
        self.participations = {str(name): int(count) for name, count in state["participations"].items()}
        self.known_label_counts = {
            str(name): tuple(int(count) for count in counts) for name, counts in state["known_label_counts"].items()
        }
