"""The codecs of a run on its messages: what crosses the wire, what comes back, and what is refused.

Legend: d = 2 samples, F... = (3, 4), W (2, 3) a tensor of a state.
"""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergesfl.errors import ConfigError, RemoteProtocolError
from mergesfl.protocol.codec import decode, encode
from mergesfl.protocol.coding import PLAIN, RunCodecs
from mergesfl.protocol.messages import Assign, Features, Gradient, Message, Update
from tests.memory_cluster import welcome

SHAPE = (2, 3, 4)
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
Y = np.zeros(2, np.int64)
STATE: dict[str, Any] = {
    "conv.weight": np.arange(-3, 3, dtype=np.float32).reshape(2, 3),
    "conv.bias": np.array([1e-9, 5.0], np.float32),
    "norm.count": np.array(7, np.int64),
    "table": np.arange(6, dtype=np.int64).reshape(2, 3),
}


def over_the_wire(message: Message) -> Any:
    return decode([bytes(frame) for frame in encode(message)])


def codecs(features: str = "int8", gradients: str = "fp16", weights: str = "int8", seed: int = 3) -> RunCodecs:
    return RunCodecs(seed, features, gradients, weights)


def features(round_num: int = 100, step: int = 0) -> Features:
    return Features(round_num, step, X, Y)


def room() -> Any:
    return np.full(SHAPE, np.nan, np.float32)


def update(run: RunCodecs, state: dict[str, Any] = STATE, worker_id: str = "a") -> Update:
    return run.encode_update(Update(100, 16, 1.0, 1.0, state, {}), worker_id)


def gradient(run: RunCodecs, x: Any) -> Gradient:
    return Gradient(100, 0, 0.5, *run.encode_gradient(x, "a", 100, 0))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "fp8", "topk(0.5)"])
def test_features_and_gradients_come_back_as_their_codec_leaves_them(name: str) -> None:
    run = codecs(name, name)
    sent = over_the_wire(run.encode_features(features(), "a"))
    out = room()
    run.decode_features(sent, out)
    assert np.abs(out - X).max() <= (np.abs(X).max() if name.startswith("topk") else 0.2)
    arrived = run.decode_gradient(over_the_wire(gradient(run, X)), SHAPE)
    assert arrived.shape == SHAPE and arrived.dtype == np.float32


def test_without_a_codec_the_memory_itself_is_sent_and_nothing_besides() -> None:
    sent = PLAIN.encode_features(features(), "a")
    assert sent.features is X and sent.parts == {}
    assert len(encode(sent)) == 1  # the header, in which both are
    out = room()
    PLAIN.decode_features(sent, out)
    assert np.array_equal(out, X)
    back = gradient(PLAIN, X)
    assert PLAIN.decode_gradient(back, SHAPE) is X
    plain, parts = PLAIN.encode_assigned(STATE, "a", 100)
    assert all(plain[name] is array for name, array in STATE.items()) and not parts


def test_an_empty_gradient_stays_one_whatever_the_codec() -> None:
    none = np.zeros(0, np.float32)
    run = codecs(gradients="int8")
    sent = over_the_wire(gradient(run, none))
    assert run.decode_gradient(sent, SHAPE).shape == (0,)


def test_of_a_state_float_tensors_with_two_dimensions_are_encoded_and_all_else_is_as_it_was() -> None:
    """-3 ... 2 in two channels: -3 to 0 and 0 to 2; ends and 0 are exact, the others within a step of 3/255 or 2/255.

    6 codes and 2 channels of 5 bytes; 2 floats, 1 and 6 integers of 8 bytes.
    """
    run = codecs()
    plain, parts = run.encode_assigned(STATE, "a", 100)
    assert list(plain) == ["conv.bias", "norm.count", "table"]
    assert {key: array.shape for key, array in parts.items()} == {
        "conv.weight:values": (1, 2, 3),
        "conv.weight:scale": (2,),
        "conv.weight:zero": (2,),
    }
    assign = over_the_wire(Assign(100, 2, 2, 8, "mergesfl", {}, plain, parts))
    state = run.decode_assign(assign)
    assert state.keys() == STATE.keys()
    for name in ("conv.bias", "norm.count", "table"):
        assert np.array_equal(state[name], STATE[name]) and state[name].dtype == STATE[name].dtype
    assert np.allclose(state["conv.weight"], STATE["conv.weight"], atol=3.01 / 255)
    assert np.allclose(
        run.decode_update(over_the_wire(update(run))).state["conv.weight"], state["conv.weight"], atol=0.02
    )
    assert run.state_bytes(STATE) == 6 + 2 * 5 + 8 + 8 + 48
    assert PLAIN.state_bytes(STATE) == 24 + 8 + 8 + 48


