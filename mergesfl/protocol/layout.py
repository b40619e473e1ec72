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

from mergesfl.protocol.arrays import Extent, extent_of, is_channels_last, is_in_order, legal_extent
from mergesfl.protocol.limits import DEFAULT, Limits
from mergesfl.protocol.messages import Array
from mergesfl.protocol.rules import ARRAY_FIELDS, STATE_FIELDS, IllegalValue, name, ruled, shown

# Tensors travel in the header as long as all of them there take no more: to copy so much four times costs less than a
# frame, which has to be made, queued, signalled, received and viewed (benchmarks/LOG.md, 2026-11-26). [ours]
INLINE_BYTES = 1 << 14
# In the header each begins at a multiple of this: what every element type needs, and msgpack hands the bytes out so.
_ALIGNMENT_BYTES = 8

# Layouts that are kept, of those that are sent and of those that are received, of so many bytes of specs each: enough
# for all messages but states; 10 MiB at most.
NUM_KEPT = 128
MAX_KEPT_BYTES = 1024

Frame = bytes | bytearray | memoryview


def frame_bytes(frame: Frame) -> int:
    """Bytes of one frame."""
    return frame.nbytes if type(frame) is memoryview else len(frame)


class Place(NamedTuple):
    """One tensor of a message."""

    field: str
    key: str
    extent: Extent
    offset: int | None  # among the header's bytes of tensors; None: it has a frame
    padding: bytes  # that follows it there
    is_in_order: bool  # the array need not be moved to be sent


class Layout(NamedTuple):
    """All tensors of a message."""

    announcement: bytes  # what the header has before the tensors: the specs, and how many bytes follow
    places: tuple[Place, ...]
    num_inline_bytes: int  # of tensors in the header
    num_frames: int  # beside the header
    num_frame_bytes: int  # in these


def layout_of(tensors: Sequence[tuple[str, str, Array]], limits: Limits) -> Layout:
    """Of tensors that are to be sent: field, key, array. Raises IllegalValue."""
    _check_number(len(tensors), limits)
    named = []
    for field, key, array in tensors:
        if field in STATE_FIELDS:
            ruled(f"name in {field}", name, key, limits)
        what, channels_last = f"{field} {key}".rstrip(), is_channels_last(array)
        extent = legal_extent(what, array.dtype, array.shape, channels_last, limits)
        named.append((field, key, extent, is_in_order(array, extent)))
    specs = [[field, key, one.dtype.name, one.shape, one.channels_last] for field, key, one, _ in named]
    return _laid_out(_pack(specs), named)


def announced(packed: bytes, kind: str, fields: Collection[str], limits: Limits) -> Layout:
    """Of tensors that arrive with a message of this kind, which has these fields of tensors.

    Raises IllegalValue: the specs are no legal ones, a field is missing, or comes twice.
    """
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
    return _laid_out(packed, [(*names, extent, True) for names, extent in named.items()])


def keep(layouts: dict[Any, Layout], key: object, layout: Layout) -> None:
    """Notes it for the next message of the same specs, unless it is large; of too many begins anew."""
    if len(layout.announcement) <= MAX_KEPT_BYTES:
        if len(layouts) >= NUM_KEPT:
            layouts.clear()
        layouts[key] = layout


def unpacked(packed: Frame, what: str, limits: Limits) -> object:
    """What msgpack makes of bytes of which nothing is known yet. Raises IllegalValue."""
    max_str_len, max_bin_len, max_array_len, max_map_len = _BOUNDS if limits is DEFAULT else _bounds(limits)
    try:
        return msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_distinct,
            max_str_len=max_str_len,
            max_bin_len=max_bin_len,
            max_ext_len=0,
            max_array_len=max_array_len,
            max_map_len=max_map_len,
        )
    except Exception as error:  # whatever the foreign parser raises: ValueError, RecursionError, its own types ...
        raise IllegalValue(f"{what} of {len(packed)} bytes is no msgpack: {str(error)[:200]}") from None


def _distinct(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    items = list(pairs)
    entries = dict(items)
    if len(entries) != len(items):
        raise ValueError("a key occurs twice")
    return entries


def _bounds(limits: Limits) -> tuple[int, int, int, int]:
    """Of msgpack: bytes of a string (UTF-8: up to 4 per character) and of a bin, entries of an array and of a map."""
    max_array_len = max(limits.max_sequence_length, limits.max_tensors)
    return 4 * limits.max_text_length, limits.max_header_bytes, max_array_len, limits.max_map_entries


_BOUNDS = _bounds(DEFAULT)
_pack: Callable[[object], bytes] = functools.partial(msgpack.packb, use_bin_type=True)


def _check_number(num_tensors: int, limits: Limits) -> None:
    if num_tensors > limits.max_tensors:
        raise IllegalValue(f"message of {num_tensors} tensors, the limit is {limits.max_tensors}")


def _laid_out(packed: bytes, named: Sequence[tuple[str, str, Extent, bool]]) -> Layout:
    places = []
    num_inline_bytes = num_frames = num_frame_bytes = 0
    for field, key, extent, in_order in named:
        padding = bytes(-extent.num_bytes % _ALIGNMENT_BYTES)
        end = num_inline_bytes + extent.num_bytes + len(padding)
        if end <= INLINE_BYTES:
            places.append(Place(field, key, extent, num_inline_bytes, padding, in_order))
            num_inline_bytes = end
        else:
            places.append(Place(field, key, extent, None, b"", in_order))
            num_frames += 1
            num_frame_bytes += extent.num_bytes
    small = bytes(num_inline_bytes)
    announcement = _pack(packed) + _pack(small).removesuffix(small)
    return Layout(announcement, tuple(places), num_inline_bytes, num_frames, num_frame_bytes)
