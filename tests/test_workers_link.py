"""A worker's session: every way in which it ends, and how it waits, on a clock moved by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mergesfl.errors import LocalProtocolError
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.layout import Frame
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
    Release,
    Reset,
    Welcome,
)
from mergesfl.runtime.patience import REAL
from mergesfl.transport.base import Frames
from tests.memory_cluster import FEATURE_SHAPE, HandClock, registration, welcome
from workers.link import (
    HANDSHAKE_SECONDS,
    Link,
    RefusedError,
    RoundReleasedError,
    RunFinishedError,
    SessionLostError,
    StoppedError,
)

WELCOME = welcome(0)
ASSIGN = Assign(100, 2, 2, 1, "mergesfl", {}, {})
FEATURES = Features(100, 0, np.ones((1, 2), np.float32), np.zeros(1, np.int64))
GRADIENT = Gradient(100, 0, 0.0, np.ones((1, 2), np.float32))


class ScriptedEndpoint:
    """Gives what was queued, one by one; a poll without a message takes its time. Offline: sends nothing."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.inbox: list[Message | bytes] = []
        self.sent: list[Message] = []
        self.online_at_seconds = 0.0
        self.closed = False

    def send(self, frames: Frames) -> bool:
        if self.clock.seconds < self.online_at_seconds:
            return False
        self.sent.append(decode(frames))
        return True

    def recv(self, timeout_seconds: float) -> list[Frame] | None:
        if not self.inbox:
            self.clock.seconds += timeout_seconds
            return None
        item = self.inbox.pop(0)
        frames: Sequence[object] = [item] if isinstance(item, bytes) else encode(item)
        return [memoryview(frame) for frame in frames]  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True


class Line:
    """A link over a scripted endpoint, moved to a state of the session."""

    def __init__(self, *path: Message) -> None:
        self.clock = HandClock()
        self.endpoint = ScriptedEndpoint(self.clock)
        self.stop_at_seconds = 1e9
        self.link = Link(self.endpoint, self.clock, self._check)
        for message in path:
            if isinstance(message, Welcome | Assign | Gradient):
                self.endpoint.inbox.append(message)
                assert type(self.link.receive()) is type(message)
            else:
                self.link.send(message)

    def _check(self) -> None:
        if self.clock.seconds >= self.stop_at_seconds:
            raise StoppedError("asked to stop")


IDLE: tuple[Message, ...] = (registration("a"), WELCOME, Ready(FEATURE_SHAPE, 512))
WORKING: tuple[Message, ...] = (*IDLE, ASSIGN)
WAITING: tuple[Message, ...] = (*WORKING, FEATURES)


def test_a_whole_conversation_passes() -> None:
    line = Line(*WAITING, GRADIENT)
    assert [type(message).__name__ for message in line.endpoint.sent] == ["Register", "Ready", "Features"]
    line.link.close()
    assert line.endpoint.closed


@pytest.mark.parametrize("path", [(registration("a"),), IDLE, WORKING, WAITING])
@pytest.mark.parametrize(
    ("message", "error"),
    [(Reset("who are you?"), SessionLostError), (Goodbye("done"), RunFinishedError), (Refuse("no"), RefusedError)],
)
def test_every_end_of_a_session_is_an_error_of_its_own(
    path: tuple[Message, ...], message: Reset | Goodbye | Refuse, error: type[Exception]
) -> None:
    line = Line(*path)
    line.endpoint.inbox.append(message)
    with pytest.raises(error, match=message.reason.replace("?", r"\?")):
        line.link.receive()


@pytest.mark.parametrize("path", [WORKING, WAITING])
def test_a_release_ends_the_round_and_not_the_session(path: tuple[Message, ...]) -> None:
    line = Line(*path)
    line.endpoint.inbox += [Release(100, "too late"), Assign(101, 1, 1, 1, "mergesfl", {}, {})]
    with pytest.raises(RoundReleasedError, match="too late"):
        line.link.receive()
    following = line.link.receive()
    assert isinstance(following, Assign) and following.round_num == 101


def test_what_belongs_to_a_round_that_was_left_is_skipped() -> None:
    line = Line(*WAITING)
    following = Assign(200, 1, 1, 1, "mergesfl", {}, {})
    line.endpoint.inbox += [Release(100, "void"), GRADIENT, Release(100, "again"), Pong(), following]
    with pytest.raises(RoundReleasedError):
        line.link.receive()
    message = line.link.receive()
    assert isinstance(message, Assign) and message.round_num == 200
    assert line.clock.seconds == 0.0


@pytest.mark.parametrize("item", [b"garbage", ASSIGN, GRADIENT])
def test_a_server_that_breaks_the_protocol_ends_the_session(item: Message | bytes) -> None:
    line = Line(registration("a"))  # waits for Welcome
    line.endpoint.inbox.append(item)
    with pytest.raises(SessionLostError, match="the server broke the protocol"):
        line.link.receive()


def test_a_waiting_worker_pings_once_a_second() -> None:
    """By hand: polls of 0.2 s; the ping goes out when a second has passed since the last: at 1, 2, 3, 4 s."""
    line = Line(*WAITING)
    line.stop_at_seconds = 4.9
    with pytest.raises(StoppedError):
        line.link.receive()
    assert REAL.ping_seconds == 1.0 and REAL.poll_seconds == 0.2
    assert line.endpoint.sent[3:] == [Ping()] * 4


def test_a_registration_without_an_answer_is_given_up() -> None:
    line = Line(registration("a"))
    with pytest.raises(SessionLostError, match="no answer within 10 s of registering"):
        line.link.receive()
    assert line.clock.seconds == pytest.approx(HANDSHAKE_SECONDS, abs=2 * REAL.poll_seconds)


