"""How patient a link is."""

from __future__ import annotations

from dataclasses import dataclass

from mergesfl.errors import ConfigError


@dataclass(frozen=True)
class LinkSettings:
    """How patient a link is. All [ours].

    Attributes:
        linger_seconds: how long `close` waits for queued messages to leave.
        max_queued_messages: per peer and direction (ZMQ's high-water mark). The protocol is lock-step: a handful is
            under way at a time. What a server has not read is bounded further (zeromq.py, SERVER_UNREAD_MESSAGES).
        heartbeat_interval_seconds: a peer is asked this often.
        heartbeat_timeout_seconds: a peer that completes no frame for so long after a question is dropped. libzmq counts
            whole frames only, and its answer waits behind the frame being sent: this must exceed the time that the
            LARGEST TENSOR needs on the slowest link. 300 s are 37 MB at 1 Mb/s. A killed process is noticed at once
            (its kernel closes the connection), and within a round the step deadline is what counts; this bound is for
            machines that were frozen or unplugged while nobody waited for them.
        reconnect_seconds: first pause before connecting again; doubled up to max_reconnect_seconds.
        max_reconnect_seconds: longest pause between two attempts.
        shares_memory: between two ends on one machine large frames lie in memory that both map (shared.py), whatever
            the address. False: they cross the socket, as between two machines; for who wants to measure that.
    """

    linger_seconds: float = 2.0
    max_queued_messages: int = 64
    heartbeat_interval_seconds: float = 5.0
    heartbeat_timeout_seconds: float = 300.0
    reconnect_seconds: float = 0.1
    max_reconnect_seconds: float = 2.0
    shares_memory: bool = True

    def __post_init__(self) -> None:
        if not 0.1 <= self.heartbeat_timeout_seconds <= 6553.0:  # libzmq sends it as 16 bits of 0.1 s
            raise ConfigError(f"heartbeat_timeout_seconds = {self.heartbeat_timeout_seconds}; choose 0.1 to 6553")
        if not 0.001 <= self.heartbeat_interval_seconds <= self.heartbeat_timeout_seconds:
            limit = self.heartbeat_timeout_seconds
            found = self.heartbeat_interval_seconds
            raise ConfigError(
                f"heartbeat_interval_seconds = {found}; choose 0.001 to heartbeat_timeout_seconds = {limit}"
            )
        if self.max_queued_messages < 1:  # 0 means no limit to libzmq
            raise ConfigError(f"max_queued_messages = {self.max_queued_messages}; choose 1 or more")
        if not 0.0 <= self.linger_seconds <= 3600.0:
            raise ConfigError(f"linger_seconds = {self.linger_seconds}; choose 0 to 3600")
        if not 0.001 <= self.reconnect_seconds <= self.max_reconnect_seconds <= 3600.0:
            found_pair = f"{self.reconnect_seconds} and {self.max_reconnect_seconds}"
            raise ConfigError(
                f"reconnect_seconds and max_reconnect_seconds = {found_pair}; choose 0.001 <= a <= b <= 3600"
            )


DEFAULT_LINK = LinkSettings()
