"""Hostile messages by the million: rubbish, damaged real ones, and well-formed ones with values that cannot be.

Everything comes from one `random.Random`, so a run is repeated by its seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from dpshm.net import wire

_encode = msgspec.msgpack.encode
_vectors = json.loads((Path(__file__).parents[1] / "data" / "wire-vllm-0.32.json").read_text())
GOLDEN: list[bytes] = [
    bytes.fromhex(code)
    for link, vectors in _vectors.items()
    if link != "vllm"
    for vector in vectors
    for code in vector.get("frames", [vector.get("hex")])
]
EDGES = (
    0,
    1,
    2,
    3,
    63,
    64,
    255,
    256,
    65535,
    65536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 62) - 1,
    1 << 62,
    (1 << 64) - 1,
    -1,
)
WORDS = ("", "x", wire.SCALE, wire.DRAIN, wire.UNDRAIN, "num_running_reqs", "kv_cache_usage", "\0" * 40)
KEYS = (*wire.SchedulerStats.__struct_fields__, "another", 7)


def value(rng: Random, depth: int = 0) -> Any:
    """Any value that msgpack has."""
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind == 2:
        return rng.choice(EDGES)
    if kind == 3:
        return rng.getrandbits(rng.randrange(1, 64))
    if kind == 4:
        return rng.choice((0.5, -1.0, 1e308, float("inf"), float("nan")))
    if kind == 5:
        return rng.choice(WORDS)
    if kind == 6:
        return rng.randbytes(rng.randrange(5))
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def message(rng: Random) -> bytes:
    """One hostile message, at most a few hundred bytes long."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(40))
    if kind == 1:
        data = bytearray(rng.choice(GOLDEN))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data)
    if kind == 2:  # an engine's report
        stats = {rng.choice(KEYS): value(rng, 3) for _ in range(4)}
        return _encode([rng.choice((0, 1, rng.choice(EDGES))), (), rng.choice((None, stats)), 0.0, None, None])
    if kind == 3:  # a wave that ends or starts
        wave = rng.choice((rng.randrange(4), rng.choice(EDGES)))
        return _encode([rng.randrange(3), (), None, 0.0, None, None, *rng.choice(((wave, None), (None, wave)))])
    if kind == 4:  # a front-end's or an operator's word
        return _encode([rng.choice((*WORDS, *EDGES, None, b"\1\0")), rng.choice(EDGES)])
    return _encode(value(rng))


def frames(rng: Random) -> list[bytes]:
    """A message in one frame, or now and then in several."""
    return [message(rng) for _ in range(1 if rng.random() < 0.97 else rng.randrange(2, 5))]
