"""The fingerprints of prompts: equal on both sides, of the whole prefix, and not to be guessed from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import SettingError
from dpshm.rules.prefix_hash import DigestReducer, PrefixHasher

KEY = 0x1234_5678_9ABC_DEF0
TOKENS = st.lists(st.integers(0, 200_000), max_size=200)


@given(TOKENS, TOKENS, st.integers(1, 20))
@settings(deadline=None)
def test_prompts_share_fingerprints_where_they_share_a_prefix(one: list[int], other: list[int], size: int):
    """Guards against a hit on blocks whose prefix differs, and a miss on blocks whose prefix is the same."""
    hasher = PrefixHasher(size, KEY)
    a, b = hasher.fingerprints(one), hasher.fingerprints(other)
    assert len(a) == len(one) // size
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    for i in range(min(len(a), len(b))):
        assert (a[i] == b[i]) == ((i + 1) * size <= same)


@given(TOKENS, st.integers(0, 200))
@settings(deadline=None)
def test_a_longer_prompt_keeps_the_fingerprints_of_its_beginning(tokens: list[int], cut: int):
    """Guards against a conversation whose next turn finds nothing of the last."""
    hasher = PrefixHasher(4, KEY)
    whole, part = hasher.fingerprints(tokens), hasher.fingerprints(tokens[:cut])
    assert part.tolist() == whole[: len(part)].tolist()


def test_every_kind_of_sequence_gives_the_same():
    """Guards against an engine with arrays and a front-end with lists that never find each other's blocks."""
    tokens = list(range(1000, 1100))
    hasher = PrefixHasher(16, KEY)
    expected = hasher.fingerprints(tokens).tolist()
    assert len(expected) == 6
    kinds = (
        *(tuple(tokens), array("I", tokens), array("q", tokens), memoryview(array("i", tokens))),
        *(np.array(tokens, dtype) for dtype in (np.int16, np.uint32, np.int64, np.uint64, ">u4")),
        np.array(tokens * 2)[:100],
        np.repeat(np.array(tokens), 2)[::2],
    )
    for kind in kinds:
        assert hasher.fingerprints(kind).tolist() == expected


