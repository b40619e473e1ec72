"""Which addresses ZeroMQ gets to see, which of them are this machine's, and what to say when it cannot bind one.

libzmq reads port 99999 as 34463 and 80x as 80, and deletes whatever lies at an ipc path: both are checked here first.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from mergesfl.errors import ConfigError, TransportError

_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\*|[0-9]{1,5})")

BIND_HELP: Mapping[int, tuple[type[ConfigError | TransportError], str]] = {
    errno.EADDRINUSE: (TransportError, "another process has it: stop that one or take another port, or port *"),
    errno.EADDRNOTAVAIL: (TransportError, "this machine has no such address: use one of its own, or * for all"),
    errno.EACCES: (TransportError, "not permitted: take a port above 1023 or a folder you may write to"),
    errno.ENOENT: (TransportError, "its folder does not exist: create it"),
    errno.ENODEV: (ConfigError, "no such host or interface on this machine: use one of its addresses, or * for all"),
    errno.EINVAL: (ConfigError, "not understood: write tcp://HOST:PORT or ipc:///PATH"),
    errno.ENAMETOOLONG: (ConfigError, "too long for a UNIX socket (107 bytes): take a shorter path"),
}


def check_address(address: str, wildcard: bool) -> None:
    """Refuses what is no tcp:// or ipc:// address; port * or 0 is one only where `wildcard`.

    Raises:
        ConfigError: with the form that is expected.
    """
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    match = _TCP.fullmatch(address)
    port = match[2] if match else ""
    wild = port == "*" or (port != "" and int(port) == 0)
    if not match or (not wild and int(port) > 65535):
        raise ConfigError(f"'{address}' is no address; write tcp://HOST:PORT with a port up to 65535, or ipc:///PATH")
    if not wildcard and (wild or match[1] == "*"):
        raise ConfigError(f"cannot connect to '{address}': name the server's host and port")


def check_ipc_path(address: str) -> None:
    """Makes sure that all there is at an ipc path is a dead socket, which libzmq may delete.

    Raises:
        TransportError: a file lies there that is no socket, or a living process listens on it.
    """
    path = Path(address.removeprefix("ipc://"))
    if not address.startswith("ipc://") or str(path) == "*" or str(path).startswith("@") or not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise TransportError(
            f"cannot bind '{address}': a file that is no socket lies there; move it or take another path"
        )
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # left behind by a process that is gone
    raise TransportError(f"cannot bind '{address}': {BIND_HELP[errno.EADDRINUSE][1]}")


def is_of_this_machine(host: str) -> bool:
    """Whether this numeric address, IPv4 or IPv6, is one of this machine's own, which alone can be bound.

    (But for net.ipv4.ip_nonlocal_bind = 1, where all can.)
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        family, kind, _, _, own = found[0]
        with socket.socket(family, kind) as probe:
            probe.bind(own)
    except OSError:
        return False
    return True
