"""Codecs: values by hand, error bounds as properties, torch's own types as reference, and what they refuse.

Legend: d samples, F... shape of one sample, channels its first dimension.
"""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergesfl.codecs import CODECS, WEIGHT_CODECS, find_codec, find_weight_codec
from mergesfl.codecs.base import VALUES, Codec, IllegalCode, channel_shape, per_channel, sample_bytes
from mergesfl.codecs.fp8 import NUMBERS, to_e4m3
from mergesfl.errors import ConfigError

NAMES = [*CODECS, "topk(0.1)", "topk(1)"]
LARGEST = float(np.finfo(np.float32).max)
SLACK = 1.001  # for float32's own rounding
VANISHING = 2.0**-118  # channels below become 0


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def decode(codec: Codec, parts: Any, shape: tuple[int, ...]) -> Any:
    out = np.full(shape, np.nan, np.float32)
    codec.decode(parts, out)
    return out


def through(codec: Codec, x: Any, seed: int = 0) -> Any:
    return decode(codec, codec.encode(x, rng(seed)), x.shape)


def scale_of(codec: Codec, x: Any) -> Any:
    """The scale that was sent, spread over x."""
    return np.broadcast_to(codec.encode(x, rng())["scale"].reshape(channel_shape(x.shape)), x.shape)


any_shape = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual_float = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
anything = any_shape.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=any_float | usual_float))
usual = any_shape.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=usual_float))


# What holds for all.


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(x=anything, seed=st.integers(0, 99))
def test_shape_type_and_number_of_bytes_are_as_promised_and_what_is_finite_stays_so(
    name: str, x: Any, seed: int
) -> None:
    codec, before = find_codec(name), x.copy()
    parts = codec.encode(x, rng(seed))
    decoded = decode(codec, parts, x.shape)
    assert (decoded.dtype, decoded.shape) == (np.float32, x.shape)
    assert sum(part.nbytes for part in parts.values()) == codec.num_bytes(x.shape)
    assert np.isfinite(decoded).all()
    assert len(parts[VALUES]) == len(x)
    assert np.array_equal(x, before)
    again = codec.encode(x, rng(seed))
    assert all(np.array_equal(again[key], part) for key, part in parts.items())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_so_in_its_sample_or_channel_and_spoils_no_other(name: str, value: float) -> None:
    codec = find_codec(name)
    for seed in range(20):
        x = rng(seed).standard_normal((3, 4, 5)).astype(np.float32)
        x[1, 2, 3] = value
        decoded = through(codec, x, seed)
        spoilt = ~np.isfinite(decoded)
        assert spoilt.any()
        outside = np.ones_like(spoilt)
        outside[1, 2] = False  # the sample and the channel of the one
        outside[:, 2] = False
        assert not (spoilt & outside).any()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_an_empty_batch_is_one(name: str) -> None:
    codec = find_codec(name)
    assert not through(codec, np.zeros((3, 2, 2), np.float32)).any()
    assert through(codec, np.zeros((0, 2, 2), np.float32)).shape == (0, 2, 2)


def expected_of(name: str, parts: Any, shape: tuple[int, ...]) -> Any:
    """What these parts stand for, by torch's own types or one number at a time, in C order."""
    values = parts[VALUES]
    spread = channel_shape(shape)
    if name == "fp16":
        return torch.from_numpy(values.copy()).float().numpy()
    if name == "bf16":
        return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
    if name == "int8":
        codes, zero = (torch.from_numpy(one.copy()).float() for one in (values, parts["zero"].reshape(spread)))
        return ((codes - zero) * torch.from_numpy(parts["scale"].reshape(spread))).numpy()
    if name == "fp8":
        numbers = torch.from_numpy(values.copy()).view(torch.float8_e4m3fn).float()
        return (numbers * torch.from_numpy(parts["scale"].reshape(spread))).numpy()
    if name.startswith("topk"):
        x = np.zeros((shape[0], math.prod(shape[1:])), np.float32)
        for row, (own_places, own_values) in enumerate(zip(parts["places"], values, strict=True)):
            for place, value in zip(own_places, own_values, strict=True):
                x[row, place] = value
        return x.reshape(shape)
    return values


def laid(x: Any, axes: Sequence[int]) -> Any:
    """The same array, its memory in the order of these axes."""
    return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))


ORDERS = {"C": (0, 1, 2, 3), "channels last": (0, 2, 3, 1), "backwards": (3, 2, 1, 0)}


