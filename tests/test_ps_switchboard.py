"""The switchboard, message by message: registration, farewells, strangers, and peers that break the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mergesfl.control.estimates import Estimates
from mergesfl.errors import TransportError
from mergesfl.protocol.codec import decode, encode, wire_bytes
from mergesfl.protocol.messages import (
    Assign,
    Features,
    Goodbye,
    Gradient,
    Leave,
    Message,
    Ping,
    Pong,
    Ready,
    Refuse,
    Register,
    Release,
    Reset,
    Update,
)
from mergesfl.transport.base import Frames
from mergesfl.transport.memory import MemoryHub, MemoryWorker
from ps import switchboard as module
from ps.fleet import Fleet, Member
from ps.switchboard import InterruptedRunError, Switchboard
from tests.memory_cluster import (
    CLASS_NAMES,
    FEATURE_BYTES,
    FEATURE_SHAPE,
    SAMPLE_SHAPE,
    HandClock,
    registration,
    welcome,
)

WELCOME = welcome(5)
READY = Ready(FEATURE_SHAPE, FEATURE_BYTES)
ASSIGN = Assign(100, 2, 2, 1, "mergesfl", {"learning_rate": 0.1}, {})
FEATURES = Features(100, 0, np.ones((1, 2), np.float32), np.zeros(1, np.int64))


class Desk:
    """A switchboard and the hub that its workers connect to."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.hub = MemoryHub()
        self.clock = HandClock()
        self.fleet = Fleet(CLASS_NAMES, SAMPLE_SHAPE, Estimates(), max_workers=10)
        self.board = Switchboard(self.hub.server(), self.fleet, WELCOME, FEATURE_BYTES, check, self.clock, 60.0)

    def say(self, worker: MemoryWorker, message: Message | Frames) -> tuple[Member, Features | Update] | None:
        """One message in, and what the switchboard hands up."""
        assert worker.send(message if isinstance(message, Sequence) else encode(message))
        return self.board.receive(1.0)

    def join(self, worker_id: str = "a", ready: bool = True) -> tuple[MemoryWorker, Member]:
        worker = self.hub.worker()
        self.say(worker, registration(worker_id))
        assert heard(worker) == [WELCOME]
        if ready:
            self.say(worker, READY)
        return worker, self.fleet.by_id[worker_id]


def heard(worker: MemoryWorker) -> list[Message]:
    """All that waits for this worker."""
    messages = []
    while (frames := worker.recv(0.0)) is not None:
        messages.append(decode(frames))
    return messages


def test_a_worker_is_welcomed_and_may_be_chosen_once_it_is_ready() -> None:
    desk = Desk()
    worker, member = desk.join(ready=False)
    assert desk.fleet.available() == []
    assert desk.say(worker, READY) is None
    assert desk.fleet.available() == [member]
    assert (member.worker_id, member.num_samples, member.label_counts) == ("a", 20, (8, 8, 4))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (registration("a", sample_shape=(3, 9)), "samples of shape (3, 9), this run is for (1, 8, 8)"),
        (registration("a", (1, 1, 1, 1)), "samples of class '3', this run knows the 3 classes 0, 1, 2: "),
        (registration("a", num_samples=99), "holds 99 samples but counts 20 labels"),
        (registration("a", protocol_version=7), "speaks protocol 7, this server 5: install the same mergesfl on both "),
    ],
)
def test_a_registration_that_does_not_fit_is_refused_with_the_reason(message: Register, expected: str) -> None:
    desk = Desk()
    worker = desk.hub.worker()
    assert desk.say(worker, message) is None
    (refusal,) = heard(worker)
    assert isinstance(refusal, Refuse) and expected in refusal.reason
    assert desk.fleet.by_id == {}
    assert desk.say(worker, Ping()) is None  # still a stranger
    assert isinstance(heard(worker)[0], Reset)


def test_another_protocol_version_names_the_version_that_is_installed_there() -> None:
    desk = Desk()
    worker = desk.hub.worker()
    desk.say(worker, registration("a", protocol_version=7, versions={"mergesfl": "9.9"}))
    (refusal,) = heard(worker)
    assert isinstance(refusal, Refuse) and refusal.reason.endswith("(worker: 9.9)")


