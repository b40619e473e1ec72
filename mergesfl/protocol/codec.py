"""Message <-> frames. One msgpack header, which holds small tensors too; then one raw frame per larger tensor.

    frame 0      msgpack [version, kind, [value, ...], specs, small]
    frame 1...   the elements of each larger tensor, in the order of the specs: little-endian, nothing else; in C order,
                 or channels_last: those of shape (n, c, h, w) in the order of (n, h, w, c)

The values are those of the message's fields that are no tensors, in the order of its record. Specs and small are bytes:
what the tensors are, and the elements of those, in their order, that still fit in, each padded to a multiple of 8 bytes
(mergesfl/protocol/layout.py). Two rules:

1. Whatever bytes arrive, `decode` returns a message or raises RemoteProtocolError, and holds memory in proportion to
   the frames it was given.
2. What we would refuse we do not send: `encode` applies the same rules and raises LocalProtocolError.

No pickle, no msgpack extension types, no object or complex arrays. [ours]

Each way is one function. Every message of a step takes it between two stretches of computing, with cold caches, where a
call costs more than its lines do (benchmarks/LOG.md, 2026-11-26); what raises stands apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as record_fields
from operator import attrgetter
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mergesfl.errors import LocalProtocolError, RemoteProtocolError
from mergesfl.protocol.arrays import BOOL, FIRST, as_it_lies, check_bools, framed
from mergesfl.protocol.layout import Frame, Layout, announced, keep, layout_of, unpacked
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.protocol.messages import (
    PROTOCOL_VERSION,
    Array,
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
from mergesfl.protocol.rules import ARRAY_FIELDS, BOUNDS, RULES, STATE_FIELDS, IllegalValue, Rule, ruled, shown

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


_INT64 = np.dtype(np.int64)


class _Format(NamedTuple):
    """How the messages of one kind look."""

    kind: str
    record: type[Message]
    start: bytes  # of the header, before the values
    plain: tuple[str, ...]  # fields of the header: neither one tensor nor several
    rules: tuple[Rule, ...]  # of these
    bounds: tuple[tuple[str, type, float, float], ...]  # that say the same, if they are all of numbers; else none
    plain_of: Callable[[Any], Sequence[Any]]  # their values in a message
    arrays: tuple[str, ...]  # fields that are one tensor
    states: tuple[str, ...]  # fields that map names to tensors
    tensors: tuple[str, ...]  # both
    check: Callable[[Any], None] | None  # the rule that knows more than one field, of tensors' types and shapes


def _check_features(message: Features) -> None:
    """Labels (d,) int64 beside features (d, ...)."""
    labels, features = message.labels, message.features
    if labels.dtype != _INT64 or labels.ndim != 1 or features.shape[:1] != labels.shape:
        found = f"features {features.shape} with labels {labels.dtype} {labels.shape}"
        raise IllegalValue(f"{found}, expected (d, F...) and int64 (d,)")


def _check_payload(message: Probe | Echo) -> None:
    """Plain bytes."""
    payload = message.payload
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise IllegalValue(f"payload {payload.dtype} {payload.shape}, expected uint8 (n,)")


_CHECKS: Mapping[type[Message], Callable[[Any], None]] = {
    Features: _check_features,
    Probe: _check_payload,
    Echo: _check_payload,
}


def _format_of(kind: str, record: type[Message]) -> _Format:
    names = [field.name for field in record_fields(record)]
    arrays = tuple(name for name in names if name in ARRAY_FIELDS)
    states = tuple(name for name in names if name in STATE_FIELDS)
    plain = tuple(name for name in names if name not in arrays + states)
    rules = tuple(RULES[name] for name in plain)
    are_bounded = all(rule in BOUNDS for rule in rules)
    bounds = tuple((name, *BOUNDS[RULES[name]]) for name in plain) if are_bounded else ()
    plain_of = attrgetter(*plain) if len(plain) > 1 else lambda message: [getattr(message, name) for name in plain]
    check = _CHECKS.get(record)
    start = b"\x95" + _PACK(PROTOCOL_VERSION) + _PACK(kind)  # an array of 5
    return _Format(kind, record, start, plain, rules, bounds, plain_of, arrays, states, arrays + states, check)


# One packer for all, because to make one costs more than to use it: a call of the one in C holds the interpreter's lock
# throughout. msgpack's fallback in Python does not, and threads would write into each other's message.
_IS_FALLBACK = msgpack.Packer.__module__ == "msgpack.fallback"
_PACK = functools.partial(msgpack.packb, use_bin_type=True) if _IS_FALLBACK else msgpack.Packer(use_bin_type=True).pack

_FORMATS = {kind: _format_of(kind, record) for kind, record in KINDS.items()}
_FORMAT_OF = {form.record: form for form in _FORMATS.values()}

# Layouts of messages that were legal in all that types, shapes and names of tensors tell: what remains to be checked of
# another one with the same is what it holds. Sent ones by kind, types, shapes, strides and names, received ones by kind
# and specs.
_SENT: dict[tuple[object, ...], Layout] = {}
_RECEIVED: dict[tuple[str, bytes], Layout] = {}


def encode(message: Message, limits: Limits = DEFAULT) -> list[Frame]:
    """The frames of a message.

    A tensor frame is a view of the array's own memory where that is little-endian and in one of the two orders, else a
    copy: whoever sends the frames lends that memory and must not change it until the message has left.

    Raises:
        LocalProtocolError: the message breaks a rule or a limit: our bug.
    """
    form = _FORMAT_OF.get(type(message))
    if form is None:
        raise LocalProtocolError(f"{shown(message)} is no message; the kinds are {', '.join(KINDS)}")
    try:
        values = form.plain_of(message)
        bounds = form.bounds if limits is DEFAULT else ()
        for value, (_, number, low, high) in zip(values, bounds):  # noqa: B905 (as many)
            if type(value) is not number or not low <= value <= high:  # type: ignore[operator]
                bounds = ()
                break
        if not bounds:  # else they are legal as they are, as every step's
            values = _ruled(form, values, limits)
        # The tensors, and what the layout of a message is known by.
        arrays: list[Array] = []
        known_by: list[object] = [form.kind]
        for field in form.arrays:
            array = getattr(message, field)
            if not isinstance(array, np.ndarray):
                raise _no_array(field, array)
            arrays.append(array)
            known_by += (array.dtype, array.shape, array.strides)
        for field in form.states:
            state = getattr(message, field)
            if type(state) is not dict and not isinstance(state, Mapping):
                raise IllegalValue(f"{field} is {shown(state)}, expected a mapping")
            for key in state:
                array = state[key]
                if not isinstance(array, np.ndarray):
                    raise _no_array(f"{field} {key}" if key else field, array)
                arrays.append(array)
                known_by += (field, key, array.dtype, array.shape, array.strides)
        known = tuple(known_by)
        layout = _SENT.get(known) if limits is DEFAULT else None
        if layout is None:
            layout = _checked_layout(form, message, arrays, limits)
            if limits is DEFAULT:
                keep(_SENT, known, layout)
        announcement, places, _, num_frames, num_frame_bytes = layout
        # The header, with the small ones, and the frames.
        frames: list[Frame] = [b""]
        parts: list[Any] = [form.start, _PACK(values), announcement]  # of the header: what join takes
        for array, (_, _, extent, offset, padding, is_in_order) in zip(arrays, places):  # noqa: B905 (as many)
            if not is_in_order:
                array = as_it_lies(array, extent)
            if offset is None:
                frames.append(memoryview(array).cast("B"))  # type: ignore[arg-type]
            else:
                parts += (array, padding)
        frames[0] = b"".join(parts)
        num_header_bytes = len(frames[0])
        if num_header_bytes > limits.max_header_bytes or num_header_bytes + num_frame_bytes > limits.max_message_bytes:
            raise _too_large(1 + num_frames, num_header_bytes, num_header_bytes + num_frame_bytes, limits)
        return frames
    except IllegalValue as error:
        raise LocalProtocolError(f"cannot send {form.kind}: {error}; correct it where the message is made") from None


def decode(frames: Sequence[Frame], limits: Limits = DEFAULT) -> Message:
    """The message in these frames; its arrays are read-only views of the frames, which they keep alive, or of a copy.

    Copied are the small ones, with the header, and a frame that does not lie on a multiple of its element size: torch
    and vector instructions want aligned memory.

    Raises:
        RemoteProtocolError: the frames are no legal message. Nothing else is ever raised for the contents of frames.
    """
    try:
        header = frames[0] if frames else b""
        num_bytes = num_header_bytes = header.nbytes if type(header) is memoryview else len(header)
        if len(frames) > 1:
            num_bytes += wire_bytes(frames[1:])
        if (
            not 0 <= len(frames) - 1 <= limits.max_tensors
            or num_header_bytes > limits.max_header_bytes
            or num_bytes > limits.max_message_bytes
        ):
            raise _too_large(len(frames), num_header_bytes, num_bytes, limits)
        parts = unpacked(header, "header", limits)
        if type(parts) is not list or len(parts) != 5:
            raise _illegal_header(parts)
        version, kind, values, packed, small = parts
        form = _FORMATS.get(kind) if type(kind) is str else None
        if (
            (form is None or version != PROTOCOL_VERSION or type(version) is not int)
            or (type(values) is not list or type(packed) is not bytes or type(small) is not bytes)
        ):  # fmt: skip
            raise _illegal_header(parts)
        # The values.
        content: dict[str, Any] = {}
        for value, (field, number, low, high) in zip(values, form.bounds):  # noqa: B905 (their number is asked below)
            if type(value) is not number or not low <= value <= high:  # type: ignore[operator]
                break
            content[field] = value  # as every step's, without the calls of its rule
        if not len(content) == len(values) == len(form.plain) or limits is not DEFAULT:
            content = dict(zip(form.plain, _ruled(form, values, limits), strict=True))
        # The tensors, as they were announced.
        known = (kind, packed)
        kept = _RECEIVED.get(known) if limits is DEFAULT else None
        layout = kept or announced(packed, kind, form.tensors, limits)
        _, places, num_inline_bytes, num_frames, _ = layout
        if len(frames) != 1 + num_frames:
            raise IllegalValue(f"{kind} announces {num_frames} frames of tensors and brings {len(frames) - 1}")
        if len(small) != num_inline_bytes:
            raise IllegalValue(f"{kind} announces {num_inline_bytes} bytes of small tensors, has {len(small)}")
        for field in form.states:
            content[field] = {}
        num_viewed = 1
        for field, key, extent, offset, _, _ in places:
            dtype, _, memory_shape, channels_last, _ = extent
            if offset is None:
                array = framed(frames[num_viewed], extent)
                num_viewed += 1
            else:
                array = np.ndarray(memory_shape, dtype, small, offset)
            if dtype is BOOL:
                check_bools(array)
            if channels_last:
                array = array.transpose(FIRST)
            if key:
                content[field][key] = array
            else:
                content[field] = array
        message = object.__new__(form.record)
        object.__setattr__(message, "__dict__", content)  # all its fields, as its __init__ would, which takes long
        if kept is None:
            if form.check is not None:
                form.check(message)
            if limits is DEFAULT:
                keep(_RECEIVED, known, layout)
        return message
    except IllegalValue as error:
        raise RemoteProtocolError(f"{error}; close this peer and see that both ends run the same mergesfl") from None


def wire_bytes(frames: Sequence[Frame]) -> int:
    """Bytes of payload in these frames, header included; the transport's own framing is not."""
    num_bytes = 0
    for frame in frames:
        num_bytes += frame.nbytes if type(frame) is memoryview else len(frame)
    return num_bytes