@pytest.mark.parametrize("order_of_parts", ORDERS)
@pytest.mark.parametrize("order", [*ORDERS, "every other number"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_fills_the_rows_that_it_is_given_however_they_lie_and_no_others(
    name: str, order: str, order_of_parts: str
) -> None:
    """d = 3 rows in the midst of 7, F... = (5, 40, 30): more numbers than fp8 looks up at a time."""
    shape, codec = (3, 5, 40, 30), find_codec(name)
    x = rng(1).standard_normal(shape).astype(np.float32)
    parts = codec.encode(x, rng(2))
    if parts[VALUES].ndim == 4:
        parts[VALUES] = laid(parts[VALUES], ORDERS[order_of_parts])
    planted = np.float32(-12345.5)
    if order == "every other number":
        around = np.full((7, 5, 40, 60), planted)
        out = around[2:5, :, :, ::2]
    else:
        around = laid(np.full((7, *shape[1:]), planted), ORDERS[order])
        out = around[2:5]
    codec.decode(parts, out)
    expected = expected_of(name, parts, shape)
    assert expected.dtype == np.float32
    assert np.array_equal(np.ascontiguousarray(out).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))
    out[...] = planted
    assert (around == planted).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [*CODECS, "topk(0.1)"])
def test_decoding_makes_no_second_array_of_that_size(name: str, channels_last: bool) -> None:
    """numpy tells tracemalloc of every array: 2 MiB are decoded, and less than a tenth is used for it."""
    shape, codec = (64, 128, 8, 8), find_codec(name)
    axes = ORDERS["channels last" if channels_last else "C"]
    parts = codec.encode(rng().standard_normal(shape).astype(np.float32), rng())
    parts = {key: laid(part, axes) if part.ndim == 4 else part for key, part in parts.items()}
    out = laid(np.zeros(shape, np.float32), axes)
    tracemalloc.start()
    codec.decode(parts, out)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 0.1 * out.nbytes


def test_bytes_per_sample_by_hand() -> None:
    """HAR's cut, 32 x 32 x 2 = 2,048 numbers; topk(0.1) keeps 205, at 4 + 2 bytes. Scales are not counted."""
    expected = {
        "fp32": 8192,
        "fp16": 4096,
        "bf16": 4096,
        "int8": 2048,
        "fp8": 2048,
        "topk(0.1)": 1230,
        "topk(1)": 12288,
    }
    assert {name: sample_bytes(find_codec(name), (32, 32, 2)) for name in NAMES} == expected
    assert sample_bytes(find_codec("topk(0.1)"), (40000,)) == 4000 * 8
    assert find_codec("int8").num_bytes((16, 32, 32, 2)) == 16 * 2048 + 32 * 5


