"""Whose fault an error is, as types.

Every message gives the value that was found, the limit or the shape that was expected, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergeSFLError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(MergeSFLError):
    """The user's configuration or command line is wrong. Nothing was started and nothing was lost."""


class DataError(MergeSFLError):
    """A data set is missing or damaged: names the path, what was expected there and where to get it."""


class LocalProtocolError(MergeSFLError):
    """Our own bug: this end tried to send a message that its session does not allow."""


class RemoteProtocolError(MergeSFLError):
    """The other end broke the protocol. Only that peer's session is closed; the run goes on."""


class TransportError(MergeSFLError):
    """The link failed: an address cannot be bound, or a peer is unreachable."""


class QuorumError(MergeSFLError):
    """Too few workers are left to go on. The last checkpoint is intact."""


class CheckpointError(MergeSFLError):
    """A checkpoint is missing, damaged or belongs to another configuration."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """The legal names, the most similar one first: the last part of a message about an unknown name.

    >>> nearest("mergesfll", ["fedavg", "mergesfl"])
    "did you mean 'mergesfl'? legal: fedavg, mergesfl"
    """
    names = sorted(legal)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}legal: {', '.join(names)}"


def unknown_name(what: str, name: str, legal: Iterable[str]) -> ConfigError:
    """The error for a name that is in none of our tables."""
    return ConfigError(f"unknown {what} '{name}': {nearest(name, legal)}")
