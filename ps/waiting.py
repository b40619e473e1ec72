"""Waiting for answers of several workers, up to a deadline, while those that have died are noticed."""

from __future__ import annotations

from collections.abc import Callable, Collection

from mergesfl.runtime.clock import Clock
from ps.fleet import Member
from ps.switchboard import RoundMessage, Switchboard

OVERTIME_SECONDS = 1.0  # for reading what had arrived by the deadline (this process may have been suspended)
# After a while the next probe comes at most this much later than was waited already. A worker that computes reads no
# probes, and its queue holds 64 (mergesfl.transport.settings): one per second would take a worker for dead that
# computes for a minute.
PROBE_GROWTH = 0.2


class Probing:
    """When the next probe is due; one object per step, also where its waiting is made of many short waits."""

    def __init__(self, clock: Clock, first_seconds: float) -> None:
        """The first probe comes so long after now, and every later one no sooner after the one before."""
        self._begin_seconds = clock.now_seconds()
        self._interval_seconds = first_seconds
        self.next_seconds = self._begin_seconds + first_seconds

    def probed(self, now_seconds: float) -> None:
        """A probe was sent: plans the next."""
        self.next_seconds = now_seconds + max(
            self._interval_seconds, PROBE_GROWTH * (now_seconds - self._begin_seconds)
        )


def wait_for_answers(
    switchboard: Switchboard,
    clock: Clock,
    deadline_seconds: float,
    missing: Callable[[], Collection[Member]],
    take: Callable[[Member, RoundMessage], None],
    probing: Probing | None = None,
) -> None:
    """Receives until nobody is missing or the deadline has passed. Raises InterruptedRunError.

    Args:
        switchboard: all sessions.
        clock: measures the deadline.
        deadline_seconds: from now on, without the time that `take` takes: what waits meanwhile is not late.
        missing: who has not answered yet and is not gone; asked before every look.
        take: what to do with a message; of anybody, also of those that nobody waits for.
        probing: when to probe, if this wait goes on with an earlier one; None: it begins now.
    """
    end_seconds = clock.now_seconds() + deadline_seconds
    probing = probing or Probing(clock, switchboard.patience.probe_seconds)
    while waited_for := missing():
        now_seconds, num_messages = clock.now_seconds(), switchboard.num_messages
        if now_seconds >= end_seconds + OVERTIME_SECONDS:
            return
        if now_seconds >= probing.next_seconds:
            switchboard.probe(waited_for)
            probing.probed(now_seconds)
        got = switchboard.receive(max(min(end_seconds, probing.next_seconds) - now_seconds, 0.0))
        if now_seconds >= end_seconds and switchboard.num_messages == num_messages:
            return  # nothing more had arrived in time
        if got is not None:
            begin_seconds = clock.now_seconds()
            take(*got)
            end_seconds += clock.now_seconds() - begin_seconds