def test_another_process_makes_the_same_fingerprints():
    """Guards against a hash that depends on the process, as Python's own does."""
    hasher = PrefixHasher(16, KEY)
    mine = [*hasher.fingerprints(range(64)).tolist(), hasher.identity, hasher.start("lora", b"image")]
    code = (
        "from dpshm.rules.prefix_hash import PrefixHasher\n"
        f"h = PrefixHasher(16, {KEY})\n"
        "print(*h.fingerprints(range(64)).tolist(), h.identity, h.start('lora', b'image'))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == mine


def test_salt_key_and_block_size_make_other_fingerprints():
    """Guards against a hit on the blocks of another adapter, another image or another group."""
    tokens = list(range(256))
    hasher = PrefixHasher(16, KEY)
    starts = [0, hasher.start("a"), hasher.start("b"), hasher.start("a", "b"), hasher.start("ab"), hasher.start(1)]
    found = [hasher.fingerprints(tokens, start).tolist() for start in starts]
    found.append(PrefixHasher(16, KEY + 1).fingerprints(tokens).tolist())
    found.append(PrefixHasher(32, KEY).fingerprints(tokens).tolist())
    everything = [word for words in found for word in words]
    assert len(set(everything)) == len(everything)
    hashers = [hasher, PrefixHasher(16, KEY + 1), PrefixHasher(32, KEY)]
    assert len({h.identity for h in hashers}) == 3
    assert all(0 <= h.identity < 1 << 63 for h in hashers)


def test_any_text_is_a_salt():
    """Guards against a request that fails because of the name of its adapter: bytes that are no UTF-8."""
    hasher = PrefixHasher(16, KEY)
    assert len({hasher.start(name) for name in ("\udcff", "\udcfe", "?", "")}) == 4


def test_threads_that_hash_long_prompts_at_once_make_the_same():
    """Guards against keys of one thread in the places of another's, which would be so for ever."""
    prompt = np.arange(9000, dtype=np.uint32)
    expected = PrefixHasher(1, KEY).fingerprints(prompt)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                hasher = PrefixHasher(1, KEY)
                lengths = [1500, 3000, 4500, 6000, 7500, 9000] * 2
                list(pool.map(lambda n, h=hasher: h.fingerprints(prompt[:n]), lengths))
                assert (hasher.fingerprints(prompt) == expected).all()
    finally:
        sys.setswitchinterval(interval)


def test_blocks_of_zeros_count():
    """Guards against a prompt that seems to be held as far as zeros follow what is held."""
    found = PrefixHasher(4, KEY).fingerprints([7, 7, 7, 7, *[0] * 40])
    assert len(np.unique(found)) == 11


def test_thue_morse_prompts_do_not_collide():
    """Guards against a sum of powers, which collides on these for any base once they have 2,048 blocks."""
    order = [bin(i).count("1") & 1 for i in range(4096)]
    hasher = PrefixHasher(1, KEY)
    one = hasher.fingerprints([7 if bit else 9 for bit in order])
    other = hasher.fingerprints([9 if bit else 7 for bit in order])
    assert not np.isin(one, other).any()


def test_fingerprints_spread_over_all_bits():
    """Guards against buckets that fill unevenly: the low bits choose a bucket."""
    rng = np.random.default_rng(1)
    words = PrefixHasher(1, KEY).fingerprints(rng.integers(0, 1000, 20_000))
    for bit in range(64):
        ones = int(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - 10_000) < 500, bit  # 7 standard deviations
    assert len(np.unique(words)) == 20_000


class _Grows:
    """Read as a token id, makes the list longer in which it is."""

    def __init__(self, tokens: list[object]) -> None:
        self._tokens = tokens
        tokens.append(self)

    def __index__(self) -> int:
        self._tokens.append(1)
        return 7


def _growing() -> list[object]:
    tokens: list[object] = [1, 2]
    _Grows(tokens)
    return tokens


@pytest.mark.parametrize(
    "tokens",
    [
        [1, -1],
        [1, 1 << 32],
        [1.5],
        ["a"],
        np.array([1.0]),
        np.array([[1]]),
        np.array([-1]),
        np.array([1 << 33]),
        "ab",
        b"abcd",
        bytearray(b"abcd"),
        {1, 2},
        {1: 2},
        np.array([True]),
        memoryview(np.zeros((2, 2), np.uint32)),
        _growing(),
    ],
)
def test_what_is_no_token_is_refused(tokens: object):
    """Guards against a prompt of other numbers, whose fingerprints would silently match others' blocks."""
    with pytest.raises(SettingError, match="token ids must be"):
        PrefixHasher(1, KEY).fingerprints(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 4097])
def test_a_block_size_out_of_range_is_refused(size: int):
    """Guards against a hasher that divides by zero later."""
    with pytest.raises(SettingError, match="block_tokens is"):
        PrefixHasher(size, KEY)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20, unique=True))
@settings(deadline=None)
def test_digests_keep_apart(digests: list[bytes]):
    """Guards against a reduction that loses what tells an engine's block hashes apart, or that has no secret."""
    words = [DigestReducer(KEY).fingerprint(digest) for digest in digests]
    assert len(set(words)) == len(digests)
    assert all(0 < word < 1 << 64 for word in words)
    assert [DigestReducer(KEY).fingerprint(digest) for digest in digests] == words
    digest = bytes(range(32))
    assert DigestReducer(KEY + 1).fingerprint(digest) != DigestReducer(KEY).fingerprint(digest)
    assert DigestReducer(KEY).fingerprint(digest + b"\0\0\0\1") == DigestReducer(KEY).fingerprint(digest)


def test_every_bit_of_a_digest_counts():
    """Guards against a reduction that reads a part of the digest."""
    reducer, zero = DigestReducer(KEY), bytes(32)
    flipped = [(1 << bit).to_bytes(32, "little") for bit in range(256)]
    assert len({reducer.fingerprint(digest) for digest in (zero, *flipped)}) == 257
