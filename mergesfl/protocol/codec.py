"""Message <-> frames. One msgpack header, then one raw frame per tensor.

    frame 0      msgpack [version, kind, [value, ...], specs]
    frame 1...   the elements of each tensor, in the order of the specs: little-endian, nothing else; in C order, or
                 channels_last: those of shape (n, c, h, w) in the order of (n, h, w, c)

The values are those of the message's fields that are no tensors, in the order of its record. The specs are bytes:
msgpack [[field, key, dtype, shape, channels_last], ...], where `key` is the name within a state or among parts, "" for
a field that is one tensor. From step to step they do not change: what they say is kept, so that both ends pack, parse
and check them once. Two rules:

1. Whatever bytes arrive, `decode` returns a message or raises RemoteProtocolError, and holds memory in proportion to
   the frames it was given.
2. What we would refuse we do not send: `encode` applies the same rules and raises LocalProtocolError.

No pickle, no msgpack extension types, no object or complex arrays. [ours]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields as record_fields
from typing import Any

import msgpack
import numpy as np

from mergesfl.errors import LocalProtocolError, RemoteProtocolError
from mergesfl.protocol.arrays import Extent, checked, dtype_name, extent_of, lent, viewed
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Assign,
    Echo,
    Features,
    Goodbye,
    Gradient,
    Leave,
    Message,
    Ping,
    Pong,
    Probe,
    Ready,
    Refuse,
    Register,
    Release,
    Report,
    Reset,
    Survey,
    Update,
    Welcome,
)
from mergesfl.protocol.rules import ARRAY_FIELDS, RULES, STATE_FIELDS, IllegalValue, Rule, name, shown

Frame = bytes | bytearray | memoryview

KINDS: Mapping[str, type[Message]] = {
    "assign": Assign,
    "echo": Echo,
    "features": Features,
    "goodbye": Goodbye,
    "gradient": Gradient,
    "leave": Leave,
    "ping": Ping,
    "pong": Pong,
    "probe": Probe,
    "ready": Ready,
    "refuse": Refuse,
    "register": Register,
    "release": Release,
    "report": Report,
    "reset": Reset,
    "survey": Survey,
    "update": Update,
    "welcome": Welcome,
}
_KIND_OF = {record: kind for kind, record in KINDS.items()}

_FIELDS = {kind: tuple(field.name for field in record_fields(record)) for kind, record in KINDS.items()}
# Of these, with their rules, what stands in the header: neither one tensor nor a mapping to tensors.
_PLAIN_FIELDS = {
    kind: tuple((name, RULES[name]) for name in names if name not in ARRAY_FIELDS | STATE_FIELDS)
    for kind, names in _FIELDS.items()
}
_TENSOR_FIELDS = {
    kind: tuple(name for name in names if name in ARRAY_FIELDS | STATE_FIELDS) for kind, names in _FIELDS.items()
}

_PROBING = (Probe, Echo)  # a tuple: a union takes ten times as long

# Specs that are kept, of so many tensors and bytes each: enough for every message but states, at most 10 MiB parsed.
NUM_KEPT = 128
MAX_KEPT_TENSORS = 16
MAX_KEPT_BYTES = 1024

_Spec = tuple[str, str, str, tuple[int, ...], bool]  # field, key, dtype, shape, channels_last


def encode(message: Message, limits: Limits = DEFAULT) -> list[Frame]:
    """The frames of a message.

    A tensor frame is a view of the array's own memory where that is little-endian and in one of the two orders, else a
    copy: whoever sends the frames lends that memory and must not change it until the message has left.

    Raises:
        LocalProtocolError: the message breaks a rule or a limit: our bug.
    """
    kind = _KIND_OF.get(type(message))
    if kind is None:
        raise LocalProtocolError(f"{shown(message)} is no message; the kinds are {', '.join(KINDS)}")
    try:
        return _encode(kind, message, limits)
    except IllegalValue as error:
        raise LocalProtocolError(f"cannot send {kind}: {error}; correct it where the message is made") from None


def decode(frames: Sequence[Frame], limits: Limits = DEFAULT) -> Message:
    """The message in these frames; its arrays are read-only views of the frames (no copy) and keep them alive.

    A frame that does not lie on a multiple of its element size (short frames that share a receive buffer) is copied:
    torch and vector instructions want aligned memory.

    Raises:
        RemoteProtocolError: the frames are no legal message. Nothing else is ever raised for the contents of frames.
    """
    try:
        return _decode([memoryview(frame) for frame in frames], limits)
    except IllegalValue as error:
        raise RemoteProtocolError(f"{error}; close this peer and see that both ends run the same mergesfl") from None


def wire_bytes(frames: Sequence[Frame]) -> int:
    """Bytes of payload in these frames, header included; the transport's own framing is not."""
    return sum([memoryview(frame).nbytes for frame in frames])


