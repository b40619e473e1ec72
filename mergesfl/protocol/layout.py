"""Where the tensors of a message lie: the small ones in its header, each other one in a frame of its own. [ours]

Both ends reckon it from the specs, msgpack [[field, key, dtype, shape, channels_last], ...], which stand in the header
as bytes. `key` is the name within a state or among parts, "" for a field that is one tensor. From step to step the
specs do not change: what follows from them is kept, so that both ends pack, parse and check them once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mergesfl.protocol.arrays import Extent, extent_of, legal_extent
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.protocol.rules import ARRAY_FIELDS, STATE_FIELDS, IllegalValue, name, ruled, shown

# Tensors travel in the header as long as all of them there take no more: to copy so much four times costs less than a
# frame, which has to be made, queued, signalled, received and viewed (benchmarks/LOG.md, 2026-11-26). [ours]
INLINE_BYTES = 1 << 14
# In the header each begins at a multiple of this: what every element type needs, and msgpack hands the bytes out so.
_ALIGNMENT_BYTES = 8

# Layouts that are kept, sent ones of so many tensors and received ones of so many bytes of specs each: enough for all
# messages but states; 10 MiB at most.
NUM_KEPT = 128
MAX_KEPT_TENSORS = 16
MAX_KEPT_BYTES = 1024

Frame = bytes | bytearray | memoryview
Spec = tuple[str, str, np.dtype[Any], tuple[int, ...], bool]  # field, key, dtype, shape, channels_last


def frame_bytes(frame: Frame) -> int:
    """Bytes of one frame."""
    return len(frame) if type(frame) is bytes else memoryview(frame).nbytes


class Place(NamedTuple):
    """One tensor of a message."""

    field: str
    key: str
    extent: Extent
    offset: int | None  # among the header's bytes of tensors; None: it has a frame
    padding: bytes  # that follows it there


class Layout(NamedTuple):
    """All tensors of a message."""

    packed: bytes  # the specs as the header has them
    places: tuple[Place, ...]
    num_inline_bytes: int  # of tensors in the header
    num_frames: int  # beside the header
    num_frame_bytes: int  # in these


def layout_of(specs: tuple[Spec, ...], limits: Limits) -> Layout:
    """Of tensors that are to be sent. Raises IllegalValue."""
    is_kept = limits is DEFAULT and len(specs) <= MAX_KEPT_TENSORS
    return _kept_made(specs) if is_kept else _made(specs, limits)


def announced(packed: bytes, kind: str, fields: tuple[str, ...], limits: Limits) -> Layout:
    """Of tensors that arrive with a message of this kind, which has these fields of tensors.

    Raises IllegalValue: the specs are no legal ones, a field is missing, or comes twice.
    """
    is_kept = limits is DEFAULT and len(packed) <= MAX_KEPT_BYTES
    return _kept_read(packed, kind, fields) if is_kept else _read(packed, kind, fields, limits)


def unpacked(packed: Frame, what: str, limits: Limits) -> object:
    """What msgpack makes of bytes of which nothing is known yet. Raises IllegalValue."""
    try:
        return _unpack(packed) if limits is DEFAULT else msgpack.unpackb(packed, **_bounds(limits))
    except Exception as error:  # whatever the foreign parser raises: ValueError, RecursionError, its own types ...
        raise IllegalValue(f"{what} of {len(packed)} bytes is no msgpack: {str(error)[:200]}") from None


def _distinct(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    items = list(pairs)
    entries = dict(items)
    if len(entries) != len(items):
        raise ValueError("a key occurs twice")
    return entries


def _bounds(limits: Limits) -> dict[str, Any]:
    return {
        "raw": False,
        "strict_map_key": True,
        "object_pairs_hook": _distinct,
        "max_str_len": 4 * limits.max_text_length,  # UTF-8: up to 4 bytes per character
        "max_bin_len": limits.max_header_bytes,
        "max_ext_len": 0,
        "max_array_len": max(limits.max_sequence_length, limits.max_tensors),
        "max_map_len": limits.max_map_entries,
    }


_unpack = functools.partial(msgpack.unpackb, **_bounds(DEFAULT))


def _made(specs: Sequence[Spec], limits: Limits) -> Layout:
    _check_number(len(specs), limits)
    named = []
    for field, key, dtype, shape, channels_last in specs:
        if field in STATE_FIELDS:
            ruled(f"name in {field}", name, key, limits)
        named.append((field, key, legal_extent(f"{field} {key}".rstrip(), dtype, shape, channels_last, limits)))
    announcement = [[field, key, one.dtype.name, one.shape, one.channels_last] for field, key, one in named]
    packed: bytes = msgpack.packb(announcement, use_bin_type=True)
    return _laid_out(packed, named)


def _read(packed: bytes, kind: str, fields: Collection[str], limits: Limits) -> Layout:
    specs = unpacked(packed, "tensor specs", limits)
    if type(specs) is not list:
        raise IllegalValue("tensor specs are no list")
    _check_number(len(specs), limits)
    named: dict[tuple[str, str], Extent] = {}
    for spec in specs:
        if type(spec) is not list or len(spec) != 5:
            raise IllegalValue(f"{shown(spec)} as a tensor spec, expected [field, key, dtype, shape, channels_last]")
        field, key, type_name, dimensions, channels_last = spec
        if type(field) is not str or type(key) is not str:
            raise IllegalValue(f"{kind} with a tensor named {shown(field)} {shown(key)}, expected two strings")
        if (field, key) in named or field not in fields or (field in ARRAY_FIELDS and key):
            raise IllegalValue(f"{kind} with an unknown or repeated tensor {shown(field)} {shown(key)}")
        if field in STATE_FIELDS:
            ruled(f"name in {field}", name, key, limits)
        named[field, key] = extent_of(type_name, dimensions, channels_last, limits)
    missing = sorted(field for field in ARRAY_FIELDS.intersection(fields) if (field, "") not in named)
    if missing:
        raise IllegalValue(f"{kind} without the tensor {missing}")
    return _laid_out(packed, [(*names, extent) for names, extent in named.items()])


_kept_made: Callable[[tuple[Spec, ...]], Layout] = functools.lru_cache(NUM_KEPT)(lambda specs: _made(specs, DEFAULT))
_kept_read: Callable[[bytes, str, tuple[str, ...]], Layout] = functools.lru_cache(NUM_KEPT)(
    lambda packed, kind, fields: _read(packed, kind, fields, DEFAULT)
)


def _check_number(num_tensors: int, limits: Limits) -> None:
    if num_tensors > limits.max_tensors:
        raise IllegalValue(f"message of {num_tensors} tensors, the limit is {limits.max_tensors}")


def _laid_out(packed: bytes, named: Sequence[tuple[str, str, Extent]]) -> Layout:
    places = []
    num_inline_bytes = num_frames = num_frame_bytes = 0
    for field, key, extent in named:
        padding = bytes(-extent.num_bytes % _ALIGNMENT_BYTES)
        end = num_inline_bytes + extent.num_bytes + len(padding)
        if end <= INLINE_BYTES:
            places.append(Place(field, key, extent, num_inline_bytes, padding))
            num_inline_bytes = end
        else:
            places.append(Place(field, key, extent, None, b""))
            num_frames += 1
            num_frame_bytes += extent.num_bytes
    return Layout(packed, tuple(places), num_inline_bytes, num_frames, num_frame_bytes)
