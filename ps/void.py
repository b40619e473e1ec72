"""Why an attempt at a round does not count."""

from __future__ import annotations

from mergesfl.errors import MergeSFLError


class VoidRoundError(MergeSFLError):
    """Too few workers of a plan are left."""


class InfiniteRoundError(VoidRoundError):
    """The training has left the finite numbers."""