def test_chance_is_that_of_seed_worker_round_and_step_and_an_attempt_repeats_it() -> None:
    def values(run: RunCodecs, worker_id: str = "a", round_num: int = 100, step: int = 0) -> bytes:
        return run.encode_features(features(round_num, step), worker_id).features.tobytes()

    run = codecs()
    assert values(run) == values(codecs()) == values(run, round_num=101)  # the second attempt at round 1
    others = [values(codecs(seed=4)), values(run, "b"), values(run, round_num=200), values(run, step=1)]
    assert len({values(run), *others}) == 5
    assert update(run).parts["conv.weight:values"].tobytes() == update(run).parts["conv.weight:values"].tobytes()


def test_a_worker_takes_its_codecs_from_the_welcome() -> None:
    told = welcome(3, feature_codec="int8", gradient_codec="fp16", weight_codec="bf16")
    run = RunCodecs.of(told)
    assert (run.feature_bytes((3, 4)), run.gradient_bytes((3, 4))) == (12, 24)
    with pytest.raises(ConfigError, match="unknown codec 'int7'"):
        RunCodecs.of(dataclasses.replace(told, feature_codec="int7"))
    with pytest.raises(ConfigError, match="not for weights"):
        RunCodecs.of(dataclasses.replace(told, weight_codec="topk(0.5)"))


def planted(sent: Any, **changes: Any) -> Any:
    return dataclasses.replace(sent, **{key: change(getattr(sent, key)) for key, change in changes.items()})


ADVICE = r" \(codec .*\); install the same mergesfl on both ends"
STRANGE: dict[str, tuple[Callable[[Update], Update], str]] = {
    "plain where it should be encoded": (
        lambda sent: planted(sent, state=lambda s: {**STATE}, parts=lambda p: {}),
        r"sent 'conv.weight': float32\(2, 3\) as it is" + ADVICE,
    ),
    "both": (lambda sent: planted(sent, state=lambda s: {**STATE}), r"sent a state with parts of 'conv.weight'"),
    "no values": (
        lambda sent: planted(sent, parts=lambda p: {k: v for k, v in p.items() if not k.endswith("values")}),
        r"parts \['scale', 'zero'\]" + ADVICE,
    ),
    "no scale": (
        lambda sent: planted(sent, parts=lambda p: {k: v for k, v in p.items() if not k.endswith("scale")}),
        r"sent 'conv.weight' parts \['values', 'zero'\], expected",
    ),
    "two samples": (
        lambda sent: planted(sent, parts=lambda p: p | {"conv.weight:values": np.zeros((2, 2, 3), np.uint8)}),
        r"uint8\(2, 2, 3\), expected uint8\(1, 2, 3\)",
    ),
    "no sample, of gigabytes": (
        lambda sent: planted(sent, parts=lambda p: p | {"conv.weight:values": np.zeros((0, 1 << 30, 3), np.uint8)}),
        r"uint8\(0, 1073741824, 3\), expected uint8\(1, 1073741824, 3\)",
    ),
    "a vector": (
        lambda sent: planted(sent, parts=lambda p: p | {"x:values": np.zeros((1, 3), np.uint8)}),
        "parts of 'x'",
    ),
    "no name": (lambda sent: planted(sent, parts=lambda p: p | {"scale": np.ones(2, np.float32)}), "parts of ''"),
    "a part too many": (
        lambda sent: planted(sent, parts=lambda p: p | {"conv.weight:more": np.ones(2, np.float32)}),
        "parts .'more', 'scale', 'values', 'zero'",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_state_that_is_not_of_the_codec_is_refused(case: str) -> None:
    plant, words = STRANGE[case]
    run = codecs()
    sent = plant(update(run))
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError, match=words):
        run.decode_update(sent)
    num_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes < 1 << 20


def test_parts_are_refused_where_there_is_no_codec() -> None:
    coded = codecs()
    with pytest.raises(RemoteProtocolError, match=r"sent a state with parts of 'conv.weight'"):
        PLAIN.decode_update(update(coded))
    with pytest.raises(RemoteProtocolError, match=r"sent features parts .*, expected \['values'\]"):
        PLAIN.decode_features(coded.encode_features(features(), "a"), room())
    with pytest.raises(RemoteProtocolError, match="'values' twice"):
        PLAIN.decode_features(dataclasses.replace(features(), parts={"values": X}), room())
    with pytest.raises(RemoteProtocolError, match=r"sent a gradient float16\(2, 3, 4\), expected float32"):
        PLAIN.decode_gradient(gradient(coded, X), SHAPE)


def test_every_part_of_a_step_has_chance_of_its_own_and_the_first_that_of_an_unsplit_step() -> None:
    run = codecs("int8", "int8")
    sent = [run.encode_features(dataclasses.replace(features(), part=part), "a") for part in (0, 1, 1)]
    assert [one.part for one in sent] == [0, 1, 1]
    back = [run.encode_gradient(X, "a", 100, 0, part)[0] for part in (0, 1, 1)]
    np.testing.assert_array_equal(sent[0].features, run.encode_features(features(), "a").features)
    np.testing.assert_array_equal(back[0], run.encode_gradient(X, "a", 100, 0)[0])
    for first, second, again in ([one.features for one in sent], back):
        np.testing.assert_array_equal(second, again)
        assert (first != second).any()
