"""All methods, as one literal table. To add one: a file that reads like its paper, and a line here."""

from __future__ import annotations

from mergesfl.errors import ConfigError, unknown_name
from mergesfl.methods import (
    adasfl,
    central,
    fedavg,
    gpsl,
    locfedmix_sl,
    mergesfl,
    mergesfl_plus,
    minibatch_sfl,
    pyramidfl,
    scala,
    smofi,
    splitfed_v1,
    splitfed_v2,
)
from mergesfl.methods.base import Method, MethodSettings
from mergesfl.training.split import SplitModel

METHODS: dict[str, Method] = {
    "mergesfl": mergesfl.METHOD,
    "mergesfl+": mergesfl_plus.METHOD,
    "splitfed-v1": splitfed_v1.METHOD,
    "splitfed-v2": splitfed_v2.METHOD,
    "fedavg": fedavg.METHOD,
    "minibatch-sfl": minibatch_sfl.METHOD,
    "scala": scala.METHOD,
    "gpsl": gpsl.METHOD,
    "smofi": smofi.METHOD,
    "locfedmix-sl": locfedmix_sl.METHOD,
    "adasfl": adasfl.METHOD,
    "pyramidfl": pyramidfl.METHOD,
}

CENTRAL = "central"  # has no workers and no exchanges, hence no program: see mergesfl.methods.central
SUMMARIES: dict[str, str] = {name: method.summary for name, method in METHODS.items()} | {CENTRAL: central.SUMMARY}


def find_method(name: str) -> Method:
    """The method of this name. Raises ConfigError with the nearest legal name."""
    if name not in METHODS:
        raise unknown_name("method", name, SUMMARIES)
    return METHODS[name]


def check_streaming(name: str, network: SplitModel, settings: MethodSettings) -> None:
    """Raises ConfigError where this method, network or setting cannot take features as they arrive."""
    check = find_method(name).check_streaming
    if check is None:
        legal = ", ".join(sorted(other for other, method in METHODS.items() if method.check_streaming))
        raise ConfigError(
            f"the method '{name}' needs all features of a step at once, or none: set training.merge = 'barrier', or "
            f"choose one of the methods that can take them as they arrive: {legal}"
        )
    check(network, settings)
