"""Messages become frames and frames become messages, or an error that names whose fault it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergesfl.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from mergesfl.protocol import codec, layout
from mergesfl.protocol import messages as m
from mergesfl.protocol.arrays import DTYPES, is_channels_last
from mergesfl.protocol.codec import KINDS, decode, encode, wire_bytes
from mergesfl.protocol.limits import DEFAULT, Limits, clipped
from mergesfl.protocol.rules import ARRAY_FIELDS, BOUNDS, RULES, STATE_FIELDS, IllegalValue, Rule, check_worker_id

# ----------------------------------------------------------------------------------------------------------- examples

EXAMPLES: list[Any] = [
    m.Register("jetson-07", 1, "cuda: Orin", {"torch": "2.5.0"}, 30, (10, 0, 2), ("sit", "été", "0"), (9, 128)),
    m.Welcome(
        "cnn",
        "conv2",
        ("a", "b"),
        (3, 8, 8),
        2**63 - 1,
        "uint8",
        255.0,
        (0.5, -0.1),
        (1.0, 0.2),
        True,
        4,
        "int8",
        "fp16",
        "fp32",
    ),
    m.Ready((32, 32, 2), 8192),
    m.Refuse("no such model"),
    m.Survey(300, 8, True, 5, 20_000, 40_000),
    m.Probe(300, np.zeros(40, dtype=np.uint8)),
    m.Echo(300, 0.25, np.zeros(40, dtype=np.uint8)),
    m.Report(300, 0.125, 0.0625),
    m.Assign(
        3,
        10,
        10,
        16,
        "mergesfl",
        {"learning_rate": 0.1, "nesterov": False, "clip": 5, "rate": "equal", "shift": -3},
        {"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bn.count": np.array(7, dtype=np.int64)},
    ),
    m.Features(3, 0, np.ones((2, 3, 4), dtype=np.float32), np.array([5, 0], dtype=np.int64)),
    m.Features(
        *(3, 1, np.full((2, 3, 4), 7, dtype=np.uint8), np.array([5, 0], dtype=np.int64)),
        {"scale": np.array([0.5, 0, 2], dtype=np.float32), "zero": np.array([0, 9, 255], dtype=np.uint8)},
    ),
    m.Gradient(3, 2, 0.5, np.array([[1.0, -2.0]], dtype=np.float32)),
    m.Gradient(3, 2, 0.5, np.array([[1.0]], dtype=np.float32), {"places": np.array([[0]], dtype=np.int16)}),
    m.Gradient(3, 2, 0.5, np.array([[1.0]], dtype=np.float32), part=7),
    m.Survey(300, 8, True, 5, 20_000, 40_000, parts_per_step=8),
    m.Update(3, 160, 1.25, 0.75, {"conv.weight": np.zeros((2, 0, 3), dtype=np.float16)}, {"loss": 0.25}),
    m.Release(3, "deadline of 5 s missed"),
    m.Ping(),
    m.Pong(),
    m.Reset("I was restarted"),
    m.Leave("SIGTERM"),
    m.Goodbye("60 rounds done"),
]


def same(a: object, b: object) -> bool:
    """Equal records: arrays by type, shape and bits (so that NaN equals itself), floats by value."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def over_the_wire(message: m.Message) -> m.Message:
    return decode([bytes(frame) for frame in encode(message)])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_round_trip(message: m.Message) -> None:
    assert same(over_the_wire(message), message)


def test_tables_are_complete() -> None:
    assert set(KINDS.values()) == set(get_args(m.Message)) == {type(example) for example in EXAMPLES}
    used = {field.name for record in KINDS.values() for field in dataclasses.fields(record)}
    assert used == set(RULES) | ARRAY_FIELDS | STATE_FIELDS
    assert not set(RULES) & (ARRAY_FIELDS | STATE_FIELDS)


@pytest.mark.parametrize("rule", BOUNDS, ids=lambda rule: rule.__name__)
def test_bounds_say_what_their_rule_says(rule: Rule) -> None:
    kind, low, high = BOUNDS[rule]
    odd = [True, False, None, "1", float("nan"), float("inf"), -float("inf"), -0.0, 0, 0.0, 1, 1.0, 2**70, np.int64(1)]
    for value in [*odd, low, high, low - 1, high + 1, float(low), float(high), low - 0.5, high + 0.5]:
        within = type(value) is kind and low <= value <= high
        try:
            legal = rule(value, DEFAULT)
        except IllegalValue:
            assert not within
        else:
            assert type(legal) is kind and (legal is value or not within)


# --------------------------------------------------------------------------------------------------------- golden bytes


def test_golden_bytes() -> None:
    # The header by hand, after the msgpack specification: 9n array of n, an str of n, cb float64, c2 false, c4 n bytes.
    # 0.5 = 2**-1 is 3fe0000000000000; in float32 1.0 is 3f800000 and -2.0 is c0000000, little-endian on the wire.
    header = (
        b"\x95\x05\xa8gradient"
        b"\x94\x03\x02\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00\x00"
        b"\xc4\x18\x91\x95\xa8gradient\xa0\xa7float32\x92\x01\x03\xc2"
        b"\xc4\x10\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x80\x3f\x00\x00\x00\x00"  # 12 bytes and 4 of padding
    )
    message = m.Gradient(3, 2, 0.5, np.array([[1.0, -2.0, 1.0]], dtype=np.float32))
    assert [bytes(frame) for frame in encode(message)] == [header]
    assert same(decode([header]), message)
    assert wire_bytes(encode(message)) == len(header)


