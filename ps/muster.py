"""Who is here when a round begins: waiting for workers, for a quorum, and taking in what has arrived meanwhile."""

from __future__ import annotations

import logging
import math

from mergesfl.config import ClusterConfig
from mergesfl.errors import QuorumError
from mergesfl.runtime.clock import Clock
from ps.fleet import Fleet
from ps.progress import Progress
from ps.switchboard import Switchboard

log = logging.getLogger("ps")


class Muster:
    """Waits for workers, up to cluster.start_deadline_seconds."""

    def __init__(
        self, cluster: ClusterConfig, fleet: Fleet, switchboard: Switchboard, progress: Progress, clock: Clock
    ) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._switchboard = switchboard
        self._progress = progress
        self._clock = clock

    def quorum_of(self, num_workers: int) -> int:
        """How many of this many workers are enough."""
        return max(1, math.ceil(self._cluster.quorum_fraction * num_workers))

    def wait_for_all(self) -> None:
        """Until all are here; after the start deadline a quorum is enough. Raises QuorumError."""
        cluster = self._cluster
        quorum = self.quorum_of(cluster.num_workers)
        end_seconds = self._clock.now_seconds() + cluster.start_deadline_seconds
        while (num_here := self._num_here(cluster.num_workers)) < cluster.num_workers:
            self._progress.waiting(num_here, cluster.num_workers)
            remaining_seconds = end_seconds - self._clock.now_seconds()
            if remaining_seconds <= 0:
                num_here = len(self._fleet.available())
                if num_here >= quorum:
                    log.warning("starting with %d of %d workers", num_here, cluster.num_workers)
                    return
                raise QuorumError(
                    f"{num_here} of {cluster.num_workers} workers registered within "
                    f"{cluster.start_deadline_seconds:g} s (cluster.start_deadline_seconds), {quorum} are needed: "
                    "start the others with `mergesfl worker --connect`, or lower cluster.num_workers"
                )
            self._switchboard.receive(remaining_seconds)
        self._progress.waiting(num_here, cluster.num_workers)

    def wait_for_quorum(self) -> None:
        """Until enough workers are here (again). Raises QuorumError after the start deadline."""
        cluster = self._cluster
        needed = self.quorum_of(cluster.num_workers)
        end_seconds = self._clock.now_seconds() + cluster.start_deadline_seconds
        while self._num_here(needed) < needed:
            if self._clock.now_seconds() >= end_seconds:
                raise QuorumError(
                    f"{len(self._fleet.available())} of {cluster.num_workers} workers are left, {needed} are needed "
                    "(cluster.quorum_fraction): restart the others, then go on with --resume"
                )
            self._switchboard.receive(1.0)

    def call(self) -> None:
        """Before a round: takes in who joined or left meanwhile, and sees that there is a quorum with samples.

        Raises QuorumError when there is none, also after waiting.
        """
        self._switchboard.settle()
        if math.isfinite(self._switchboard.patience.probe_seconds):  # else nobody goes without a word
            self._switchboard.probe(self._fleet.available())
        self.wait_for_quorum()
        if self._has_samples():
            return
        self.wait_for_all()
        if not self._has_samples():
            raise QuorumError(
                f"none of the {len(self._fleet.available())} workers that are here has samples, at least one is "
                "needed: check the partition or the workers' data sets, restart those that are lost, then go on with "
                "--resume"
            )

    def _num_here(self, num_enough: int) -> int:
        """The workers that may be chosen. They are looked at one by one only where they could be enough: this is asked
        after every message, and 10,000 workers send two each until they are ready."""
        num_ready = self._fleet.num_ready
        return num_ready if num_ready < num_enough else len(self._fleet.available())

    def _has_samples(self) -> bool:
        return any(member.num_samples for member in self._fleet.available())