def test_what_crosses_the_wire_for_these_numbers_has_not_changed() -> None:
    """Of all sizes, halves of steps and a channel of zeros; in C order and channels last the values are the same."""
    x = (rng().integers(-4000, 4000, (5, 6, 3, 2)) * 2.0 ** rng(1).integers(-30, 9, (5, 6, 3, 2))).astype(np.float32)
    x[:, 2] = 0
    x[0, 3, 0] = 3e38, -1e-40
    for order in (x, np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        for name, expected in (("fp16", "05ba3008"), ("bf16", "2c3c3890"), ("int8", "615d4866"), ("fp8", "cc340465")):
            parts = find_codec(name).encode(order, rng(7)).values()
            assert hashlib.md5(b"".join(part.tobytes() for part in parts)).hexdigest()[:8] == expected, name


def test_channels_are_the_first_dimension_of_a_sample_that_has_two_or_more() -> None:
    assert (channel_shape((8, 3, 5, 7)), channel_shape((8, 3))) == ((1, 3, 1, 1), (1, 1))
    x = floats(*range(-5, 19)).reshape(2, 3, 2, 2)
    assert (per_channel(np.min, x).tolist(), per_channel(np.max, x).tolist()) == ([-5, -1, 0], [10, 14, 18])
    assert (per_channel(np.min, x.reshape(4, 6)), per_channel(np.max, x.reshape(4, 6))) == (-5, 18)
    x[1, 1, 0, 0] = np.nan
    assert np.isnan(per_channel(np.min, x)).tolist() == [False, True, False]


def test_names_are_looked_up_and_the_nearest_is_named() -> None:
    for name in NAMES:
        assert find_codec(name).name == name
    assert {name for name in CODECS if name in WEIGHT_CODECS} == {"fp32", "fp16", "bf16", "int8"}
    with pytest.raises(ConfigError, match=r"unknown codec 'int9': did you mean 'int8'\? legal: bf16, fp16, .* topk"):
        find_codec("int9")
    for name in ("topk", "topk(x)", "topk(1e)"):
        with pytest.raises(ConfigError, match=r"share|unknown"):
            find_codec(name)
    for share in ("0", "1.5", "-0.1"):
        with pytest.raises(ConfigError, match="above 0 and up to 1"):
            find_codec(f"topk({share})")
    for name in ("topk(0.5)", "fp8"):
        with pytest.raises(ConfigError, match="not for weights"):
            find_weight_codec(name)


# fp32


def test_fp32_sends_the_very_array() -> None:
    x = floats(1, 2).reshape(1, 2)
    parts = find_codec("fp32").encode(x, rng())
    assert list(parts) == [VALUES] and parts[VALUES] is x
    assert decode(find_codec("fp32"), parts, (1, 2)).tolist() == [[1, 2]]


# fp16


def test_fp16_by_hand() -> None:
    """11 bits: 1 + 2**-11 is half way between 1 and 1 + 2**-10, the even one is 1; 65520 is half way to infinity."""
    x = floats(1 + 2**-11, 1 + 3 * 2**-11, 65504, 65520, -1e30, 2**-24, 2**-26)
    assert through(find_codec("fp16"), x).tolist() == [1, 1 + 2**-9, 65504, 65504, -65504, 2**-24, 0]


@settings(max_examples=300, deadline=None)
@given(x=hnp.arrays(np.float32, 7, elements=st.floats(-65504, 65504, width=32)))
def test_fp16_errs_by_its_bound_and_is_torchs(x: Any) -> None:
    decoded = through(find_codec("fp16"), x)
    assert (np.abs(decoded - x) <= np.maximum(2.0**-11 * np.abs(x), 2.0**-25)).all()
    assert np.array_equal(decoded, torch.from_numpy(x).half().float().numpy())


def test_fp16_is_numpys_bit_for_bit() -> None:
    """A million bit patterns, and the halves between neighbouring small numbers; what would be infinite is not."""
    patterns = rng().integers(0, 2**32, 10**6, dtype=np.uint32).view(np.float32)
    halves = np.arange(0, 4097, dtype=np.float32) * np.float32(2.0**-25)
    x = np.concatenate([patterns[~np.isnan(patterns)], halves, -halves, np.nextafter(halves, floats(1))])
    with np.errstate(over="ignore"):
        theirs = x.astype(np.float16)
    is_over = np.isinf(theirs) & np.isfinite(x)
    theirs[is_over] = np.copysign(np.float16(65504), x[is_over])
    assert find_codec("fp16").encode(x, rng())[VALUES].tobytes() == theirs.tobytes()


# bf16


def test_bf16_by_hand() -> None:
    """8 bits: 1 + 2**-8 is half way between 1 and 1 + 2**-7; the largest float32 would go to infinity."""
    x = floats(1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), LARGEST, -LARGEST)
    largest = float.fromhex("0x1.fep127")
    assert through(find_codec("bf16"), x).tolist() == [1, 1 + 2**-6, -1, largest, -largest]