def test_golden_bytes_of_a_large_tensor() -> None:
    """It has a frame of its own; labels behind it travel in the header."""
    header = (
        b"\x95\x05\xa8features\x93\x03\x02\x00"
        b"\xc4\x2a\x92\x95\xa8features\xa0\xa5uint8\x92\x01\xcd\x40\x01\xc2\x95\xa6labels\xa0\xa5int64\x91\x01\xc2"
        b"\xc4\x08\x07\x00\x00\x00\x00\x00\x00\x00"
    )
    tensor = bytes(range(256)) * 64 + b"\x09"  # 16,385 bytes: 0x4001
    message = m.Features(3, 2, np.frombuffer(tensor, np.uint8).reshape(1, -1), np.array([7], dtype=np.int64))
    assert [bytes(frame) for frame in encode(message)] == [header, tensor]
    assert same(decode([header, tensor]), message)
    assert wire_bytes(encode(message)) == len(header) + 16_385


def test_a_big_endian_array_has_the_same_bytes() -> None:
    little = m.Gradient(3, 2, 0.5, np.array([[1.0, -2.0]], dtype="<f4"))
    big = m.Gradient(3, 2, 0.5, np.array([[1.0, -2.0]], dtype=">f4"))
    assert [bytes(frame) for frame in encode(big)] == [bytes(frame) for frame in encode(little)]


# ----------------------------------------------------------------------------------------------------------- hypothesis

counts = st.integers(0, 2**40)
seconds = st.floats(0, 1e9)
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
texts = st.text(st.characters(categories=["L", "M", "N", "P", "S"]) | st.just(" "), max_size=40)
worker_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,99}", fullmatch=True)
arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(DTYPES[dtype], hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)
states = st.dictionaries(names, arrays, max_size=4)
payloads = hnp.arrays(np.uint8, st.integers(0, 50))
shapes = st.lists(st.integers(0, DEFAULT.max_message_bytes), max_size=8).map(tuple)
values = st.one_of(
    st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)
features = st.integers(0, 5).flatmap(
    lambda d: st.tuples(
        hnp.arrays(np.float32, st.tuples(st.just(d), st.integers(0, 3), st.integers(1, 3))),
        hnp.arrays(np.int64, st.just((d,))),
    )
)
any_message: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        m.Register,
        worker_ids,
        counts,
        texts,
        st.dictionaries(names, texts, max_size=4),
        counts,
        st.lists(counts, max_size=20).map(tuple),
        st.lists(names, max_size=20).map(tuple),
        shapes,
    ),
    st.builds(
        m.Welcome,
        names,
        names | st.just(""),
        st.lists(names, max_size=20).map(tuple),
        shapes,
        st.integers(0, 2**63 - 1),
        names,
        st.floats(1e-9, 1e9),
        st.lists(st.floats(-1e9, 1e9), max_size=4).map(tuple),
        st.lists(st.floats(1e-9, 1e9), max_size=4).map(tuple),
        st.booleans(),
        counts,
        *(names, names, names),
    ),
    st.builds(m.Ready, shapes, counts),
    st.builds(
        m.Survey,
        *(counts, counts, st.booleans(), st.integers(1, 2**40), *[st.integers(0, 575 << 20)] * 2, st.integers(1, 8)),
    ),
    st.builds(m.Probe, counts, payloads, st.integers(0, 7)),
    st.builds(m.Echo, counts, seconds, payloads, st.integers(0, 7)),
    st.builds(m.Report, counts, seconds, seconds),
    st.builds(
        m.Assign,
        *(counts, counts, counts, counts, names, st.dictionaries(names, values | texts, max_size=4), states),
        parts_per_step=st.integers(1, 8),
    ),
    st.builds(
        lambda round_num, step, pair, part: m.Features(round_num, step, *pair, part=part),
        *(counts, counts, features, st.integers(0, 7)),
    ),
    st.builds(m.Gradient, counts, counts, seconds, arrays, part=st.integers(0, 7)),
    st.builds(
        m.Update,
        counts,
        counts,
        seconds,
        seconds,
        states,
        st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    ),
    st.builds(m.Release, counts, texts),
    st.sampled_from([m.Refuse, m.Reset, m.Leave, m.Goodbye]).flatmap(lambda record: st.builds(record, texts)),
    st.sampled_from([m.Ping(), m.Pong()]),
)


@settings(max_examples=400, deadline=None)
@given(any_message)
def test_round_trip_of_anything(message: m.Message) -> None:
    assert same(over_the_wire(message), message)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        json_like,
        st.tuples(
            *(st.just(m.PROTOCOL_VERSION), st.sampled_from(sorted(KINDS)), json_like),
            *(st.binary(max_size=9) | json_like.map(msgpack.packb), st.binary(max_size=9)),
        ),
    ),
    st.binary(max_size=9),
)
def test_random_msgpack_is_refused_or_a_message(header: object, tensor: bytes) -> None:
    for frames in ([msgpack.packb(header)], [msgpack.packb(header), tensor]):
        try:
            message = decode(frames)
        except RemoteProtocolError:
            continue
        assert type(message) in KINDS.values()


