"""Initial weights as a pure function of a seed, without the global generator and safe with threads.

A network draws its own initial weights when it is built, always from torch's global generator. Here every random
operation of the building thread gets an explicit generator instead, below all Python code: each network keeps its
authors' own initialisation, and the result equals torch.manual_seed(seed) followed by building it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mergesfl.errors import ConfigError


class _SeededOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands `generator` to every random operation of this thread. Other threads are not concerned."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = self._source
        elif torch.Tag.nondeterministic_seeded in func.tags:
            if "generator" not in func.overloadpacket.overloads():
                raise ConfigError(f"initial weights use {func}, which takes no generator: use another initialisation")
            func = func.overloadpacket.generator
            kwargs["generator"] = self._source
        return func(*args, **kwargs)


def build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """build() on the CPU with all its random draws taken from a generator of this seed (0 <= seed < 2**64)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.device("cpu"), _SeededOperations(generator):
        return build()
