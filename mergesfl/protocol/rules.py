"""What each field of a message may hold: one rule per field name, the same for sending and for receiving.

A rule takes a value of any type whatever and returns it as the message holds it, or raises IllegalValue. Types are
exact: a bool is no int, a string no sequence. An int is a legal float, as in Python's own typing. All rules are [ours].
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping

from mergesfl.errors import ConfigError
from mergesfl.parts import MAX_PARTS_PER_STEP
from mergesfl.protocol.limits import DEFAULT, Limits

Rule = Callable[[object, Limits], object]

# Ids go into logs, tables, pictures and file names: nothing that any of those would interpret.
_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*")


class IllegalValue(ValueError):
    """A value that no message may hold. Never leaves the package: the codec says whose fault it is."""


def shown(value: object) -> str:
    """A value for an error message, short whatever its size."""
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__}"


def _whole(value: object, low: int, high: int) -> int:
    if type(value) is int and low <= value <= high:
        return value
    if type(value) is not int:
        raise IllegalValue(f"{shown(value)}, expected an int")
    raise IllegalValue(f"{shown(value)}, expected {low} to {high}")


def _string(value: object, max_length: int) -> str:
    if type(value) is not str:
        raise IllegalValue(f"{shown(value)}, expected a str")
    if len(value) > max_length:
        raise IllegalValue(f"{shown(value)} of {len(value)} characters, the limit is {max_length}")
    return value


def _sequence(value: object, max_length: int) -> list[object]:
    if type(value) not in (list, tuple):
        raise IllegalValue(f"{shown(value)}, expected a sequence")
    items: list[object] = list(value)  # type: ignore[call-overload]
    if len(items) > max_length:
        raise IllegalValue(f"{len(items)} entries, the limit is {max_length}")
    return items


def count(value: object, limits: Limits) -> int:
    """Rounds, steps, samples, bytes: an int from 0 to max_count."""
    return _whole(value, 0, limits.max_count)


def seed(value: object, limits: Limits) -> int:
    """An int from 0 to max_int."""
    return _whole(value, 0, limits.max_int)


def divisor_count(value: object, limits: Limits) -> int:
    """A count that something is divided by: from 1 to max_count."""
    return _whole(value, 1, limits.max_count)


def part(value: object, limits: Limits) -> int:
    """The place of a part among those of its step: an int from 0 to MAX_PARTS_PER_STEP - 1."""
    return _whole(value, 0, MAX_PARTS_PER_STEP - 1)


def parts_per_step(value: object, limits: Limits) -> int:
    """How many parts a step has at most: an int from 1 to MAX_PARTS_PER_STEP."""
    return _whole(value, 1, MAX_PARTS_PER_STEP)


def payload_bytes(value: object, limits: Limits) -> int:
    """What one message can carry beside its header."""
    return _whole(value, 0, max(limits.max_message_bytes - limits.max_header_bytes, 0))


def real(value: object, limits: Limits) -> float:
    """A finite float; an int counts as one."""
    if type(value) is int:
        return float(_whole(value, -limits.max_int, limits.max_int))
    if type(value) is not float:
        raise IllegalValue(f"{shown(value)}, expected a float")
    if not math.isfinite(value):
        raise IllegalValue(f"{value}, expected a finite number")
    return value


def positive(value: object, limits: Limits) -> float:
    """What is divided by: a finite float above 0."""
    number = real(value, limits)
    if number <= 0.0:
        raise IllegalValue(f"{number}, expected a number above 0")
    return number


def flag(value: object, limits: Limits) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise IllegalValue(f"{shown(value)}, expected a bool")
    return value


def seconds(value: object, limits: Limits) -> float:
    """A duration: a finite float from 0 to max_seconds."""
    number = real(value, limits)
    if not 0.0 <= number <= limits.max_seconds:
        raise IllegalValue(f"{number}, expected 0 to {limits.max_seconds} seconds")
    return number


def text(value: object, limits: Limits) -> str:
    """Words for people: printable characters up to max_text_length, or none (no line breaks, no terminal codes)."""
    string = _string(value, limits.max_text_length)
    if not string.isprintable():
        raise IllegalValue(f"{shown(string)}, expected printable characters")
    return string


def name(value: object, limits: Limits) -> str:
    """A name for programs: 1 to max_name_length printable characters (no line breaks, no terminal codes)."""
    string = _string(value, limits.max_name_length)
    if not string or not string.isprintable():
        raise IllegalValue(f"{shown(string)}, expected printable characters, at least one")
    return string


def ruled(what: str, rule: Rule, value: object, limits: Limits) -> object:
    """What the rule makes of the value; IllegalValue says of what."""
    try:
        return rule(value, limits)
    except IllegalValue as error:
        raise IllegalValue(f"{what} is {error}") from None


def worker_id(value: object, limits: Limits) -> str:
    """The name of a worker: a letter or digit, then letters, digits and . _ : @ - up to max_worker_id_length."""
    string = _string(value, limits.max_worker_id_length)
    if not _WORKER_ID.fullmatch(string):
        raise IllegalValue(f"{shown(string)}, expected a letter or digit, then letters, digits and any of . _ : @ -")
    return string


def check_worker_id(value: str) -> None:
    """Raises ConfigError for an id that could not be sent."""
    try:
        worker_id(value, DEFAULT)
    except IllegalValue as error:
        raise ConfigError(f"worker id {error}: choose another --id") from None


def optional_name(value: object, limits: Limits) -> str:
    """A name, or "" for none (a federated method has no cut)."""
    return "" if value == "" and type(value) is str else name(value, limits)


def setting(value: object, limits: Limits) -> int | float | str | bool:
    """A setting of a method: int, finite float, str or bool."""
    if type(value) is bool:
        return value
    if type(value) is int:
        return _whole(value, -limits.max_int, limits.max_int)
    return text(value, limits) if type(value) is str else real(value, limits)


def shape(value: object, limits: Limits) -> tuple[int, ...]:
    """The shape of a tensor: at most max_tensor_rank dimensions, none larger than a message could be."""
    dimensions = _sequence(value, limits.max_tensor_rank)
    return tuple([_whole(dimension, 0, limits.max_message_bytes) for dimension in dimensions])


def sequence_of(rule: Rule) -> Rule:
    """The rule for a sequence of values that obey `rule`."""

    def sequence(value: object, limits: Limits) -> tuple[object, ...]:
        return tuple(rule(item, limits) for item in _sequence(value, limits.max_sequence_length))

    return sequence


def table_of(rule: Rule) -> Rule:
    """The rule for a mapping from names to values that obey `rule`."""

    def table(value: object, limits: Limits) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise IllegalValue(f"{shown(value)}, expected a mapping")
        if len(value) > limits.max_map_entries:
            raise IllegalValue(f"{len(value)} entries, the limit is {limits.max_map_entries}")
        return dict(entry(key, item, limits) for key, item in value.items())

    def entry(key: object, item: object, limits: Limits) -> tuple[str, object]:
        try:
            return name(key, limits), rule(item, limits)
        except IllegalValue as error:
            raise IllegalValue(f"entry {shown(key)} is {error}") from None

    return table


RULES: Mapping[str, Rule] = {
    "batch_size": count,
    "class_names": sequence_of(name),
    "compute_seconds": seconds,
    "compute_seconds_per_sample": seconds,
    "crop_padding_pixels": count,
    "cut": optional_name,
    "device": text,
    "divisor": positive,
    "echo_bytes": payload_bytes,
    "feature_bytes_per_sample": count,
    "feature_codec": name,
    "feature_shape": shape,
    "flip": flag,
    "gradient_codec": name,
    "held_seconds": seconds,
    "label_counts": sequence_of(count),
    "mean": sequence_of(real),
    "method": name,
    "metrics": table_of(real),
    "model": name,
    "num_exchanges": count,
    "num_probe_samples": divisor_count,
    "num_samples": count,
    "num_steps": count,
    "part": part,
    "parts_per_step": parts_per_step,
    "probe_bytes": payload_bytes,
    "protocol_version": count,
    "reason": text,
    "round_num": count,
    "sample_shape": shape,
    "seed": seed,
    "settings": table_of(setting),
    "std": sequence_of(positive),
    "step": count,
    "stored_type": name,
    "transfer_seconds": seconds,
    "transfer_seconds_per_sample": seconds,
    "versions": table_of(text),
    "weight_codec": name,
    "whole_network": flag,
    "worker_id": worker_id,
}

# Of the rules that are a type and an interval under the default limits: what lies within is legal as it is.
BOUNDS: Mapping[Rule, tuple[type, float, float]] = {
    count: (int, 0, DEFAULT.max_count),
    seed: (int, 0, DEFAULT.max_int),
    divisor_count: (int, 1, DEFAULT.max_count),
    part: (int, 0, MAX_PARTS_PER_STEP - 1),
    parts_per_step: (int, 1, MAX_PARTS_PER_STEP),
    seconds: (float, 0.0, DEFAULT.max_seconds),
}

ARRAY_FIELDS = frozenset({"features", "labels", "gradient", "payload"})  # one tensor each
STATE_FIELDS = frozenset({"parts", "state"})  # a mapping from names to tensors