def test_a_worker_with_another_cut_is_refused() -> None:
    desk = Desk()
    worker, member = desk.join(ready=False)
    desk.say(worker, Ready((5,), 20))
    (refusal,) = heard(worker)
    assert isinstance(refusal, Refuse)
    assert "finds 20 feature bytes per sample, this server 512" in refusal.reason == member.gone_reason
    assert desk.fleet.available() == []


def test_pings_are_answered_in_every_state() -> None:
    desk = Desk()
    worker, member = desk.join(ready=False)
    desk.say(worker, Ping())
    desk.say(worker, READY)
    desk.say(worker, Ping())
    desk.board.send(member, ASSIGN)
    desk.say(worker, Ping())
    assert [type(message) for message in heard(worker)] == [Pong, Pong, Assign, Pong]


@pytest.mark.parametrize("message", [Ping(), READY, FEATURES])
def test_a_stranger_is_told_to_register(message: Message) -> None:
    desk = Desk()
    worker = desk.hub.worker()
    assert desk.say(worker, message) is None
    (reset,) = heard(worker)
    assert isinstance(reset, Reset) and "register again" in reset.reason
    assert desk.board.egress_bytes == wire_bytes(encode(reset))
    assert desk.board.ingress_bytes == wire_bytes(encode(message))


def test_the_farewell_of_a_stranger_needs_no_answer() -> None:
    desk = Desk()
    worker = desk.hub.worker()
    desk.say(worker, Leave("bye"))
    assert heard(worker) == []
    assert desk.board.egress_bytes == 0


def test_a_stranger_that_is_gone_before_the_answer_does_no_harm() -> None:
    desk = Desk()
    worker = desk.hub.worker()
    worker.send(encode(Ping()))
    worker.close()
    assert desk.board.receive(1.0) is None
    assert desk.board.egress_bytes == 0


def test_garbage_of_a_stranger_is_counted_and_answered_with_the_reason() -> None:
    """Not silence: a worker of another protocol version cannot be read here, and its operator must learn why."""
    desk = Desk()
    worker = desk.hub.worker()
    for number in range(1, 4):
        assert desk.say(worker, [b"\x00garbage", b"more"]) is None
        assert desk.board.num_refused_messages == number
    answers = heard(worker)
    assert [type(answer) for answer in answers] == [Refuse] * 3
    assert "is no msgpack" in str(answers[0])
    assert desk.fleet.by_peer == {}


def test_garbage_of_a_member_closes_it_and_nobody_else() -> None:
    desk = Desk()
    worker, member = desk.join("a")
    _, other = desk.join("b")
    desk.say(worker, [b"\xff"])
    (refusal,) = heard(worker)
    assert isinstance(refusal, Refuse) and refusal.reason == member.gone_reason
    assert desk.board.num_refused_messages == 1
    assert desk.fleet.available() == [other]
    desk.say(worker, Ping())  # it is a stranger now
    assert isinstance(heard(worker)[0], Reset)


def test_a_message_that_its_state_does_not_allow_closes_the_worker() -> None:
    desk = Desk()
    worker, member = desk.join()
    assert desk.say(worker, FEATURES) is None  # nothing was assigned
    assert member.gone_reason is not None and "the worker cannot say Features" in member.gone_reason
    assert isinstance(heard(worker)[0], Refuse)


def test_a_second_registration_over_one_connection_is_refused() -> None:
    desk = Desk()
    worker, member = desk.join()
    desk.say(worker, registration("b"))
    assert member.gone_reason is not None
    assert isinstance(heard(worker)[0], Refuse)
    assert desk.fleet.by_id == {}


def test_messages_of_a_round_are_handed_up() -> None:
    desk = Desk()
    worker, member = desk.join()
    assert desk.board.send(member, ASSIGN)
    handed = desk.say(worker, FEATURES)
    assert handed is not None and handed[0] is member
    assert isinstance(handed[1], Features) and handed[1].step == 0


def test_what_crossed_a_release_is_dropped_and_proves_that_the_worker_lives() -> None:
    desk = Desk()
    worker, member = desk.join()
    desk.board.send(member, ASSIGN)
    desk.board.send(member, Release(100, "too late"))
    member.silent = True
    assert desk.say(worker, FEATURES) is None
    assert member.gone_reason is None
    assert not member.silent
    assert desk.board.num_refused_messages == 0