def test_the_patience_with_a_registration_begins_when_it_is_sent_and_again_with_every_sign_of_the_server() -> None:
    line = Line()
    line.endpoint.online_at_seconds = 300.0
    line.link.send(registration("a"))  # waits for the connection
    begin_seconds, signs = line.clock.seconds, [8.0, 16.0]

    def give_signs() -> None:
        if signs and line.clock.seconds >= begin_seconds + signs[0]:
            signs.pop(0)
            line.endpoint.inbox.append(Pong())

    line.link._check = give_signs
    with pytest.raises(SessionLostError, match="no answer"):
        line.link.receive()
    assert line.clock.seconds - begin_seconds == pytest.approx(16.0 + HANDSHAKE_SECONDS, abs=3 * REAL.poll_seconds)


def test_a_worker_that_is_ready_waits_for_a_server_that_evaluates_for_hours() -> None:
    line = Line(*IDLE)
    line.stop_at_seconds = 7200.0
    with pytest.raises(StoppedError):
        line.link.receive()


def test_a_wish_to_stop_is_noticed_at_the_next_poll() -> None:
    line = Line(*WAITING)
    line.stop_at_seconds = 0.5
    with pytest.raises(StoppedError):
        line.link.receive()
    assert line.clock.seconds == pytest.approx(0.6)


def test_sending_waits_for_a_connection() -> None:
    line = Line()
    line.endpoint.online_at_seconds = 7.0
    line.link.send(registration("a"))
    assert line.endpoint.sent == [registration("a")]
    assert line.clock.seconds == pytest.approx(7.0, abs=0.2)


def test_sending_without_a_connection_notices_a_wish_to_stop() -> None:
    line = Line()
    line.endpoint.online_at_seconds, line.stop_at_seconds = 1e8, 3.0
    with pytest.raises(StoppedError):
        line.link.send(registration("a"))
    assert line.clock.seconds == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Goodbye("done"), RunFinishedError),
        (Release(100, "void"), RoundReleasedError),
        (Reset("who?"), SessionLostError),
        (Refuse("no"), RefusedError),
    ],
)
def test_what_the_server_said_before_it_went_away_is_heard_while_sending(
    message: Message, error: type[Exception]
) -> None:
    line = Line(*WORKING)
    line.endpoint.online_at_seconds = 1e8
    line.endpoint.inbox.append(message)
    with pytest.raises(error):
        line.link.send(FEATURES)


def test_a_message_that_nobody_asked_for_while_sending_ends_the_session() -> None:
    line = Line(*WORKING)
    line.endpoint.online_at_seconds = 1e8
    line.endpoint.inbox.append(GRADIENT)  # legal to the session once Features are noted, but nothing was sent
    with pytest.raises(SessionLostError, match="got Gradient where nothing was asked"):
        line.link.send(FEATURES)


def test_what_the_session_does_not_allow_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError):
        Line(*IDLE).link.send(FEATURES)


def test_leaving_says_so_with_a_reason_of_bounded_length() -> None:
    line = Line(*WAITING)
    line.link.leave("x" * 5000)
    assert line.endpoint.sent[-1] == Leave("x" * 4093 + "...")


def test_leaving_without_a_session_or_a_connection_is_silent() -> None:
    line = Line(*IDLE)
    line.endpoint.inbox.append(Goodbye("done"))
    with pytest.raises(RunFinishedError):
        line.link.receive()
    line.link.leave("too late")
    assert line.endpoint.sent[-1] == IDLE[2]
    offline = Line()
    offline.endpoint.online_at_seconds = 1.0
    offline.link.leave("nobody hears it")
    assert offline.endpoint.sent == []


IN_TWO_PARTS = Assign(100, 2, 2, 2, "mergesfl", {}, {}, parts_per_step=2)
PARTS = [Features(100, 0, np.ones((1, 2), np.float32), np.zeros(1, np.int64), part=part) for part in range(2)]


def test_an_answer_to_the_first_part_that_comes_while_the_second_goes_out_is_kept() -> None:
    """The second takes until 2 s to be sent; the answer is there before, and is what `receive` returns first."""
    line = Line(*IDLE, IN_TWO_PARTS, PARTS[0])
    line.endpoint.online_at_seconds = 2.0
    line.endpoint.inbox.append(GRADIENT)
    line.link.send(PARTS[1])
    assert line.clock.seconds >= 2.0 and line.endpoint.sent[-1].part == 1  # type: ignore[union-attr]
    line.endpoint.inbox.append(Gradient(100, 0, 0.0, np.ones((1, 2), np.float32), part=1))
    answers = [line.link.receive(), line.link.receive()]
    assert [answer.part for answer in answers if isinstance(answer, Gradient)] == [0, 1]


@pytest.mark.parametrize("num_out", [0, 1])
def test_an_answer_to_what_is_not_out_yet_ends_the_session(num_out: int) -> None:
    line = Line(*IDLE, IN_TWO_PARTS, *PARTS[:num_out])
    line.endpoint.online_at_seconds = 2.0
    line.endpoint.inbox += [
        Gradient(100, 0, 0.0, np.ones((1, 2), np.float32), part=part) for part in range(num_out + 1)
    ]
    with pytest.raises(SessionLostError, match="got Gradient where nothing was asked"):
        line.link.send(PARTS[num_out])


def test_a_release_takes_what_was_kept_with_it() -> None:
    line = Line(*IDLE, IN_TWO_PARTS, PARTS[0])
    line.endpoint.online_at_seconds = 2.0
    line.endpoint.inbox += [GRADIENT, Release(100, "too late"), Assign(101, 1, 1, 1, "mergesfl", {}, {})]
    with pytest.raises(RoundReleasedError, match="too late"):
        line.link.send(PARTS[1])
    following = line.link.receive()
    assert isinstance(following, Assign) and following.round_num == 101
