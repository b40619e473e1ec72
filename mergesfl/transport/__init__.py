"""Endpoints by address: tcp://HOST:PORT, ipc:///PATH, and memory://NAME within one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from mergesfl.errors import ConfigError, nearest
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.transport.base import ServerEndpoint, WorkerEndpoint
from mergesfl.transport.memory import MemoryHub
from mergesfl.transport.settings import DEFAULT_LINK, LinkSettings
from mergesfl.transport.zeromq import ZmqServer, ZmqWorker

__all__ = ["DEFAULT_LINK", "LinkSettings", "MemoryHub", "ServerEndpoint", "WorkerEndpoint", "bind", "connect"]


class _Request(NamedTuple):
    address: str
    settings: LinkSettings
    limits: Limits
    hub: MemoryHub | None


class _Scheme(NamedTuple):
    bind: Callable[[_Request], ServerEndpoint]
    connect: Callable[[_Request], WorkerEndpoint]


def _hub_of(request: _Request) -> MemoryHub:
    if request.hub is None:
        raise ConfigError(f"'{request.address}' needs a hub: make one MemoryHub and pass it to both ends")
    if request.hub.address != request.address:
        raise ConfigError(f"'{request.address}' is not the address of the hub given, '{request.hub.address}'")
    return request.hub


_ZEROMQ = _Scheme(
    bind=lambda request: ZmqServer(request.address, request.settings, limits=request.limits),
    connect=lambda request: ZmqWorker(request.address, request.settings, limits=request.limits),
)

SCHEMES: Mapping[str, _Scheme] = {
    "tcp": _ZEROMQ,
    "ipc": _ZEROMQ,
    "memory": _Scheme(
        bind=lambda request: _hub_of(request).server(),
        connect=lambda request: _hub_of(request).worker(),
    ),
}


def bind(
    address: str, settings: LinkSettings = DEFAULT_LINK, limits: Limits = DEFAULT, hub: MemoryHub | None = None
) -> ServerEndpoint:
    """The parameter server's end at this address. Port * or 0: any free one, then read `.address`.

    Settings and limits are for tcp and ipc; a hub has its own. Only memory:// needs, and uses, a hub.

    Raises:
        ConfigError: the address is not one of tcp://, ipc://, memory://, or is malformed.
        TransportError: it cannot be bound here and now.
    """
    return _scheme(address).bind(_Request(address, settings, limits, hub))


def connect(
    address: str, settings: LinkSettings = DEFAULT_LINK, limits: Limits = DEFAULT, hub: MemoryHub | None = None
) -> WorkerEndpoint:
    """A worker's end, connected to this address as soon as somebody is there.

    Raises:
        ConfigError: the address is not one of tcp://, ipc://, memory://, or is malformed.
    """
    return _scheme(address).connect(_Request(address, settings, limits, hub))


def _scheme(address: str) -> _Scheme:
    name = address.partition("://")[0]
    if name not in SCHEMES:
        raise ConfigError(f"unknown kind of address '{address}': {nearest(name, SCHEMES)}")
    return SCHEMES[name]