def test_the_newer_of_two_with_one_id_wins() -> None:
    desk = Desk()
    older, member = desk.join()
    newer = desk.hub.worker()
    desk.say(newer, registration("a", (1, 0, 0)))
    (refusal,) = heard(older)
    assert isinstance(refusal, Refuse) and "another process registered as 'a'" in refusal.reason
    assert member.gone_reason == refusal.reason
    assert heard(newer) == [WELCOME]
    assert desk.fleet.by_id["a"].num_samples == 1
    desk.say(newer, READY)
    assert [one.num_samples for one in desk.fleet.available()] == [1]


def test_a_newer_one_that_does_not_fit_leaves_the_older_alone() -> None:
    desk = Desk()
    older, member = desk.join()
    newer = desk.hub.worker()
    desk.say(newer, registration("a", sample_shape=(9,)))
    assert isinstance(heard(newer)[0], Refuse)
    assert heard(older) == []
    assert desk.fleet.available() == [member]


def test_the_newer_wins_also_when_the_older_cannot_be_told() -> None:
    desk = Desk()
    older, member = desk.join()
    older.close()
    newer, successor = desk.join("a")
    assert member.gone_reason is not None and member.gone_reason.startswith("unreachable")
    assert desk.fleet.available() == [successor]
    assert heard(newer) == []


def test_a_worker_that_leaves_is_gone_with_its_reason() -> None:
    desk = Desk()
    worker, member = desk.join()
    assert desk.say(worker, Leave("stopped on this device")) is None
    assert member.gone_reason == "left: stopped on this device"
    assert (desk.fleet.by_id, desk.fleet.by_peer) == ({}, {})
    assert not desk.board.send(member, Pong())
    assert heard(worker) == []


def test_probing_finds_those_that_are_unreachable() -> None:
    desk = Desk()
    worker, here = desk.join("a")
    lost, gone = desk.join("b")
    lost.close()
    desk.board.probe([here, gone])
    desk.board.probe([here, gone])
    assert gone.gone_reason is not None and gone.gone_reason.startswith("unreachable: ")
    assert desk.fleet.available() == [here]
    assert heard(worker) == [Pong(), Pong()]


def test_a_goodbye_reaches_all_and_empties_the_fleet() -> None:
    desk = Desk()
    workers = [desk.join(name)[0] for name in ("a", "b")] + [desk.join("c", ready=False)[0]]
    lost, _ = desk.join("d")
    lost.close()
    desk.board.say_goodbye("done")
    assert [heard(worker) for worker in workers] == [[Goodbye("done")]] * 3
    assert (desk.fleet.by_id, desk.fleet.by_peer) == ({}, {})


def test_bytes_are_those_of_the_frames_in_both_directions() -> None:
    desk = Desk()
    worker, member = desk.join()
    noise = [b"12345", b"678"]
    stranger = desk.hub.worker()
    desk.say(stranger, noise)
    (refusal,) = heard(stranger)
    gradient = Gradient(100, 0, 0.1, np.zeros((1, 2), np.float32))
    sent: list[Message] = [WELCOME, refusal, ASSIGN, gradient]
    received: list[Message] = [registration("a"), READY, FEATURES]
    desk.board.send(member, ASSIGN)
    desk.say(worker, FEATURES)
    desk.board.send(member, gradient)
    assert desk.board.egress_bytes == sum(wire_bytes(encode(message)) for message in sent)
    assert desk.board.ingress_bytes == sum(wire_bytes(encode(message)) for message in received) + len(b"12345678")


def test_settling_takes_in_all_that_waits_and_drops_what_belongs_to_a_round() -> None:
    desk = Desk()
    worker, member = desk.join("a")
    other, leaver = desk.join("b")
    stranger = desk.hub.worker()
    desk.board.send(member, ASSIGN)
    for end, message in ((other, Ping()), (worker, FEATURES), (stranger, registration("c")), (other, Leave("x"))):
        end.send(encode(message))
    desk.board.settle()
    assert leaver.gone_reason == "left: x"
    assert heard(stranger) == [WELCOME]
    assert desk.board.receive(0.0) is None
    desk.board.settle()  # nothing waits: returns at once


def test_a_peer_that_never_stops_talking_cannot_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SETTLED_MESSAGES", 5)
    desk = Desk()
    worker, _ = desk.join()
    for _ in range(7):
        worker.send(encode(Ping()))
    desk.board.settle()
    assert len(heard(worker)) == 5
    desk.board.settle()
    assert len(heard(worker)) == 2


