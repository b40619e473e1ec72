"""Every message in every state at both ends, and what may cross on the wire.

EXPECTED is written from the rules in words, not from the tables of the module: for each state who may say what.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesfl.errors import LocalProtocolError, RemoteProtocolError
from mergesfl.protocol import messages as m
from mergesfl.protocol.session import Arrival, Role, Session, State

X, Y = np.zeros((1, 2), dtype=np.float32), np.zeros(1, dtype=np.int64)

REGISTER = m.Register("w", 1, "cpu", {}, 1, (1,), ("a",), (2,))
WELCOME = m.Welcome("m", "c", ("a", "b"), (2,), 0, "float32", 1.0, (), (), False, 0, *["fp32"] * 3)
READY = m.Ready((2,), 8)


def assign(round_num: int = 0, num_exchanges: int = 2) -> m.Assign:
    return m.Assign(round_num, 2, num_exchanges, 1, "mergesfl", {}, {})


def feat(round_num: int = 0, step: int = 0) -> m.Features:
    return m.Features(round_num, step, X, Y)


def grad(round_num: int = 0, step: int = 0) -> m.Gradient:
    return m.Gradient(round_num, step, 0.0, X)


def update(round_num: int = 0) -> m.Update:
    return m.Update(round_num, 1, 0.0, 0.0, {})


def release(round_num: int = 0) -> m.Release:
    return m.Release(round_num, "late")


def survey(round_num: int = 0) -> m.Survey:
    return m.Survey(round_num, 8, False, 8, 4, 4)


PAYLOAD = np.zeros(4, dtype=np.uint8)


def probe(round_num: int = 0) -> m.Probe:
    return m.Probe(round_num, PAYLOAD)


def echo(round_num: int = 0) -> m.Echo:
    return m.Echo(round_num, 0.0, PAYLOAD)


def report(round_num: int = 0) -> m.Report:
    return m.Report(round_num, 0.1, 0.1)


UP, DOWN = "up", "down"
TO_IDLE: list[tuple[str, Any]] = [(UP, REGISTER), (DOWN, WELCOME), (UP, READY)]


def at(role: Role, script: list[tuple[str, Any]]) -> Session:
    """A session after these messages, seen from one end."""
    session = Session(role)
    for direction, message in script:
        if (direction == UP) == (role is Role.WORKER):
            session.send(message)
        else:
            assert session.receive(message) is Arrival.FRESH
    return session


def refused_at_both_ends(speaker: Role, script: list[tuple[str, Any]], message: Any, words: str) -> None:
    other = Role.SERVER if speaker is Role.WORKER else Role.WORKER
    with pytest.raises(LocalProtocolError, match=words):
        at(speaker, script).send(message)
    with pytest.raises(RemoteProtocolError, match=words):
        at(other, script).receive(message)


SCRIPTS: dict[str, list[tuple[str, Any]]] = {
    "new": [],
    "registering": TO_IDLE[:1],
    "building": TO_IDLE[:2],
    "idle": TO_IDLE,
    "working at step 0": [*TO_IDLE, (DOWN, assign())],
    "waiting at step 0": [*TO_IDLE, (DOWN, assign()), (UP, feat())],
    "working at the end": [*TO_IDLE, (DOWN, assign(0, 1)), (UP, feat()), (DOWN, grad())],
    "surveying": [*TO_IDLE, (DOWN, survey())],
    "probing": [*TO_IDLE, (DOWN, survey()), (UP, probe())],
    "reporting": [*TO_IDLE, (DOWN, survey()), (UP, probe()), (DOWN, echo())],
    "closed by the worker": [*TO_IDLE, (UP, m.Leave("bye"))],
    "closed by the server": [*TO_IDLE, (DOWN, m.Goodbye("bye"))],
}
MESSAGES: list[Any] = [
    REGISTER, WELCOME, READY, m.Refuse("r"), assign(1), feat(), grad(), update(), release(), m.Ping(), m.Pong(),
    m.Reset("r"), m.Leave("l"), m.Goodbye("g"), survey(1), probe(), echo(), report(),
]  # fmt: skip
CLOSE = {"Refuse": "closed", "Reset": "closed", "Goodbye": "closed"}
# state: (what the worker may say and where that leads, the same for the server)
EXPECTED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "new": ({"Register": "registering", "Leave": "closed"}, CLOSE),
    "registering": (
        {"Ping": "registering", "Leave": "closed"},
        {"Welcome": "building", "Pong": "registering", **CLOSE},
    ),
    "building": ({"Ready": "idle", "Ping": "building", "Leave": "closed"}, {"Pong": "building", **CLOSE}),
    "idle": (
        {"Ping": "idle", "Leave": "closed"},
        {"Assign": "working", "Survey": "surveying", "Pong": "idle", **CLOSE},
    ),
    "working at step 0": (
        {"Features": "waiting", "Ping": "working", "Leave": "closed"},  # no Update before its 2 exchanges
        {"Release": "idle", "Pong": "working", **CLOSE},
    ),
    "waiting at step 0": (
        {"Ping": "waiting", "Leave": "closed"},
        {"Gradient": "working", "Release": "idle", "Pong": "waiting", **CLOSE},
    ),
    "working at the end": (
        {"Update": "idle", "Ping": "working", "Leave": "closed"},  # no Features after its 1 exchange
        {"Release": "idle", "Pong": "working", **CLOSE},
    ),
    "surveying": (
        {"Probe": "probing", "Ping": "surveying", "Leave": "closed"},  # no Report before its probe
        {"Release": "idle", "Pong": "surveying", **CLOSE},
    ),
    "probing": (
        {"Ping": "probing", "Leave": "closed"},
        {"Echo": "reporting", "Release": "idle", "Pong": "probing", **CLOSE},
    ),
    "reporting": (
        {"Report": "idle", "Ping": "reporting", "Leave": "closed"},  # one probe is enough
        {"Release": "idle", "Pong": "reporting", **CLOSE},
    ),
    "closed by the worker": ({}, {}),
    "closed by the server": ({}, {}),
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("state", SCRIPTS)
def test_send(state: str, message: Any, role: Role) -> None:
    session = at(role, SCRIPTS[state])
    before = session.state
    says = EXPECTED[state][0 if role is Role.WORKER else 1]
    kind = type(message).__name__
    if kind in says:
        session.send(message)
        assert session.state is State(says[kind])
    else:
        with pytest.raises(LocalProtocolError, match=kind):
            session.send(message)
        assert session.state is before


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("state", SCRIPTS)
def test_receive(state: str, message: Any, role: Role) -> None:
    session = at(role, SCRIPTS[state])
    before = session.state
    hears = EXPECTED[state][1 if role is Role.WORKER else 0]
    kind = type(message).__name__
    closed_here = state == f"closed by the {role.value}"
    if closed_here and kind != "Register":
        assert session.receive(message) is Arrival.STALE
        assert session.state is State.CLOSED
    elif kind in hears:
        assert session.receive(message) is Arrival.FRESH
        assert session.state is State(hears[kind])
    else:
        with pytest.raises(RemoteProtocolError, match=kind):
            session.receive(message)
        assert session.state is before


def test_a_whole_run_keeps_both_ends_in_step() -> None:
    worker, server = Session(Role.WORKER), Session(Role.SERVER)
    script = [
        *TO_IDLE, (DOWN, assign(0, 2)), (UP, feat(0, 0)), (UP, m.Ping()), (DOWN, m.Pong()), (DOWN, grad(0, 0)),
        (UP, feat(0, 1)), (DOWN, grad(0, 1)), (UP, update(0)),
        (DOWN, survey(3)), (UP, probe(3)), (DOWN, echo(3)), (UP, report(3)),
        (DOWN, assign(4, 0)), (UP, update(4)),  # federated: no exchanges; rounds may be left out
        (DOWN, assign(5, 1)), (UP, feat(5, 0)), (DOWN, release(5)), (DOWN, assign(6, 0)), (UP, update(6)),
        (DOWN, m.Goodbye("done")),
    ]  # fmt: skip
    for direction, message in script:
        speaker, hearer = (worker, server) if direction == UP else (server, worker)
        speaker.send(message)
        assert hearer.receive(message) is Arrival.FRESH
        assert (worker.state, worker.step, worker.round_num) == (server.state, server.step, server.round_num)
    assert worker.state is State.CLOSED


def test_round_num_and_step_are_shown_only_for_the_round_at_work() -> None:
    session = at(Role.SERVER, [*TO_IDLE, (DOWN, assign(7, 2)), (UP, feat(7)), (DOWN, grad(7))])
    assert (session.round_num, session.step) == (7, 1)
    session.send(release(7))
    assert session.round_num is None


WORKING_7 = [*TO_IDLE, (DOWN, assign(7, 2)), (UP, feat(7, 0)), (DOWN, grad(7, 0))]  # the next step is 1


@pytest.mark.parametrize(
    ("script", "message", "words"),
    [
        (WORKING_7, feat(8, 1), "Features carries round 8; expected 7"),
        (WORKING_7, feat(6, 1), "Features carries round 6; expected 7"),
        (WORKING_7, feat(7, 0), "Features carries step 0; expected 1"),
        (WORKING_7, feat(7, 2), "Features carries step 2; expected 1"),
        (WORKING_7, update(7), "Update comes too early; expected Features of step 1"),
        ([*TO_IDLE, (DOWN, assign(7, 0))], feat(7, 0), "one step too many; expected Update"),
        ([*TO_IDLE, (DOWN, assign(7, 0))], update(8), "Update carries round 8; expected 7"),
        ([*TO_IDLE, (DOWN, survey(7))], probe(8), "Probe carries round 8; expected 7"),
        ([*TO_IDLE, (DOWN, survey(7)), (UP, probe(7)), (DOWN, echo(7))], report(6), "Report carries round 6"),
    ],
)
def test_the_worker_must_keep_count(script: list[tuple[str, Any]], message: Any, words: str) -> None:
    refused_at_both_ends(Role.WORKER, script, message, words)


@pytest.mark.parametrize(
    ("script", "message", "words"),
    [
        ([*WORKING_7, (UP, feat(7, 1))], grad(8, 1), "Gradient carries round 8; expected 7"),
        ([*WORKING_7, (UP, feat(7, 1))], grad(7, 0), "Gradient carries step 0; expected 1"),
        (WORKING_7, release(8), "Release carries round 8; expected 7"),
        ([*WORKING_7, (DOWN, release(7))], assign(7), "repeats round 7; use a number above 7"),
        ([*WORKING_7, (DOWN, release(7))], assign(6), "repeats round 6; use a number above 7"),
        ([*WORKING_7, (DOWN, release(7))], survey(7), "Survey repeats round 7; use a number above 7"),
        ([*TO_IDLE, (DOWN, survey(7)), (DOWN, release(7))], assign(7), "Assign repeats round 7"),
        ([*TO_IDLE, (DOWN, survey(7)), (UP, probe(7))], echo(8), "Echo carries round 8; expected 7"),
        ([*TO_IDLE, (DOWN, survey(7))], release(8), "Release carries round 8; expected 7"),
    ],
)
def test_the_server_must_keep_count(script: list[tuple[str, Any]], message: Any, words: str) -> None:
    refused_at_both_ends(Role.SERVER, script, message, words)


# ------------------------------------------------------------------------------------------------- crossing on the wire


@pytest.mark.parametrize("late", [feat(7, 1), update(7)], ids=["Features", "Update"])
@pytest.mark.parametrize("already_assigned", [False, True])
def test_what_crosses_a_release_is_stale_once(late: Any, already_assigned: bool) -> None:
    server = at(Role.SERVER, WORKING_7)
    server.send(release(7))
    if already_assigned:
        server.send(assign(8))
    assert server.receive(late) is Arrival.STALE
    with pytest.raises(RemoteProtocolError):  # the worker sends one message and waits: a second one did not cross
        server.receive(late)
    if not already_assigned:
        server.send(assign(8))
    assert server.receive(feat(8, 0)) is Arrival.FRESH
    assert (server.state, server.round_num, server.step) == (State.WAITING, 8, 0)


def test_nothing_can_cross_a_release_while_the_worker_waits() -> None:
    server = at(Role.SERVER, [*WORKING_7, (UP, feat(7, 1))])
    server.send(release(7))
    with pytest.raises(RemoteProtocolError):
        server.receive(feat(7, 1))


def test_anything_fresh_proves_that_nothing_stale_is_left() -> None:
    server = at(Role.SERVER, [*WORKING_7, (DOWN, release(7)), (DOWN, assign(8)), (UP, feat(8, 0)), (DOWN, grad(8, 0))])
    with pytest.raises(RemoteProtocolError):
        server.receive(feat(7, 1))


def test_several_releases_in_a_row() -> None:
    script = [
        *WORKING_7,
        (DOWN, release(7)),
        (DOWN, assign(8)),
        (DOWN, release(8)),
        (DOWN, assign(9)),
        (DOWN, release(9)),
    ]
    server = at(Role.SERVER, script)
    assert server.receive(feat(7, 1)) is Arrival.STALE
    assert server.receive(feat(9, 0)) is Arrival.STALE
    with pytest.raises(RemoteProtocolError):  # messages keep their order: after round 9 nothing of round 8 can come
        server.receive(feat(8, 0))


def test_a_finished_round_is_not_stale_but_wrong() -> None:
    server = at(Role.SERVER, [*TO_IDLE, (DOWN, assign(7, 0)), (UP, update(7))])
    with pytest.raises(RemoteProtocolError):
        server.receive(update(7))


def test_a_release_that_crosses_the_update_is_stale_at_the_worker() -> None:
    worker = at(Role.WORKER, [*TO_IDLE, (DOWN, assign(7, 0)), (UP, update(7))])
    assert worker.receive(release(7)) is Arrival.STALE
    assert worker.receive(grad(7, 0)) is Arrival.STALE
    assert worker.receive(assign(8)) is Arrival.FRESH
    assert worker.receive(release(7)) is Arrival.STALE
    assert (worker.state, worker.round_num) == (State.WORKING, 8)


def test_a_release_of_a_round_never_assigned_is_wrong() -> None:
    with pytest.raises(RemoteProtocolError):
        at(Role.WORKER, TO_IDLE).receive(release(0))


SURVEYING_7 = [*TO_IDLE, (DOWN, survey(7))]
REPORTING_7 = [*SURVEYING_7, (UP, probe(7)), (DOWN, echo(7))]


@pytest.mark.parametrize(("script", "late"), [(SURVEYING_7, probe(7)), (REPORTING_7, report(7))])
def test_what_crosses_the_release_of_a_survey_is_stale_once(script: list[tuple[str, Any]], late: Any) -> None:
    """The round is planned without the answer; the worker takes part in it all the same."""
    server = at(Role.SERVER, [*script, (DOWN, release(7)), (DOWN, assign(8))])
    assert server.receive(late) is Arrival.STALE
    with pytest.raises(RemoteProtocolError):
        server.receive(late)
    assert server.receive(feat(8, 0)) is Arrival.FRESH


def test_nothing_can_cross_the_release_of_a_worker_that_waits_for_its_echo() -> None:
    server = at(Role.SERVER, [*SURVEYING_7, (UP, probe(7)), (DOWN, release(7))])
    with pytest.raises(RemoteProtocolError):
        server.receive(report(7))


def test_a_release_that_crosses_the_report_is_stale_at_the_worker() -> None:
    worker = at(Role.WORKER, [*REPORTING_7, (UP, report(7))])
    assert worker.receive(release(7)) is Arrival.STALE
    assert worker.receive(assign(8)) is Arrival.FRESH
    assert (worker.state, worker.round_num) == (State.WORKING, 8)


def test_after_an_error_the_server_can_still_refuse() -> None:
    server = at(Role.SERVER, TO_IDLE)
    with pytest.raises(RemoteProtocolError, match="legal: Ping, Leave"):
        server.receive(update(0))
    server.send(m.Refuse("Update without an assignment"))
    assert server.state is State.CLOSED
    with pytest.raises(LocalProtocolError, match="begin a new session"):
        server.send(m.Goodbye("twice"))


# ------------------------------------------------------------------------------------------------------------- in parts


def in_parts(round_num: int = 7, batch_size: int = 5, parts_per_step: int = 3, num_exchanges: int = 2) -> m.Assign:
    return m.Assign(round_num, 2, num_exchanges, batch_size, "mergesfl", {}, {}, parts_per_step=parts_per_step)


def feat_part(step: int, part: int, round_num: int = 7) -> m.Features:
    return m.Features(round_num, step, X, Y, part=part)


def grad_part(step: int, part: int) -> m.Gradient:
    return m.Gradient(7, step, 0.0, X, part=part)


def test_the_parts_of_a_step_go_up_while_their_gradients_come_down() -> None:
    """Both ends after every message: three parts, answered early and late, then the next step and the update."""
    worker, server = Session(Role.WORKER), Session(Role.SERVER)
    script = [
        *TO_IDLE, (DOWN, in_parts()),
        (UP, feat_part(0, 0)), (DOWN, grad_part(0, 0)), (UP, feat_part(0, 1)), (UP, feat_part(0, 2)),
        (DOWN, grad_part(0, 1)), (UP, m.Ping()), (DOWN, grad_part(0, 2)),
        (UP, feat_part(1, 0)), (UP, feat_part(1, 1)), (DOWN, grad_part(1, 0)), (DOWN, grad_part(1, 1)),
        (UP, feat_part(1, 2)), (DOWN, grad_part(1, 2)), (UP, update(7)),
    ]  # fmt: skip
    states = []
    for direction, message in script:
        speaker, hearer = (worker, server) if direction == UP else (server, worker)
        speaker.send(message)
        assert hearer.receive(message) is Arrival.FRESH
        assert (worker.state, worker.step, worker.num_outstanding) == (
            server.state,
            server.step,
            server.num_outstanding,
        )
        states.append((worker.state.value, worker.step, worker.num_outstanding))
    assert states[4:] == [
        ("working", 0, 1), ("working", 0, 0), ("working", 0, 1), ("waiting", 0, 2),
        ("waiting", 0, 1), ("waiting", 0, 1), ("working", 1, 0),
        ("working", 1, 1), ("working", 1, 2), ("working", 1, 1), ("working", 1, 0),
        ("waiting", 1, 1), ("working", 2, 0), ("idle", 2, 0),
    ]  # fmt: skip


def test_a_part_and_an_answer_may_cross() -> None:
    worker, server = (at(role, [*TO_IDLE, (DOWN, in_parts()), (UP, feat_part(0, 0))]) for role in Role)
    worker.send(feat_part(0, 1))
    server.send(grad_part(0, 0))
    assert worker.receive(grad_part(0, 0)) is Arrival.FRESH
    assert server.receive(feat_part(0, 1)) is Arrival.FRESH
    assert (worker.state, worker.num_outstanding) == (server.state, server.num_outstanding) == (State.WORKING, 1)


def test_there_are_no_more_parts_than_samples() -> None:
    """Two samples, asked for in eight parts: after two the worker waits."""
    script = [*TO_IDLE, (DOWN, in_parts(batch_size=2, parts_per_step=8)), (UP, feat_part(0, 0)), (UP, feat_part(0, 1))]
    server = at(Role.SERVER, script)
    assert server.state is State.WAITING
    with pytest.raises(RemoteProtocolError, match="cannot say Features; legal: Ping, Leave"):
        server.receive(feat_part(0, 2))


IN_TWO = m.Survey(7, 8, False, 8, 4, 4, parts_per_step=2)
ONE_OUT = [*TO_IDLE, (DOWN, in_parts()), (UP, feat_part(0, 0))]
ONE_ANSWERED = [*ONE_OUT, (DOWN, grad_part(0, 0))]


@pytest.mark.parametrize(
    ("script", "message", "words"),
    [
        (ONE_OUT, feat_part(0, 0), "Features carries part 0; expected 1"),
        (ONE_OUT, feat_part(0, 2), "Features carries part 2; expected 1"),
        (ONE_OUT[:-1], feat_part(0, 1), "Features carries part 1; expected 0"),
        (ONE_OUT, feat_part(1, 0), "Features carries step 1; expected 0"),
        (ONE_ANSWERED, feat_part(1, 0), "Features carries step 1; expected 0"),
        (ONE_ANSWERED, update(7), "Update comes too early; expected Features of step 0"),
        ([*TO_IDLE, (DOWN, assign(7))], feat_part(0, 1), "Features carries part 1; expected 0"),
        ([*TO_IDLE, (DOWN, IN_TWO), (UP, probe(7))], probe(7), "Probe carries part 0; expected 1"),
    ],
)  # fmt: skip
def test_the_worker_must_keep_count_of_the_parts(script: list[tuple[str, Any]], message: Any, words: str) -> None:
    refused_at_both_ends(Role.WORKER, script, message, words)


@pytest.mark.parametrize(
    ("script", "message", "words"),
    [
        (ONE_OUT, grad_part(0, 1), "Gradient carries part 1; expected 0"),
        (ONE_ANSWERED, grad_part(0, 0), "Gradient of part 0 answers nothing"),
        (ONE_ANSWERED, grad_part(0, 1), "Gradient of part 1 answers nothing"),
        ([*ONE_ANSWERED, (UP, feat_part(0, 1))], grad_part(0, 0), "Gradient carries part 0; expected 1"),
        ([*TO_IDLE, (DOWN, in_parts())], grad_part(0, 0), "Gradient of part 0 answers nothing"),
        ([*TO_IDLE, (DOWN, survey(7))], echo(7), "Echo of part 0 answers nothing"),
    ],
)
def test_the_server_must_keep_count_of_the_parts(script: list[tuple[str, Any]], message: Any, words: str) -> None:
    refused_at_both_ends(Role.SERVER, script, message, words)


class ByTheTable(Session):
    """Without the one look at the message that is next."""

    def _is_next(self, message: Any) -> bool:
        return False


def said(session: Session, is_sent: bool, message: Any) -> object:
    """What comes of it."""
    try:
        return session.send(message) if is_sent else session.receive(message)  # type: ignore[func-returns-value]
    except (LocalProtocolError, RemoteProtocolError) as error:
        return type(error), str(error)


OF_TWO_ROUNDS: list[Any] = [
    *[feat_part(step, part, round_num) for round_num in (7, 8) for step in (0, 1) for part in (0, 1)],
    *[m.Gradient(round_num, step, 0.0, X, part=part) for round_num in (7, 8) for step in (0, 1) for part in (0, 1)],
    *[in_parts(8, parts_per_step=2, num_exchanges=1), assign(8), release(7), release(8), update(7), m.Ping(), m.Pong()],
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(Role)),
    st.sampled_from([assign(7), in_parts(7, parts_per_step=2)]),
    st.lists(
        st.tuples(st.sampled_from(["right way"] * 9 + ["wrong way"]), st.sampled_from(OF_TWO_ROUNDS)), max_size=150
    ),
)
def test_one_look_finds_what_the_table_and_the_rules_find(role: Role, first: m.Assign, told: list[Any]) -> None:
    """Whatever is said, one end after the other: the same answers, and the same state."""
    look, table = at(role, [*TO_IDLE, (DOWN, first)]), ByTheTable(role)
    vars(table).update(vars(at(role, [*TO_IDLE, (DOWN, first)])))
    for way, message in told:
        is_up = isinstance(message, m.Features | m.Update | m.Ping)
        is_sent = (is_up == (role is Role.WORKER)) != (way == "wrong way")
        assert said(look, is_sent, message) == said(table, is_sent, message)
        assert vars(look) == vars(table)


@pytest.mark.parametrize("num_seen", [0, 1, 2])
def test_of_a_step_in_parts_what_was_not_seen_is_stale_after_a_release_and_no_more(num_seen: int) -> None:
    """Three parts, of which the server had seen some: the others may be under way, and nothing else."""
    script = [*TO_IDLE, (DOWN, in_parts()), *[(UP, feat_part(0, part)) for part in range(num_seen)]]
    server = at(Role.SERVER, [*script, (DOWN, release(7)), (DOWN, in_parts(8))])
    for part in range(num_seen, 3):
        assert server.receive(feat_part(0, part)) is Arrival.STALE
    with pytest.raises(RemoteProtocolError, match="Features carries round 7; expected 8"):
        server.receive(feat_part(1, 0))
    assert server.receive(feat_part(0, 0, round_num=8)) is Arrival.FRESH


def test_after_a_release_while_the_worker_waits_for_some_of_its_parts_nothing_is_stale() -> None:
    server = at(Role.SERVER, [*ONE_ANSWERED, (UP, feat_part(0, 1)), (UP, feat_part(0, 2)), (DOWN, release(7))])
    with pytest.raises(RemoteProtocolError):
        server.receive(feat_part(1, 0))


def test_when_the_update_is_next_one_message_is_stale() -> None:
    script = [*TO_IDLE, (DOWN, in_parts(num_exchanges=1))]
    for part in range(3):
        script += [(UP, feat_part(0, part)), (DOWN, grad_part(0, part))]
    server = at(Role.SERVER, [*script, (DOWN, release(7))])
    assert server.receive(update(7)) is Arrival.STALE
    with pytest.raises(RemoteProtocolError):
        server.receive(update(7))


def test_anything_fresh_proves_that_no_stale_part_is_left() -> None:
    """Of three parts the server had seen none and sees one late; then the next round begins, and part 1 is wrong."""
    server = at(Role.SERVER, [*TO_IDLE, (DOWN, in_parts()), (DOWN, release(7)), (DOWN, assign(8))])
    assert server.receive(feat_part(0, 0)) is Arrival.STALE
    assert server.receive(feat(8, 0)) is Arrival.FRESH
    with pytest.raises(RemoteProtocolError):
        server.receive(feat_part(0, 1))


def test_several_releases_of_steps_in_parts() -> None:
    """After a late part of round 8 no part of round 7 can come, and of round 8 two more may."""
    script = [*TO_IDLE, (DOWN, in_parts(7)), (DOWN, release(7)), (DOWN, in_parts(8)), (DOWN, release(8))]
    server = at(Role.SERVER, script)
    assert [server.receive(feat_part(0, part, round_num=7)) for part in range(2)] == [Arrival.STALE] * 2
    assert server.receive(feat_part(0, 0, round_num=8)) is Arrival.STALE
    with pytest.raises(RemoteProtocolError):
        server.receive(feat_part(0, 2, round_num=7))
    assert [server.receive(feat_part(0, part, round_num=8)) for part in (1, 2)] == [Arrival.STALE] * 2
    with pytest.raises(RemoteProtocolError):
        server.receive(feat_part(1, 0, round_num=8))


def test_a_worker_that_was_released_drops_all_gradients_of_the_round() -> None:
    worker = at(Role.WORKER, [*ONE_OUT, (UP, feat_part(0, 1)), (DOWN, release(7))])
    assert worker.receive(grad_part(0, 0)) is Arrival.STALE
    assert worker.receive(grad_part(0, 1)) is Arrival.STALE
    assert worker.receive(in_parts(8)) is Arrival.FRESH


def test_a_survey_in_parts_probes_and_echoes_each() -> None:
    worker, server = Session(Role.WORKER), Session(Role.SERVER)
    script = [
        *TO_IDLE, (DOWN, IN_TWO),
        (UP, m.Probe(7, PAYLOAD, 0)), (DOWN, m.Echo(7, 0.0, PAYLOAD, 0)),
        (UP, m.Probe(7, PAYLOAD, 1)), (DOWN, m.Echo(7, 0.0, PAYLOAD, 1)), (UP, report(7)),
    ]  # fmt: skip
    for direction, message in script:
        speaker, hearer = (worker, server) if direction == UP else (server, worker)
        speaker.send(message)
        assert hearer.receive(message) is Arrival.FRESH
    assert worker.state is server.state is State.IDLE
