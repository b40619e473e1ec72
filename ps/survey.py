"""The survey: before a round is planned by speed all workers measure themselves, not only those chosen lately.

Spec, section 1, step 1 [paper]: "Workers report compute and transfer time per sample"; the smoothing is Eq. 5 and 6.
The messages are ours (mergesfl/protocol/messages.py): a worker that gets a Survey computes one step, sends a Probe,
gets an Echo, and reports. One that does not report within the deadline is released, keeps its estimate, and is not
chosen before it has been heard again. If the rounds' steps go in parts (training.parts_per_step), so does the step of a
survey, each part with a Probe and an Echo of its own: what overlaps in a round overlaps in the survey, and the sum that
is reported is that of such a step.

All are asked at once, but of a large fleet only so many, and the next one when a report is in [ours]: the probes share
the server's link, and where it is too slow for all until the deadline, nobody's would be through in time. Who was not
asked keeps its estimate and may be chosen; the next survey begins with others.

What is sent per sample [ours]:

    split      c up, the encoded bytes of one sample's features; down those of its gradient
    federated  model bytes / (tau * d): what ps.outcome.observed_seconds sees of a round, which carries the model once
               down and once up for tau * d samples

What is uncertain: the probes that are under way share the server's link, in a round only the chosen workers do, so that
where the server's link is the narrow one transfer seems slower than it will be. A federated probe is much smaller than
the model: latency counts for more in it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np

from mergesfl.config import ControlConfig
from mergesfl.errors import RemoteProtocolError
from mergesfl.methods.base import MethodSettings
from mergesfl.parts import part_bytes
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import SURVEY_ATTEMPT, Echo, Probe, Release, Report, Survey, wire_round
from mergesfl.runtime.arrays import state_to_arrays
from mergesfl.runtime.clock import Clock
from mergesfl.training.split import SplitModel
from ps.fleet import Fleet, Member
from ps.outcome import MIN_COMPUTE_SECONDS_PER_SAMPLE
from ps.switchboard import RoundMessage, Switchboard
from ps.waiting import wait_for_answers

# Of the one step, or of each of its parts, which have fixed costs of their own: little for the slowest worker, and not
# all fixed cost for the fastest. [ours]
SURVEY_SAMPLES = 8
FEDERATED_PROBE_BYTES = 1 << 16  # about; a probe stands for whole samples [ours]
# Of those that are asked and have not reported: their probes, or echoes, together; a quarter of a second at 1 Gb/s. But
# no fewer workers than that: slow ones among them, which keep their place for long, must not stop the survey. [ours]
MAX_BYTES_AT_ONCE = 1 << 25
MIN_WORKERS_AT_ONCE = 100

log = logging.getLogger("ps")


@dataclass(frozen=True)
class Questions:
    """What every worker is asked in every survey; the fields are those of the message."""

    num_samples: int
    whole_network: bool
    num_probe_samples: int
    probe_bytes: int
    echo_bytes: int
    parts_per_step: int = 1

    @staticmethod
    def of(
        network: SplitModel,
        settings: MethodSettings,
        feature_shape: tuple[int, ...],
        splits: bool,
        codecs: RunCodecs,
        parts_per_step: int = 1,
    ) -> Questions:
        """For a split or a federated method on this network; only a split one has steps in parts."""
        num_samples = min(SURVEY_SAMPLES * parts_per_step, settings.batch_size)
        if splits:
            up_bytes, down_bytes = codecs.feature_bytes(feature_shape), codecs.gradient_bytes(feature_shape)
            probe = (num_samples, num_samples * up_bytes, num_samples * down_bytes)
            return Questions(num_samples, False, *probe, parts_per_step)
        model_bytes = codecs.state_bytes(state_to_arrays(network.joined_state_dict()))
        model_bytes_per_sample = model_bytes / (settings.num_steps * settings.batch_size)
        num_probe_samples = max(1, round(FEDERATED_PROBE_BYTES / max(model_bytes_per_sample, 1.0)))
        num_bytes = round(num_probe_samples * model_bytes_per_sample)
        return Questions(num_samples, True, num_probe_samples, num_bytes, num_bytes)


class FleetSurvey:
    """Asks the workers that are here and have samples, and teaches the fleet what they report.

    Args:
        questions: what they are asked.
        control: how often, and how long to wait for the answers.
        fleet: who is here.
        switchboard: all sessions.
        clock: measures the deadline and how long probes are held.
    """

    def __init__(
        self, questions: Questions, control: ControlConfig, fleet: Fleet, switchboard: Switchboard, clock: Clock
    ) -> None:
        self._questions = questions
        self._echo_payload = np.zeros(questions.echo_bytes, np.uint8)  # (m,)
        self._probe_bytes, self._echo_bytes = (
            part_bytes(num_bytes, questions.num_probe_samples, questions.parts_per_step)
            for num_bytes in (questions.probe_bytes, questions.echo_bytes)
        )
        largest_bytes = max(questions.probe_bytes, questions.echo_bytes, 1)
        self._num_at_once = max(MAX_BYTES_AT_ONCE // largest_bytes, MIN_WORKERS_AT_ONCE)
        self._every_rounds = control.survey_every_rounds
        self._deadline_seconds = control.survey_deadline_seconds
        self._fleet = fleet
        self._switchboard = switchboard
        self._clock = clock

    def is_due(self, round_num: int) -> bool:
        """Whether a survey comes before this round."""
        return self._every_rounds > 0 and round_num % self._every_rounds == 0

    def take(self, round_num: int) -> None:
        """One survey; no round may be under way. Raises InterruptedRunError."""
        asked = {member.worker_id: member for member in self._fleet.available() if member.num_samples}
        to_ask = deque(asked.values())
        if len(to_ask) > self._num_at_once:  # the last ones may have to wait for the next survey
            to_ask.rotate(-(round_num // self._every_rounds) * self._num_at_once)
        question = Survey(wire_round(round_num, SURVEY_ATTEMPT), **asdict(self._questions))
        reports: dict[str, Report] = {}
        waiting: dict[str, Member] = {}
        num_removed = self._fleet.num_removed
        end_seconds = self._clock.now_seconds() + self._deadline_seconds

        def ask() -> None:
            while to_ask and len(waiting) < self._num_at_once and self._clock.now_seconds() < end_seconds:
                member = to_ask.popleft()
                if self._switchboard.send(member, question):
                    waiting[member.worker_id] = member

        def missing() -> Collection[Member]:  # at every message: little work, however many workers there are
            nonlocal waiting, num_removed
            if self._fleet.num_removed != num_removed:
                num_removed = self._fleet.num_removed
                waiting = {name: member for name, member in waiting.items() if member.gone_reason is None}
            ask()
            return waiting.values()

        def take(member: Member, message: RoundMessage) -> None:
            if asked.get(member.worker_id) is not member:
                return
            if isinstance(message, Probe):
                self._echo(member, message)
            elif isinstance(message, Report):
                reports[member.worker_id] = message
                waiting.pop(member.worker_id, None)

        wait_for_answers(self._switchboard, self._clock, self._deadline_seconds, missing, take)
        for member in list(missing()):
            self._release(member, question.round_num)
        if to_ask:
            log.warning(
                "%d of %d workers were not asked within %g s (control.survey_deadline_seconds) and keep their "
                "estimates: raise it if all should be asked in every survey",
                len(to_ask),
                len(asked),
                self._deadline_seconds,
            )
        for name in asked:  # by worker_id, not by arrival
            if name in reports:
                self._teach(name, reports[name])

    def _echo(self, member: Member, probe: Probe) -> None:
        """Answers with as much as a gradient or a model would be, if what has come is as much as was asked for."""
        received_seconds = self._clock.now_seconds()
        expected_bytes = self._probe_bytes[probe.part]  # the session has seen to it that there is such a part
        if len(probe.payload) != expected_bytes:
            error = f"sent a probe of {len(probe.payload)} bytes, expected {expected_bytes}"
            self._switchboard.expel(member, RemoteProtocolError(f"worker '{member.worker_id}' {error}"))
            return
        held_seconds = self._clock.now_seconds() - received_seconds
        payload = self._echo_payload[: self._echo_bytes[probe.part]]
        self._switchboard.send(member, Echo(probe.round_num, held_seconds, payload, probe.part))

    def _release(self, member: Member, wire_round_num: int) -> None:
        """A worker that is reachable but too slow: not chosen before it has been heard again."""
        reason = f"no report within {self._deadline_seconds:g} s (control.survey_deadline_seconds)"
        log.warning("worker '%s' is left out: %s", member.worker_id, reason)
        if self._switchboard.send(member, Release(wire_round_num, reason)):
            member.silent = True

    def _teach(self, name: str, report: Report) -> None:
        """The codec has seen to it that both figures are finite, not negative and no longer than 31 years."""
        compute_seconds = max(report.compute_seconds_per_sample, MIN_COMPUTE_SECONDS_PER_SAMPLE)
        self._fleet.observe(name, self._questions.num_samples, compute_seconds, report.transfer_seconds_per_sample)