# ------------------------------------------------------------------------ lending, viewing


def test_encode_lends_and_decode_views() -> None:
    array = np.arange(6_000, dtype=np.float32).reshape(2, 3_000)
    frames = encode(m.Gradient(0, 0, 0.0, array))
    assert np.shares_memory(np.frombuffer(frames[1], dtype=np.float32), array)
    decoded = decode(frames)
    assert isinstance(decoded, m.Gradient)
    assert np.shares_memory(decoded.gradient, array)
    assert not decoded.gradient.flags.writeable
    array[1, 2] = 99.0  # the memory is one: what the sender does before it is sent, the receiver sees
    assert float(decoded.gradient[1, 2]) == 99.0


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[:, ::-1], lambda a: a[::2], lambda a: a.T])
def test_non_contiguous_arrays_arrive_as_they_look(make: Any) -> None:
    array = make(np.arange(12, dtype=np.int16).reshape(4, 3))
    decoded = over_the_wire(m.Gradient(0, 0, 0.0, array))
    assert isinstance(decoded, m.Gradient)
    assert np.array_equal(decoded.gradient, array)


def test_channels_last_are_lent_and_viewed_as_they_lie() -> None:
    array = np.arange(2 * 40 * 50 * 3, dtype=np.float32).reshape(2, 40, 50, 3).transpose(0, 3, 1, 2)  # (2, 3, 40, 50)
    frames = encode(m.Gradient(0, 0, 0.0, array))
    assert np.array_equal(np.frombuffer(frames[1], dtype=np.float32), np.arange(12_000))  # in the order of the memory
    decoded = decode(frames)
    assert isinstance(decoded, m.Gradient)
    assert np.array_equal(decoded.gradient, array) and decoded.gradient.strides == array.strides
    assert np.shares_memory(decoded.gradient, array) and not decoded.gradient.flags.writeable


def test_small_channels_last_arrive_as_they_lie() -> None:
    array = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)  # (2, 3, 4, 5)
    decoded = decode(encode(m.Gradient(0, 0, 0.0, array)))
    assert isinstance(decoded, m.Gradient)
    assert np.array_equal(decoded.gradient, array) and decoded.gradient.strides == array.strides
    assert not decoded.gradient.flags.writeable


def test_tensors_travel_in_the_header_until_it_is_full() -> None:
    """16 KiB of them, each padded to a multiple of 8 bytes: 8,001 -> 8,008, then 8,376 are left."""
    state = {
        "a": np.full(8_001, 1, dtype=np.int8),
        "too large": np.full(8_377, 2, dtype=np.int8),
        "b": np.full(8_369, 3, dtype=np.int8),  # padded to 8,376
        "no room": np.full(1, 4, dtype=np.int8),
        "empty": np.zeros(0, dtype=np.float64),
        "bits": np.array(True),
    }
    frames = encode(m.Update(0, 0, 0.0, 0.0, state))
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [8_377, 1, 1]
    small = msgpack.unpackb(frames[0])[4]
    assert small == b"\1" * 8_001 + bytes(7) + b"\3" * 8_369 + bytes(7)
    decoded = decode(frames)
    assert same(decoded, m.Update(0, 0, 0.0, 0.0, state))
    assert isinstance(decoded, m.Update)
    assert all(array.flags.aligned and not array.flags.writeable for array in decoded.state.values())


def test_what_is_kept_of_the_specs_is_checked_for_every_kind_and_frame() -> None:
    """The same specs again: with other frames, of another kind, under other limits."""
    for _ in range(2):
        assert same(decode(gradient()), m.Gradient(0, 0, 0.0, np.zeros(1, dtype=np.float32)))
        assert same(decode(large()), m.Gradient(0, 0, 0.0, np.zeros(20_000, dtype=np.uint8)))
        with pytest.raises(RemoteProtocolError, match="8 bytes of small tensors, has 5"):
            decode([header(m.PROTOCOL_VERSION, "gradient", GRADIENT_VALUES, [SPEC], small=b"12345")])
        with pytest.raises(RemoteProtocolError, match="needs 20000 bytes, its frame has 5"):
            decode([large()[0], b"12345"])
        with pytest.raises(RemoteProtocolError, match="unknown or repeated tensor 'gradient'"):
            decode([header(m.PROTOCOL_VERSION, "features", [0, 0, 0], [SPEC])])
        with pytest.raises(RemoteProtocolError, match="1 entries, the limit is 0"):
            decode(gradient(), Limits(max_tensor_rank=0))