def _checked_layout(form: _Format, message: Message, arrays: Sequence[Array], limits: Limits) -> Layout:
    """Of a message with these tensors that is to be sent."""
    names = [(field, "") for field in form.arrays]
    names += [(field, key) for field in form.states for key in getattr(message, field)]
    layout = layout_of([(*name, array) for name, array in zip(names, arrays, strict=True)], limits)
    if form.check is not None:
        form.check(message)
    return layout


def _no_array(what: str, found: object) -> IllegalValue:
    return IllegalValue(f"{what} is {shown(found)}, expected a numpy array (torch: tensor.detach().cpu().numpy())")


def _illegal_header(parts: object) -> IllegalValue:
    """What is wrong with this one."""
    if type(parts) is not list or not parts or type(parts[0]) is not int:
        return IllegalValue("header is not [version, kind, values, specs, small]")
    if parts[0] != PROTOCOL_VERSION:
        return IllegalValue(f"peer speaks protocol version {parts[0]}, this end speaks {PROTOCOL_VERSION}")
    if len(parts) != 5 or type(parts[2]) is not list or type(parts[3]) is not bytes or type(parts[4]) is not bytes:
        return IllegalValue("header is not [version, kind, values, specs, small]")
    return IllegalValue(f"unknown kind of message {shown(parts[1])}; the kinds are {', '.join(KINDS)}")


def _ruled(form: _Format, values: Sequence[object], limits: Limits) -> Sequence[object]:
    """What the rules make of the values of the header."""
    if len(values) != len(form.plain):
        names = ", ".join(form.plain)
        raise IllegalValue(f"{form.kind} with {len(values)} values; expected {len(form.plain)}: {names}")
    return [
        ruled(field, rule, value, limits) for field, rule, value in zip(form.plain, form.rules, values, strict=True)
    ]


def _too_large(num_frames: int, num_header_bytes: int, num_bytes: int, limits: Limits) -> IllegalValue:
    if not 0 <= num_frames - 1 <= limits.max_tensors:
        return IllegalValue(f"message of {num_frames} frames, expected 1 to {limits.max_frames}")
    if num_header_bytes > limits.max_header_bytes:
        return IllegalValue(f"header of {num_header_bytes} bytes, the limit is {limits.max_header_bytes}")
    return IllegalValue(f"message of {num_bytes} bytes, the limit is {limits.max_message_bytes}")