def test_bf16_is_torchs_bit_for_bit() -> None:
    """A million bit patterns, all exponents, both signs; beyond the largest bfloat16 torch goes to infinity, not we."""
    bits = rng().integers(0, 2**32, 10**6, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate([x, -x, floats(0, -0.0, np.inf, -np.inf, np.nan)])
    ours = through(find_codec("bf16"), x)
    theirs = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    is_over = np.isinf(theirs) & np.isfinite(x)
    assert is_over.sum() < 10_000
    ours, theirs, x = ours[~is_over], theirs[~is_over], x[~is_over]
    assert np.array_equal(np.isnan(ours), np.isnan(theirs)) and np.array_equal(np.isnan(ours), np.isnan(x))
    known = ~np.isnan(x)
    assert np.array_equal(ours[known].view(np.uint32), theirs[known].view(np.uint32))
    with np.errstate(invalid="ignore"):
        bound = np.maximum(2.0**-8 * np.abs(x.astype(np.float64)), 2.0**-134)
        finite = np.isfinite(x)
        assert (np.abs(ours.astype(np.float64) - x)[finite] <= bound[finite]).all()


# int8


def test_int8_by_hand() -> None:
    """Channel 0 from -51 to 204: scale 1, zero 51, whole numbers are exact. Channel 1 from 0 to 127.5: 0.5 and 0."""
    x = np.stack([np.stack([floats(-51, 0, 204), floats(0, 0.5, 127.5)])])  # (1, 2, 3)
    parts = find_codec("int8").encode(x, rng())
    assert parts["scale"].tolist() == [1.0, 0.5] and parts["zero"].tolist() == [51, 0]
    assert parts[VALUES].tolist() == [[[0, 51, 255], [0, 1, 255]]]
    assert np.array_equal(through(find_codec("int8"), x), x)
    planted = {VALUES: np.array([[[1, 50, 7]]], np.uint8), "scale": floats(0.25), "zero": np.array([50], np.uint8)}
    assert decode(find_codec("int8"), planted, (1, 1, 3)).tolist() == [[[-12.25, 0.0, -10.75]]]


def test_int8_rounds_by_chance_and_is_right_in_the_mean() -> None:
    """0.3 of a step comes out as 1 step in 30 % of 20,000 draws (deviation 0.32 %), else as 0."""
    x = np.full((20_000, 1, 2), 0.3, np.float32)
    x[0, 0, 0] = 255.0
    decoded = through(find_codec("int8"), x)[1:]
    assert set(np.unique(decoded)) == {0.0, 1.0}
    assert decoded.mean() == pytest.approx(0.3, abs=0.01)


@settings(max_examples=300, deadline=None)
@given(x=usual, seed=st.integers(0, 99))
def test_int8_errs_by_less_than_a_step_of_its_channel_and_zero_is_exact(x: Any, seed: int) -> None:
    decoded, scale = through(find_codec("int8"), x, seed), scale_of(find_codec("int8"), x)
    assert (np.abs(decoded - x) <= SLACK * scale + VANISHING).all()
    assert (decoded[x == 0] == 0).all()
    lo, hi = (per_channel(f, x) for f in (np.min, np.max))
    assert np.allclose(find_codec("int8").encode(x, rng())["scale"], np.ravel((hi - lo) / 255), rtol=1e-6, atol=1e-35)


def test_numbers_at_the_ends_of_float32_are_clipped_or_vanish() -> None:
    for name in ("int8", "fp8"):
        huge = through(find_codec(name), floats(LARGEST, -LARGEST, 0).reshape(1, 1, 3))
        assert huge[0, 0, 0] == pytest.approx(2.0**126, rel=0.01)
        assert huge[0, 0, 1] == pytest.approx(-(2.0**126), rel=0.01)
        assert through(find_codec(name), floats(1e-40, -1e-40, 2e-36).reshape(1, 1, 3)).tolist() == [[[0, 0, 0]]]


# fp8


def test_fp8_by_hand() -> None:
    """4 bits: between 8 and 16 the step is 1, so 12.5 becomes 12 (even), 13.5 becomes 14. Below 2**-6 it is 2**-9."""
    codes = to_e4m3(floats(448, -448, 12.5, 13.5, 2**-6, 2**-9, 2**-10, 3 * 2**-10, 0.0, -0.0, np.nan))
    assert [hex(code) for code in codes] == [
        *("0x7e", "0xfe", "0x54", "0x56", "0x8", "0x1", "0x0", "0x2", "0x0", "0x80", "0x7f")
    ]
    parts = find_codec("fp8").encode(floats(896, 1, -25).reshape(1, 1, 3), rng())
    assert parts["scale"].tolist() == [2.0]
    assert decode(find_codec("fp8"), parts, (1, 1, 3)).tolist() == [[[896, 1, -24]]]


def test_fp8_is_torchs_bit_for_bit() -> None:
    """All 256 numbers, and a million others between -448 and 448 with all exponents, halves of steps among them."""
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(NUMBERS, theirs, equal_nan=True)
    exponents = np.exp2(rng().uniform(-14, 9, 10**6)).astype(np.float32)
    numbers = np.sort(NUMBERS[:0x7F])
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([exponents, halves, np.nextafter(halves, floats(0)), np.nextafter(halves, floats(999))])
    x = np.clip(np.concatenate([x, -x]), -448, 448)
    assert np.array_equal(to_e4m3(x), torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


@settings(max_examples=300, deadline=None)
@given(x=usual)
def test_fp8_errs_by_its_bound(x: Any) -> None:
    decoded, scale = through(find_codec("fp8"), x), scale_of(find_codec("fp8"), x)
    bound = SLACK * np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * scale) + VANISHING
    assert (np.abs(decoded - x) <= bound).all()


# topk


@settings(max_examples=200, deadline=None)
@given(x=usual, share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_topk_keeps_k_numbers_of_every_sample_exactly_and_drops_the_others(x: Any, share: float, seed: int) -> None:
    codec = find_codec(f"topk({share:.3f})")
    parts = codec.encode(x, rng(seed))
    num = x[0].size
    assert parts["places"].shape == (len(x), min(max(1, round(float(f"{share:.3f}") * num)), num))
    decoded = decode(codec, parts, x.shape)
    kept = np.zeros((len(x), num), bool)
    np.put_along_axis(kept, parts["places"].astype(int), True, axis=1)
    assert np.array_equal(decoded.reshape(len(x), -1), np.where(kept, x.reshape(len(x), -1), 0))


def test_topk_picks_the_largest_with_nine_chances_of_ten_and_all_of_either_kind_alike() -> None:
    """F = 50 numbers, k = 10; m ~ Binomial(10, 0.1). 20,000 samples: a large one is kept with 0.9 (deviation 0.2 %),
    one of the 40 others with 10 * 0.1 / 40 = 0.025 (deviation 0.1 %)."""
    x = np.broadcast_to(np.where(np.arange(50) % 5 == 0, -2, 1).astype(np.float32), (20_000, 50))
    shares = (through(find_codec("topk(0.2)"), np.ascontiguousarray(x)) != 0).mean(axis=0)
    assert shares[x[0] < 0] == pytest.approx(np.full(10, 0.9), abs=0.012)
    assert shares[x[0] > 0] == pytest.approx(np.full(40, 0.025), abs=0.006)


def test_topk_of_everything_is_everything() -> None:
    x = rng().standard_normal((3, 4, 5)).astype(np.float32)
    assert np.array_equal(through(find_codec("topk(1)"), x), x)


# What is refused. Each row: codec, part, what it is replaced by (None: taken out), words. x is (2, 3, 4).

PLANTED: list[tuple[str, str, Any, str]] = [
    ("fp32", VALUES, np.zeros((2, 3, 4), np.float16), r"float16\(2, 3, 4\), expected float32\(2, 3, 4\)"),
    ("fp16", VALUES, np.zeros((2, 3, 4), np.float32), r"float32\(2, 3, 4\), expected float16\(2, 3, 4\)"),
    ("fp16", "scale", np.ones(3, np.float32), r"parts \['scale', 'values'\], expected \['values'\]"),
    ("bf16", VALUES, np.zeros((2, 3, 4), np.uint8), r"uint8\(2, 3, 4\), expected int16"),
    ("bf16", VALUES, np.zeros((2, 4, 3), np.int16), r"int16\(2, 4, 3\), expected int16\(2, 3, 4\)"),
    ("int8", VALUES, np.zeros((2, 3, 4), np.int8), r"int8\(2, 3, 4\), expected uint8"),
    ("int8", "scale", None, r"parts \['values', 'zero'\], expected \['scale', 'values', 'zero'\]"),
    ("int8", "scale", np.ones(2, np.float32), r"scale float32\(2,\), expected float32\(3,\)"),
    ("int8", "scale", np.ones(3, np.float64), r"scale float64\(3,\), expected float32\(3,\)"),
    ("int8", "scale", floats(1, np.nan, 1), "scale with nan, expected numbers that are not negative"),
    ("int8", "scale", floats(1, -0.5, 1), "scale with -0.5, expected numbers that are not negative"),
    ("int8", "zero", np.ones(3, np.int64), r"zero int64\(3,\), expected uint8\(3,\)"),
    ("fp8", VALUES, np.zeros((2, 3), np.uint8), r"uint8\(2, 3\), expected uint8\(2, 3, 4\)"),
    ("fp8", "scale", floats(-np.inf, 1, 1), "scale with -inf"),
    ("fp8", "zero", np.ones(3, np.uint8), "parts"),
    ("topk(0.2)", VALUES, np.zeros((2, 3), np.float32), r"float32\(2, 3\), expected float32\(2, 2\)"),
    ("topk(0.2)", "places", np.array([[0, 1], [0, 12]], np.int16), "places from 0 to 12, expected 0 to 11"),
    ("topk(0.2)", "places", np.array([[-1, 1], [0, 1]], np.int16), "places from -1 to 1, expected 0 to 11"),
    ("topk(0.2)", "places", np.array([[0, 1], [3, 3]], np.int16), "each once and in order"),
    ("topk(0.2)", "places", np.array([[0, 1], [3, 2]], np.int16), "each once and in order"),
    ("topk(0.2)", "places", np.array([[0, 1], [2, 3]], np.int32), "places int32"),
]


@pytest.mark.parametrize(("name", "part", "value", "words"), PLANTED)
def test_parts_that_the_codec_does_not_make_are_refused(name: str, part: str, value: Any, words: str) -> None:
    codec = find_codec(name)
    honest = codec.encode(rng().standard_normal((2, 3, 4)).astype(np.float32), rng())
    decode(codec, honest, (2, 3, 4))
    planted = {key: array for key, array in {**honest, part: value}.items() if array is not None}
    with pytest.raises(IllegalCode, match=words):
        decode(codec, planted, (2, 3, 4))