def _encode(kind: str, message: Message, limits: Limits) -> list[Frame]:
    values = [_ruled(field, rule, getattr(message, field), limits) for field, rule in _PLAIN_FIELDS[kind]]
    specs: list[_Spec] = []
    frames: list[Frame] = [b""]

    def add(field: str, key: str, value: object) -> None:
        array = checked(f"{field} {key}" if key else field, value, limits)
        frame, channels_last = lent(array)
        frames.append(frame)
        specs.append((field, key, dtype_name(array.dtype), array.shape, channels_last))

    for field in _TENSOR_FIELDS[kind]:
        value = getattr(message, field)
        if field in ARRAY_FIELDS:
            add(field, "", value)
        elif not isinstance(value, Mapping):
            raise IllegalValue(f"{field} is {shown(value)}, expected a mapping")
        else:
            for key, item in value.items():
                add(field, _named(f"name in {field}", key, limits), item)
    _check_whole(message)
    packed = _kept_packed(tuple(specs)) if len(specs) <= MAX_KEPT_TENSORS else _packed(specs)
    frames[0] = msgpack.packb([PROTOCOL_VERSION, kind, values, packed], use_bin_type=True)
    _check_sizes(frames, limits)
    return frames


def _packed(specs: Sequence[_Spec]) -> bytes:
    packed: bytes = msgpack.packb(specs, use_bin_type=True)
    return packed


_kept_packed = functools.lru_cache(NUM_KEPT)(_packed)


def _decode(frames: list[memoryview], limits: Limits) -> Message:
    _check_sizes(frames, limits)
    kind, values, packed = _parsed(frames[0], limits)
    expected = _PLAIN_FIELDS[kind]
    if len(values) != len(expected):
        names = ", ".join(name for name, _ in expected)
        raise IllegalValue(f"{kind} with {len(values)} values; expected {len(expected)}: {names}")
    content: dict[str, Any] = {
        field: _ruled(field, rule, value, limits) for (field, rule), value in zip(expected, values, strict=True)
    }
    is_kept = limits is DEFAULT and len(packed) <= MAX_KEPT_BYTES
    specs = _kept_announced(kind, packed) if is_kept else _announced(kind, packed, limits)
    if len(specs) != len(frames) - 1:
        raise IllegalValue(f"{kind} announces {len(specs)} tensors and brings {len(frames) - 1} frames")
    for field in _TENSOR_FIELDS[kind]:
        if field in STATE_FIELDS:
            content[field] = {}
    for (field, key, extent), frame in zip(specs, frames[1:], strict=True):
        if field in STATE_FIELDS:
            content[field][key] = viewed(frame, extent)
        else:
            content[field] = viewed(frame, extent)
    message = KINDS[kind](**content)
    _check_whole(message)
    return message


def _announced(kind: str, packed: bytes, limits: Limits) -> list[tuple[str, str, Extent]]:
    """Field, key and extent of each tensor of a message of this kind; no field is missing, none comes twice."""
    specs = _unpacked(packed, "tensor specs", limits)
    if type(specs) is not list:
        raise IllegalValue("tensor specs are no list")
    seen: set[tuple[str, str]] = set()
    announced = []
    for spec in specs:
        if type(spec) is not list or len(spec) != 5:
            raise IllegalValue(f"{shown(spec)} as a tensor spec, expected [field, key, dtype, shape, channels_last]")
        field, key, type_name, dimensions, channels_last = spec
        if type(field) is not str or type(key) is not str:
            raise IllegalValue(f"{kind} with a tensor named {shown(field)} {shown(key)}, expected two strings")
        if (field, key) in seen or field not in _TENSOR_FIELDS[kind] or (field in ARRAY_FIELDS and key):
            raise IllegalValue(f"{kind} with an unknown or repeated tensor {shown(field)} {shown(key)}")
        seen.add((field, key))
        if field in STATE_FIELDS:
            _named(f"name in {field}", key, limits)
        announced.append((field, key, extent_of(type_name, dimensions, channels_last, limits)))
    missing = sorted(field for field in ARRAY_FIELDS.intersection(_TENSOR_FIELDS[kind]) if (field, "") not in seen)
    if missing:
        raise IllegalValue(f"{kind} without the tensor {missing}")
    return announced