def test_settling_ends_after_a_second_however_slow_the_messages_are() -> None:
    """By hand: 0.4 s pass per message; after three of them 1.2 s are over."""
    desk = Desk()
    worker, _ = desk.join()
    for _ in range(7):
        worker.send(encode(Ping()))
    desk.board._check = lambda: desk.clock.sleep(0.4)
    desk.board.settle()
    assert len(heard(worker)) == 2  # at 0.4 and 0.8 s; at 1.2 s nothing is read any more


def test_a_worker_that_does_not_get_ready_has_to_register_again() -> None:
    desk = Desk()  # within 60 s
    worker, slow = desk.join("slow", ready=False)
    lost, gone = desk.join("lost", ready=False)
    calm, ready = desk.join("calm")
    lost.close()
    for _ in range(59):
        desk.clock.sleep(1.0)
        desk.board.receive(0.0)
    assert gone.gone_reason is not None and gone.gone_reason.startswith("unreachable")
    assert slow.gone_reason is None
    probes = heard(worker)
    assert {type(message) for message in probes} == {Pong} and len(probes) <= module.NUM_READY_PROBES
    desk.clock.sleep(6.0)
    desk.board.receive(0.0)
    reason = "not ready 60 s after registering (cluster.start_deadline_seconds)"
    assert heard(worker) == [Reset(reason)]
    assert slow.gone_reason == reason
    assert desk.fleet.by_id == {"calm": ready}
    assert heard(calm) == []


def test_sessions_that_are_not_ready_are_bounded() -> None:
    desk = Desk()  # at most 10
    for number in range(10):
        desk.join(f"w{number}", ready=False)
    late = desk.hub.worker()
    desk.say(late, registration("late"))
    assert heard(late) == [Reset("10 workers are not ready, the limit is 10: register later")]
    assert len(desk.fleet.by_peer) == 10
    assert desk.fleet.known_label_counts == {}


def test_large_headers_are_read_of_members_only() -> None:
    """Not refused for good: it may be the update of a session with the server that was here before."""
    limit = module.STRANGER_HEADER_BYTES + len(CLASS_NAMES) * module.STRANGER_HEADER_BYTES_PER_CLASS
    desk = Desk()
    stranger = desk.hub.worker()
    desk.say(stranger, [bytes(limit + 1)])
    reason = f"header of {limit + 1} bytes but no session, the limit is {limit}: register again"
    assert heard(stranger) == [Reset(reason)]
    desk.say(stranger, [bytes(limit)])
    assert isinstance(heard(stranger)[0], Refuse)  # it was read, and is no message
    assert desk.board.num_refused_messages == 2
    worker, member = desk.join()
    state = {f"{number:0200d}": np.zeros(1, np.float32) for number in range(500)}
    update = encode(Update(100, 2, 0.0, 0.0, state))
    assert wire_bytes(update[:1]) > limit
    desk.board.send(member, Assign(100, 2, 0, 1, "fedavg", {}, {}))
    assert desk.say(worker, update) is not None


def test_strangers_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    stranger = desk.hub.worker()
    for _ in range(20):
        desk.say(stranger, [b"noise"])
        desk.say(stranger, registration("a", sample_shape=(9,)))
        heard(stranger)
    numbers = [message.split()[2] for message in caplog.messages]
    assert numbers == ["1", "2", "4", "8", "16", "32"]
    assert all(len(message) < 500 and message.isprintable() for message in caplog.messages)


def test_a_wish_to_stop_is_noticed_before_anything_is_read() -> None:
    def check() -> None:
        raise InterruptedRunError("stop")

    desk = Desk(check)
    with pytest.raises(InterruptedRunError):
        desk.board.receive(60.0)
    with pytest.raises(InterruptedRunError):
        desk.board.settle()


def test_a_wait_is_cut_into_polls() -> None:
    """A wait of an hour asks `check` again after each poll of 0.2 s: this test would last an hour otherwise."""
    desk = Desk()
    assert desk.board.receive(3600.0) is None


def test_closing_closes_the_endpoint() -> None:
    desk = Desk()
    desk.board.close()
    with pytest.raises(TransportError):
        desk.board.receive(0.0)