def test_after_a_good_message_another_of_its_types_and_shapes_is_still_sent_as_it_lies() -> None:
    codec._SENT.clear()
    array = np.arange(2 * 40 * 51 * 3, dtype=np.float32).reshape(2, 3, 40, 51)
    orders = [array, np.asfortranarray(array), array.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2), array.copy()]
    for same_values in orders * 2:
        for part in (same_values, same_values[:1], same_values[:, :, :2]):  # in a frame and in the header
            decoded = over_the_wire(m.Gradient(0, 0, 0.0, part))
            assert isinstance(decoded, m.Gradient) and np.array_equal(decoded.gradient, part)
            assert is_channels_last(decoded.gradient) == is_channels_last(part)


def test_after_a_good_message_another_of_its_types_and_shapes_is_still_checked_when_it_is_sent() -> None:
    x, y, parts = np.ones((2, 3), dtype=np.float32), np.zeros(2, dtype=np.int64), {"a": ARRAY}
    wrong: list[tuple[Any, str]] = [
        (m.Features(True, 0, x, y, parts), "round_num is True, expected an int"),
        (m.Features(0, 2**40 + 1, x, y, parts), "step is 1099511627777, expected 0 to"),
        (m.Features(0, 0, x, y, parts, 8), "part is 8, expected 0 to 7"),
        (m.Features(0, 0, x, y.astype(">i8"), parts), "labels >i8"),
        (m.Features(0, 0, x, y.astype(np.uint64), parts), "labels has the type uint64, legal are"),
        (m.Features(0, 0, x, y[:1], parts), r"\(2, 3\) with labels int64 \(1,\)"),
        (m.Features(0, 0, x, [0, 0], parts), "labels is a value of type list, expected a numpy array"),  # type: ignore[arg-type]
        (m.Features(0, 0, x, y, {"": ARRAY}), "name in parts is '', expected printable"),
        (m.Features(0, 0, x, y, {"a": 1.0}), "parts a is 1.0, expected a numpy array"),  # type: ignore[dict-item]
        (m.Features(0, 0, x, y, {"": 1.0}), "cannot send features: parts is 1.0, expected"),  # type: ignore[dict-item]
        (m.Features(0, 0, x, y, [ARRAY]), "parts is a value of type list, expected a mapping"),  # type: ignore[arg-type]
        (m.Probe(0, x), r"payload float32 \(2, 3\)"),
    ]
    for message, words in wrong * 2:
        over_the_wire(m.Features(0, 0, x, y, parts))
        over_the_wire(m.Gradient(0, 0, 0.0, x))
        with pytest.raises(LocalProtocolError, match=words):
            encode(message)


def test_after_a_good_message_another_of_its_specs_is_still_checked_when_it_comes() -> None:
    bools = ["gradient", "", "bool", [2], False]
    labels = ["labels", "", "int64", [1], False]
    payload = ["payload", "", "int8", [8], False]
    wrong = [
        (gradient([bools], small=b"\0\2" + bytes(6)), "neither 0 nor 1"),
        (gradient([bools], small=bytes(16)), "announces 8 bytes of small tensors, has 16"),
        (gradient([bools], part=8), "part is 8, expected 0 to 7"),
        (gradient([bools], held=1), None),  # an int is a legal float
        (gradient([bools], held="1"), "held_seconds is '1', expected a float"),
        ([*gradient([bools]), b""], "announces 0 frames of tensors and brings 1"),
        (
            [header(m.PROTOCOL_VERSION, "features", [0, 0, 0], [["features", *labels[1:]], labels], small=bytes(16))],
            None,
        ),
        (
            [header(m.PROTOCOL_VERSION, "features", [0, 0, 0], [labels, ["features", *bools[1:]]], small=bytes(16))],
            r"features \(2,\) with labels int64 \(1,\)",  # not kept as legal: refused again
        ),
        ([header(m.PROTOCOL_VERSION, "probe", [0, 0], [payload], small=bytes(8))], "payload int8"),
        ([header(m.PROTOCOL_VERSION, "echo", [0, 0.0, 0], [payload], small=bytes(8))], "payload int8"),
        ([header(m.PROTOCOL_VERSION, "gradient", GRADIENT_VALUES, [payload], small=bytes(8))], "unknown or repeated"),
    ]
    for frames, words in wrong * 2:
        decode(gradient([bools], small=b"\0\1" + bytes(6)))
        if words is None:
            decode(frames)
            continue
        with pytest.raises(RemoteProtocolError, match=words):
            decode(frames)


def test_what_is_legal_under_other_limits_is_not_kept() -> None:
    message, wide = m.Gradient(0, 0, 0.0, np.zeros((1,) * 9)), Limits(max_tensor_rank=9)
    frames = encode(message, wide)
    assert same(decode(frames, wide), message)
    with pytest.raises(LocalProtocolError, match="9 dimensions, the limit is 8"):
        encode(message)
    with pytest.raises(RemoteProtocolError, match="9 entries, the limit is 8"):
        decode(frames)


def test_few_layouts_are_kept_and_no_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "NUM_KEPT", 3)
    kept = codec._SENT, codec._RECEIVED
    for layouts in kept:
        layouts.clear()
    for length in [*range(5), *range(5)]:
        message = m.Gradient(0, 0, 0.0, np.arange(length))
        assert same(over_the_wire(message), message)
        assert all(1 <= len(layouts) <= 3 for layouts in kept)
    states = [m.Update(0, 0, 0.0, 0.0, dict.fromkeys(map(str, range(number)), ARRAY)) for number in (1, 100)]
    for layouts in kept:
        layouts.clear()
    for state in states:
        assert same(over_the_wire(state), state)
    assert [len(layouts) for layouts in kept] == [1, 1]