@functools.lru_cache(NUM_KEPT)
def _kept_announced(kind: str, packed: bytes) -> list[tuple[str, str, Extent]]:
    return _announced(kind, packed, DEFAULT)


def _parsed(header: memoryview, limits: Limits) -> tuple[str, list[object], bytes]:
    """Kind, values and tensor specs of a header; values and specs are still unchecked."""
    parts = _unpacked(header, "header", limits)
    if type(parts) is not list or not parts or type(parts[0]) is not int:
        raise IllegalValue("header is not [version, kind, values, tensors]")
    if parts[0] != PROTOCOL_VERSION:
        raise IllegalValue(f"peer speaks protocol version {parts[0]}, this end speaks {PROTOCOL_VERSION}")
    if len(parts) != 4 or type(parts[2]) is not list or type(parts[3]) is not bytes:
        raise IllegalValue("header is not [version, kind, values, tensors]")
    if type(parts[1]) is not str or parts[1] not in KINDS:
        raise IllegalValue(f"unknown kind of message {shown(parts[1])}; the kinds are {', '.join(KINDS)}")
    return parts[1], parts[2], parts[3]


def _unpacked(packed: bytes | memoryview, what: str, limits: Limits) -> object:
    try:
        return msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_distinct,
            max_str_len=4 * limits.max_text_length,  # UTF-8: up to 4 bytes per character
            max_bin_len=limits.max_header_bytes,
            max_ext_len=0,
            max_array_len=max(limits.max_sequence_length, limits.max_tensors),
            max_map_len=limits.max_map_entries,
        )
    except Exception as error:  # whatever the foreign parser raises: ValueError, RecursionError, its own types ...
        raise IllegalValue(f"{what} of {len(packed)} bytes is no msgpack: {str(error)[:200]}") from None


def _distinct(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    items = list(pairs)
    entries = dict(items)
    if len(entries) != len(items):
        raise ValueError("a key occurs twice")
    return entries


def _ruled(field: str, rule: Rule, value: object, limits: Limits) -> object:
    try:
        return rule(value, limits)
    except IllegalValue as error:
        raise IllegalValue(f"{field} is {error}") from None


def _named(what: str, value: object, limits: Limits) -> str:
    try:
        return name(value, limits)
    except IllegalValue as error:
        raise IllegalValue(f"{what} is {error}") from None


def _check_sizes(frames: Sequence[Frame], limits: Limits) -> None:
    if not 1 <= len(frames) <= limits.max_frames:
        raise IllegalValue(f"message of {len(frames)} frames, expected 1 to {limits.max_frames}")
    header_bytes = memoryview(frames[0]).nbytes
    if header_bytes > limits.max_header_bytes:
        raise IllegalValue(f"header of {header_bytes} bytes, the limit is {limits.max_header_bytes}")
    num_bytes = wire_bytes(frames)
    if num_bytes > limits.max_message_bytes:
        raise IllegalValue(f"message of {num_bytes} bytes, the limit is {limits.max_message_bytes}")


def _check_whole(message: Message) -> None:
    """Rules that know more than one field: labels (d,) int64 beside features (d, ...); a payload is plain bytes."""
    if isinstance(message, Features):
        labels, features = message.labels, message.features
        if labels.dtype != np.int64 or labels.ndim != 1 or features.shape[:1] != labels.shape:
            found = f"features {features.shape} with labels {labels.dtype} {labels.shape}"
            raise IllegalValue(f"{found}, expected (d, F...) and int64 (d,)")
    elif isinstance(message, _PROBING):
        payload = message.payload
        if payload.dtype != np.uint8 or payload.ndim != 1:
            raise IllegalValue(f"payload {payload.dtype} {payload.shape}, expected uint8 (n,)")
