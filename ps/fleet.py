"""Who is here: the workers that have registered, what they said of themselves, and what was observed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesfl.control.estimates import Estimates
from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.messages import Register
from mergesfl.protocol.session import Session


@dataclass
class Member:
    """One worker's session.

    Attributes:
        peer: its address on the endpoint; None once it is gone.
        ready: it has built the model and may be chosen.
        silent: it missed a deadline and has not been heard since; not chosen until it speaks again.
    """

    worker_id: str
    peer: bytes
    session: Session
    device: str
    num_samples: int
    label_counts: tuple[int, ...]
    ready: bool = False
    silent: bool = False
    gone_reason: str | None = None


@dataclass
class Fleet:
    """All workers, those away included, keyed by worker_id.

    Args:
        num_classes: C of the run; a worker that holds a label beyond it is refused.
        sample_shape: shape of one sample of the run.
        estimates: the smoothed speeds (Eq. 5 and 6).
    """

    num_classes: int
    sample_shape: tuple[int, ...]
    estimates: Estimates
    by_peer: dict[bytes, Member] = field(default_factory=dict)
    by_id: dict[str, Member] = field(default_factory=dict)
    known_label_counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    participations: dict[str, int] = field(default_factory=dict)

    def admit(self, peer: bytes, message: Register, session: Session) -> Member:
        """Checks what a worker says of itself and adds it. Raises RemoteProtocolError: what is wrong, what to do."""
        counts = message.label_counts
        if message.sample_shape != self.sample_shape:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds samples of shape {message.sample_shape}, this run is for "
                f"{self.sample_shape}: start it with the data set of the run"
            )
        if len(counts) > self.num_classes and any(counts[self.num_classes :]):
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds labels up to {len(counts) - 1}, this run has {self.num_classes} "
                "classes: start it with the data set of the run"
            )
        counts = (counts + (0,) * self.num_classes)[: self.num_classes]
        if sum(counts) != message.num_samples:
            raise RemoteProtocolError(
                f"worker '{message.worker_id}' holds {message.num_samples} samples but counts {sum(counts)} labels"
            )
        member = Member(message.worker_id, peer, session, message.device, message.num_samples, counts)
        self.by_peer[peer] = member
        self.by_id[member.worker_id] = member
        self.known_label_counts[member.worker_id] = counts
        return member

    def remove(self, member: Member, reason: str) -> None:
        """Takes a worker out; what is known of it stays."""
        member.gone_reason = member.gone_reason or reason
        self.by_peer.pop(member.peer, None)
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

    def view(self, feature_bytes_per_sample: int) -> FleetView:
        """What a plan may know. Phi_0 is the mean over all workers ever seen, also those that are away now [ours]."""
        workers = []
        for member in self.available():
            compute_seconds, transfer_seconds = self.estimates.get(member.worker_id)
            workers.append(
                WorkerView(
                    member.worker_id,
                    member.num_samples,
                    member.label_counts,
                    compute_seconds,
                    transfer_seconds,
                    self.participations.get(member.worker_id, 0),
                )
            )
        return FleetView(tuple(workers), feature_bytes_per_sample, self._reference_distribution())

    def _reference_distribution(self) -> tuple[float, ...] | None:
        """Phi_0: unweighted mean of the label distributions (Eq. 12), in the order of worker_id."""
        rows = [self.known_label_counts[name] for name in sorted(self.known_label_counts)]
        shares = [[count / sum(row) for count in row] for row in rows if sum(row)]
        if not shares:
            return None
        return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the workers before they are back."""
        return {
            "estimates": self.estimates.state_dict(),
            "participations": dict(self.participations),
            "known_label_counts": {name: list(counts) for name, counts in self.known_label_counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self.estimates.load_state_dict(state["estimates"])
        self.participations = {str(name): int(count) for name, count in state["participations"].items()}
        self.known_label_counts = {
            str(name): tuple(int(count) for count in counts) for name, counts in state["known_label_counts"].items()
        }