def test_one_channel_is_c_order() -> None:
    """Then both orders are the same, and the header says the simple one."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1).transpose(0, 2, 1, 3)  # (2, 1, 3, 1)
    packed = msgpack.unpackb(encode(m.Gradient(0, 0, 0.0, array))[0])[3]
    assert msgpack.unpackb(packed) == [["gradient", "", "float32", [2, 1, 3, 1], False]]


def test_a_frame_at_an_odd_address_gives_an_aligned_array() -> None:
    array = np.arange(3_000, dtype=np.float64)
    header, tensor = encode(m.Gradient(0, 0, 0.0, array))
    odd = memoryview(bytearray(b"?" + bytes(tensor)))[1:]
    decoded = decode([header, odd])
    assert isinstance(decoded, m.Gradient)
    assert decoded.gradient.flags.aligned and not decoded.gradient.flags.writeable
    assert np.array_equal(decoded.gradient, array)


# ------------------------------------------------------------------------ refused: local

ARRAY = np.zeros(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("no message", "'no message' is no message"),
        (m.Gradient(-1, 0, 0.0, ARRAY), "round_num is -1, expected 0 to 1099511627776"),
        (m.Gradient(True, 0, 0.0, ARRAY), "round_num is True, expected an int"),
        (m.Gradient(np.int64(1), 0, 0.0, ARRAY), "round_num is a value of type int64, expected an int"),
        (m.Gradient(10**5000, 0, 0.0, ARRAY), "an integer of 16610 bits"),  # 5000 * log2(10) = 16609.6
        (m.Gradient(0, 0, float("nan"), ARRAY), "held_seconds is nan, expected a finite number"),
        (m.Gradient(0, 0, -0.5, ARRAY), "held_seconds is -0.5, expected 0 to"),
        (m.Gradient(0, 0, 0.0, [1.0]), "expected a numpy array"),  # type: ignore[arg-type]
        (m.Gradient(0, 0, 0.0, np.zeros(2, dtype=complex)), "complex128, legal are float64"),
        (m.Gradient(0, 0, 0.0, np.array([{}])), "object, legal are"),
        (m.Gradient(0, 0, 0.0, np.zeros((1,) * 9)), "9 dimensions, the limit is 8"),
        (m.Update(0, 0, 0.0, 0.0, {}, {"loss": float("inf")}), "entry 'loss' is inf"),
        (m.Update(0, 0, 0.0, 0.0, {}, {"loss": "low"}), "entry 'loss' is 'low', expected a float"),  # type: ignore[dict-item]
        (m.Update(0, 0, 0.0, 0.0, [ARRAY]), "state is a value of type list, expected a mapping"),  # type: ignore[arg-type]
        (m.Update(0, 0, 0.0, 0.0, {"": ARRAY}), "name in state is '', expected printable"),
        (m.Refuse("x" * 4097), "4097 characters, the limit is 4096"),
        (m.Refuse("\ud800"), "expected printable characters"),
        (m.Refuse("two\r\nlines"), "expected printable characters"),
        (m.Leave("\x1b[2J"), "expected printable characters"),
        (m.Goodbye("\x9b2J"), "expected printable characters"),
        (m.Refuse(b"why"), "expected a str"),  # type: ignore[arg-type]
        (m.Assign(0, 1, 1, 1, "a\x1b[31m", {}, {}), "expected printable characters"),
        (m.Assign(0, 1, 1, 1, "mergesfl", {"rate": 2**63}, {}), "entry 'rate' is 9223372036854775808"),
        (m.Assign(0, 1, 1, 1, "mergesfl", {"rate": None}, {}), "entry 'rate' is None"),  # type: ignore[dict-item]
        (m.Assign(0, 1, 1, 1, "mergesfl", {str(i): i for i in range(257)}, {}), "257 entries, the limit is 256"),
        (m.Assign(0, 1, 1, 1, "mergesfl", 5, {}), "settings is 5, expected a mapping"),  # type: ignore[arg-type]
        (m.Ready((1,) * 9, 4), "9 entries, the limit is 8"),
        (m.Ready("32", 4), "feature_shape is '32', expected a sequence"),  # type: ignore[arg-type]
        (dataclasses.replace(EXAMPLES[0], class_names=("a", "b\n", "c")), "class_names is 'b.n', expected printable"),
        (dataclasses.replace(EXAMPLES[0], class_names=("a" * 256,)), "256 characters, the limit is 255"),
        (dataclasses.replace(EXAMPLES[0], class_names=("a",) * 65537), "65537 entries, the limit is 65536"),
        (dataclasses.replace(EXAMPLES[1], class_names="ab"), "class_names is 'ab', expected a sequence"),
        (dataclasses.replace(EXAMPLES[1], std=(1.0, 0.0)), "std is 0.0, expected a number above 0"),
        (dataclasses.replace(EXAMPLES[1], mean=(float("nan"),)), "mean is nan, expected a finite number"),
        (dataclasses.replace(EXAMPLES[1], flip=1), "flip is 1, expected a bool"),
        (m.Features(0, 0, np.zeros((3, 4)), np.zeros(2, dtype=np.int64)), r"\(3, 4\) with labels int64 \(2,\)"),
        (m.Assign(0, 1, 1, 1, "mergesfl", {}, {}, parts_per_step=9), "parts_per_step is 9, expected 1 to 8"),
        (m.Assign(0, 1, 1, 1, "mergesfl", {}, {}, parts_per_step=0), "parts_per_step is 0, expected 1 to 8"),
        (m.Gradient(0, 0, 0.0, ARRAY, part=-1), "part is -1, expected 0 to 7"),
        (m.Features(0, 0, np.zeros((2, 4)), np.zeros(2, dtype=np.int32)), "labels int32"),
        (m.Survey(0, 8, 1, 8, 64, 64), "whole_network is 1, expected a bool"),  # type: ignore[arg-type]
        (m.Survey(0, 8, True, 0, 64, 64), "num_probe_samples is 0, expected 1 to"),  # it is divided by
        (
            m.Survey(0, 8, True, 8, 576 << 20, 0),
            f"probe_bytes is {576 << 20}, expected 0 to {575 << 20}",
        ),  # and a header
        (m.Probe(0, np.zeros(3)), r"payload float64 \(3,\), expected uint8 \(n,\)"),
        (m.Echo(0, 0.0, np.zeros((3, 1), dtype=np.uint8)), r"payload uint8 \(3, 1\), expected uint8 \(n,\)"),
        (m.Report(0, float("nan"), 0.0), "compute_seconds_per_sample is nan, expected a finite number"),
        (m.Report(0, float("inf"), 0.0), "compute_seconds_per_sample is inf, expected a finite number"),
        (m.Report(0, 0.1, -1e-9), "transfer_seconds_per_sample is -1e-09, expected 0 to"),
        (m.Report(0, 0.1, 2e9), "transfer_seconds_per_sample is 2000000000.0, expected 0 to 1000000000.0 seconds"),
    ],
)
def test_encode_refuses(message: Any, words: str) -> None:
    with pytest.raises(LocalProtocolError, match=words):
        encode(message)


def test_encode_refuses_more_than_the_limits() -> None:
    small = Limits(max_message_bytes=30_000, max_header_bytes=200, max_tensors=2)
    array = np.zeros(2_500, dtype=np.float64)  # 20,000 bytes: one fits, two do not
    encode(m.Gradient(0, 0, 0.0, np.zeros(3_751)))  # what is kept of it says nothing about other limits
    encode(m.Update(0, 0, 0.0, 0.0, {"a": array}), small)
    with pytest.raises(LocalProtocolError, match=r"message of .* bytes, the limit is 30000"):
        encode(m.Update(0, 0, 0.0, 0.0, {"a": array, "b": array}), small)
    with pytest.raises(LocalProtocolError, match=r"tensor float64 \[3751\] exceeds 30000 bytes"):  # 3751 * 8 = 30008
        encode(m.Gradient(0, 0, 0.0, np.zeros(3_751)), small)
    with pytest.raises(LocalProtocolError, match="4 tensors, the limit is 2"):
        encode(m.Update(0, 0, 0.0, 0.0, dict.fromkeys("abcd", array[:1])), small)
    with pytest.raises(LocalProtocolError, match=r"header of .* bytes, the limit is 200"):
        encode(m.Gradient(0, 0, 0.0, np.zeros(25)), small)
    with pytest.raises(LocalProtocolError, match=r"header of .* bytes, the limit is 200"):
        encode(m.Refuse("x" * 200), small)


def test_an_int_is_a_legal_float() -> None:
    decoded = over_the_wire(m.Update(0, 0, 1, 0, {}, {"loss": 2}))
    assert isinstance(decoded, m.Update)
    assert (decoded.compute_seconds, decoded.metrics) == (1.0, {"loss": 2.0})
    assert type(decoded.compute_seconds) is float and type(decoded.metrics["loss"]) is float


@pytest.mark.parametrize("worker_id", ["", "[/x]", "$\\foo$", "-rf", "a b", "a/b", "a\n", "a\x1b[2J", "ü", "x" * 101])
def test_an_id_that_something_might_interpret_is_refused_at_both_ends(worker_id: str) -> None:
    with pytest.raises(LocalProtocolError, match="worker_id is "):
        encode(dataclasses.replace(EXAMPLES[0], worker_id=worker_id))
    values = {field.name: getattr(EXAMPLES[0], field.name) for field in dataclasses.fields(EXAMPLES[0])}
    values["worker_id"] = worker_id
    with pytest.raises(RemoteProtocolError, match="worker_id is "):
        decode([header(m.PROTOCOL_VERSION, "register", list(values.values()), [])])
    with pytest.raises(ConfigError, match="choose another --id"):
        check_worker_id(worker_id)


@pytest.mark.parametrize("worker_id", ["0", "worker-00", "jetson_7.lab.example", "nx@10.0.0.1:5555", "x" * 100])
def test_what_people_call_their_machines_is_a_worker_id(worker_id: str) -> None:
    check_worker_id(worker_id)
    over_the_wire(dataclasses.replace(EXAMPLES[0], worker_id=worker_id))


def test_clipped_texts_can_be_sent() -> None:
    for text in ["", "short", "x" * 4096, "x" * 4097, "\ud800" * 5000, "\x1b[2J\r\n\x85\u2028" * 900]:
        assert len(clipped(text)) <= DEFAULT.max_text_length
        over_the_wire(m.Refuse(clipped(text)))
    assert clipped("x" * 4096) == "x" * 4096


# ------------------------------------------------------------------------ refused: remote

GRADIENT_VALUES = (0, 0, 0.0, 0)  # round_num, step, held_seconds, part
SPEC = ["gradient", "", "float32", [1], False]


def header(*parts: object, small: bytes = b"") -> bytes:
    """With the specs, if there are any, packed as they are in a header, and the small tensors behind them."""
    packed: bytes = msgpack.packb(
        [*parts[:3], *(msgpack.packb(specs) for specs in parts[3:]), *[small] * (len(parts) > 3)]
    )
    return packed


def gradient(
    specs: object = (SPEC,), step: object = 0, held: object = 0.0, part: object = 0, small: bytes = bytes(8)
) -> list[bytes]:
    return [header(m.PROTOCOL_VERSION, "gradient", [0, step, held, part], specs, small=small)]


def large(num_bytes: int = 20_000) -> list[bytes]:
    """A gradient that has a frame."""
    spec = ["gradient", "", "uint8", [20_000], False]
    return [header(m.PROTOCOL_VERSION, "gradient", GRADIENT_VALUES, [spec]), bytes(num_bytes)]


def test_the_untouched_gradient_is_legal() -> None:
    assert same(decode(gradient()), m.Gradient(0, 0, 0.0, np.zeros(1, dtype=np.float32)))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "0 frames, expected 1 to 4097"),
        ([b""], "header of 0 bytes is no msgpack"),
        ([header(m.PROTOCOL_VERSION, "ping", [], [])] + [b""] * 4097, "4098 frames"),
        ([b"\0" * (2**20 + 1)], "header of 1048577 bytes, the limit is 1048576"),
        ([header(m.PROTOCOL_VERSION, "ping", [], []) + b"\0"], "no msgpack"),  # trailing data
        ([b"\x91" * 5000 + b"\x01"], "no msgpack"),  # 5,000 lists inside each other
        ([b"\xdd\xff\xff\xff\xff"], "no msgpack"),  # announces 4 Gi elements
        ([b"\xdb\xff\xff\xff\xff"], "no msgpack"),  # announces a string of 4 GiB
        ([b"\x95\x04\xa4ping\x90\xd4\x00\x00\x90"], "no msgpack"),  # an extension type
        ([b"\x95\x04\xa4ping\x91\x81\x00\x00\x90\x90"], "no msgpack"),  # an integer as key
        ([b"\x95\x04\xa4ping\x91\x82\xa1a\x00\xa1a\x00\x90\x90"], "occurs twice"),
        ([b"\x95\x04\xa4p\xffng\x90\x90\x90"], "no msgpack"),  # not UTF-8
        ([header()], r"not \[version"),
        ([msgpack.packb({"version": 1})], r"not \[version"),
        ([header(True, "ping", [], [])], r"not \[version"),
        ([header("1", "ping", [], [])], r"not \[version"),
        ([header(float(m.PROTOCOL_VERSION), "ping", [], [])], r"not \[version"),
        ([header(m.PROTOCOL_VERSION, "ping", [])], r"not \[version"),
        ([header(m.PROTOCOL_VERSION, "ping", {}, [])], r"not \[version"),
        ([msgpack.packb([m.PROTOCOL_VERSION, "ping", [], [], b""])], r"not \[version"),
        ([msgpack.packb([m.PROTOCOL_VERSION, "ping", [], b"\x90", []])], r"not \[version"),
        ([msgpack.packb([m.PROTOCOL_VERSION, "ping", [], b"\x90"])], r"not \[version"),
        ([header(m.PROTOCOL_VERSION, "ping", [], {})], "specs are no list"),
        ([msgpack.packb([m.PROTOCOL_VERSION, "ping", [], b"", b""])], "specs of 0 bytes is no msgpack"),
        ([msgpack.packb([m.PROTOCOL_VERSION, "ping", [], b"\x90\x90", b""])], "specs of 2 bytes is no msgpack"),
        ([header(1, "hello")], "peer speaks protocol version 1, this end speaks 5"),
        ([header(m.PROTOCOL_VERSION, "pong!", [], [])], "unknown kind of message 'pong!'"),
        ([header(m.PROTOCOL_VERSION, ["ping"], [], [])], "unknown kind of message a value of type list"),
        ([header(m.PROTOCOL_VERSION, "ping", [1], [])], "ping with 1 values; expected 0"),
        ([header(m.PROTOCOL_VERSION, "release", [1], [])], "with 1 values; expected 2: round_num, reason"),
        (gradient(step=1.0), "step is 1.0, expected an int"),
        (gradient(step=False), "step is False, expected an int"),
        (gradient(step=-1), "step is -1"),
        (gradient(step=2**64 - 1), "step is 18446744073709551615"),
        (gradient(part=8), "part is 8, expected 0 to 7"),
        (gradient(part=True), "part is True, expected an int"),
        (gradient(held=float("inf")), "held_seconds is inf"),
        (gradient(held=False), "held_seconds is False, expected a float"),
        (gradient(held=1e300), r"held_seconds is 1e\+300"),
        ([header(m.PROTOCOL_VERSION, "ping", [], []), b""], "announces 0 frames of tensors and brings 1"),
        ([*gradient(), b""], "announces 0 frames of tensors and brings 1"),
        (large()[:1], "announces 1 frames of tensors and brings 0"),
        ([*large(), b""], "announces 1 frames of tensors and brings 2"),
        (large(19_999), r"tensor uint8 \[20000\] needs 20000 bytes, its frame has 19999"),
        (gradient(small=bytes(7)), "announces 8 bytes of small tensors, has 7"),
        (gradient(small=bytes(16)), "announces 8 bytes of small tensors, has 16"),
        ([header(m.PROTOCOL_VERSION, "ping", [], [], small=b"?")], "announces 0 bytes of small tensors, has 1"),
        (
            gradient(specs=[["parts", str(i), "bool", [0], False] for i in range(4097)]),
            "4097 tensors, the limit is 4096",
        ),
        (gradient(specs=[5]), "5 as a tensor spec"),
        (gradient(specs=[SPEC[:4]]), "as a tensor spec"),
        (gradient(specs=[[*SPEC[:4], 1]]), "channels last 1, expected a bool"),
        (gradient(specs=[[*SPEC[:4], True]]), "channels last True, expected a bool, and True only of 4 dimensions"),
        (gradient(specs=[["gradient", [], "float32", [1], False]]), "expected two strings"),
        (gradient(specs=[[{}, "", "float32", [1], False]]), "expected two strings"),
        (gradient(specs=[["gradient", "x", "float32", [1], False]]), "unknown or repeated tensor 'gradient' 'x'"),
        (gradient(specs=[["labels", "", "float32", [1], False]]), "unknown or repeated tensor 'labels'"),
        (gradient(specs=[["step", "", "float32", [1], False]]), "unknown or repeated tensor 'step'"),
        (gradient(specs=[["gradient", "", "object", [1], False]]), "tensor of type 'object'"),
        (gradient(specs=[["gradient", "", ["float32"], [1], False]]), "tensor of type a value of type list"),
        (gradient(specs=[["gradient", "", "float32", [3], False]]), "announces 16 bytes of small tensors, has 8"),
        (gradient(specs=[["gradient", "", "float32", [0], False]]), "announces 0 bytes of small tensors, has 8"),
        (gradient(specs=[["gradient", "", "float32", [-1], False]]), "-1, expected 0 to"),
        (gradient(specs=[["gradient", "", "float32", 1, False]]), "expected a sequence"),
        (gradient(specs=[["gradient", "", "float32", [1] * 9, False]]), "9 entries, the limit is 8"),
        # 2**16 ** 4 = 2**64 elements: 0 bytes in 64-bit arithmetic that overflows
        (gradient(specs=[["gradient", "", "uint8", [2**16] * 4, False]]), "exceeds 603979776 bytes"),
        # no elements, but numpy multiplies the other dimensions and would raise its own error
        (gradient(specs=[["gradient", "", "uint8", [0] + [2**29] * 7, False]]), "exceeds 603979776 bytes"),
        (gradient(specs=[["gradient", "", "bool", [2], False]], small=b"\1\2" + bytes(6)), "neither 0 nor 1"),
        (gradient(specs=[SPEC, SPEC]), "repeated tensor 'gradient'"),
        ([header(m.PROTOCOL_VERSION, "gradient", GRADIENT_VALUES, [])], r"without the tensor \['gradient'\]"),
        (
            [
                header(
                    m.PROTOCOL_VERSION,
                    "update",
                    [0, 0, 0.0, 0.0, {}],
                    [["state", "w", "int8", [1], False], ["state", "w", "int8", [1], False]],
                    small=bytes(16),
                )
            ],
            "repeated tensor 'state' 'w'",
        ),
        (
            [
                header(
                    m.PROTOCOL_VERSION,
                    "features",
                    [0, 0, 0],
                    [["features", "", "int8", [2, 1], False], ["labels", "", "int64", [1], False]],
                    small=bytes(16),
                )
            ],
            r"features \(2, 1\) with labels int64 \(1,\)",
        ),
    ],
)
def test_decode_refuses(frames: list[bytes], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        decode(frames)


def test_decode_refuses_a_message_that_is_too_big() -> None:
    frames = encode(m.Gradient(0, 0, 0.0, np.zeros(100)))
    with pytest.raises(RemoteProtocolError, match="the limit is 800"):
        decode(frames, Limits(max_message_bytes=800))
    with pytest.raises(RemoteProtocolError, match=r"message of 200.. bytes, the limit is 20000"):  # all frames together
        decode(large(), Limits(max_message_bytes=20_000))
