"""100,000 damaged messages: each is refused with RemoteProtocolError, or is another legal message."""

from __future__ import annotations

import random

import msgpack

from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.codec import KINDS, decode, encode
from mergesfl.protocol.messages import Message
from tests.test_protocol_codec import EXAMPLES, same

NUM_MUTATIONS = 100_000
BOUNDARIES = [
    0,
    1,
    0x7F,
    0x80,
    0x90,
    0xC0,
    0xC1,
    0xC4,
    0xC7,
    0xCA,
    0xCB,
    0xCF,
    0xD3,
    0xD4,
    0xD9,
    0xDC,
    0xDD,
    0xDF,
    0xFF,
]

Frames = list[bytes]


def flip(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    """Flips one to four bits of one frame."""
    index = rng.randrange(len(frames))
    data = bytearray(frames[index])
    for _ in range(rng.randint(1, 4) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return [*frames[:index], bytes(data), *frames[index + 1 :]]


def overwrite(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    """Puts a byte that msgpack treats specially somewhere into the header."""
    data = bytearray(frames[0])
    data[rng.randrange(len(data))] = rng.choice(BOUNDARIES)
    return [bytes(data), *frames[1:]]


def truncate(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    index = rng.randrange(len(frames))
    return [*frames[:index], frames[index][: rng.randint(0, len(frames[index]))], *frames[index + 1 :]]


def insert(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    index = rng.randrange(len(frames))
    at = rng.randint(0, len(frames[index]))
    data = frames[index][:at] + rng.randbytes(rng.randint(1, 9)) + frames[index][at:]
    return [*frames[:index], data, *frames[index + 1 :]]


def drop(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    index = rng.randrange(len(frames))
    return [*frames[:index], *frames[index + 1 :]]


def duplicate(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    index = rng.randrange(len(frames))
    return [*frames[: index + 1], *frames[index:]]


def splice(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    """The header of one message with the tensors of another, or the halves of two headers."""
    other = rng.choice(pool)
    if rng.random() < 0.5:
        return [other[0], *frames[1:]]
    return [frames[0][: rng.randint(0, len(frames[0]))] + other[0][rng.randint(0, len(other[0])) :], *frames[1:]]


def retype(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    """Replaces one value anywhere in the parsed header: still msgpack, but something else."""
    header = msgpack.unpackb(frames[0])
    odd: list[object] = [
        None,
        True,
        -1,
        2**63,
        0.5,
        float("nan"),
        "",
        "\0",
        b"x",
        [],
        {},
        [[]],
        {"": None},
        "x" * 5000,
        2**64 - 1,
    ]
    node = header
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if not isinstance(node[key], list | dict) or not node[key] or rng.random() < 0.2:
            node[key] = rng.choice(odd)
            return [msgpack.packb(header), *frames[1:]]
        node = node[key]


def noise(rng: random.Random, frames: Frames, pool: list[Frames]) -> Frames:
    return [rng.randbytes(rng.randint(0, 40)) for _ in range(rng.randint(0, 3))]


MUTATIONS = [flip, overwrite, truncate, insert, drop, duplicate, splice, retype, noise]


def test_whatever_arrives_is_a_message_or_refused() -> None:
    rng = random.Random(20231121)
    pool = [[bytes(frame) for frame in encode(message)] for message in EXAMPLES]
    num_refused, num_changed = dict.fromkeys(MUTATIONS, 0), 0
    for number in range(NUM_MUTATIONS):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        frames = mutate(rng, rng.choice(pool), pool)
        if rng.random() < 0.2:
            frames = flip(rng, frames, pool) if frames else frames
        try:
            message: Message = decode(frames)
        except RemoteProtocolError:
            num_refused[mutate] += 1
            continue
        assert type(message) in KINDS.values()
        num_changed += 1
        if number % 50 == 0:  # what was accepted can be sent on, and says the same
            assert same(decode(encode(message)), message)
    # The test itself works: every kind of damage is noticed often, and some of it is a legal other value.
    assert min(num_refused.values()) > 1000
    assert 1000 < num_changed < NUM_MUTATIONS // 2
