"""Hashes that are the same in every process and every run, unlike Python's own."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from operator import index

import numpy as np
from numpy.typing import NDArray

_BITS_64 = (1 << 64) - 1
_BITS_63 = (1 << 63) - 1
# The constants of `mix` for arrays, made once: making one costs as much as an addition.
_ADDED, _LAST_SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(31)
_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def mix(word: int) -> int:
    """A well-mixed 64-bit value of a 64-bit one.

    Source: the finaliser of SplitMix64; Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014.
    """
    word = (word + 0x9E3779B97F4A7C15) & _BITS_64
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _BITS_64
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _BITS_64
    return word ^ word >> 31


def mix_array(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each item."""
    words = words + _ADDED  # a copy; the following lines change it in place
    for shift, factor in _ROUNDS:
        words ^= words >> shift
        words *= factor
    words ^= words >> _LAST_SHIFT
    return words


@lru_cache(maxsize=4)
def mixed(count: int) -> list[int]:
    """`mix` of 0, 1, ... `count` - 1."""
    return [mix(i) for i in range(count)]


@lru_cache(maxsize=4)
def mixed_array(count: int) -> NDArray[np.uint64]:
    """The same values as a shared array: do not change it."""
    return np.array(mixed(count), np.uint64)


def key_of(key: int | str | bytes) -> int:
    """A key as a number from 0 to 2**63 - 1: a conversation's id, or the first bytes of a prompt.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(key, int):
        return mix(key & _BITS_64) & _BITS_63
    data = key.encode() if isinstance(key, str) else key
    if hasattr(data, "__index__"):  # numpy's integers are the same keys as Python's
        return key_of(index(data))
    try:
        digest = blake2b(data, digest_size=8).digest()
    except TypeError:
        raise TypeError(f"key {key!r} must be an int, a str or bytes") from None
    return int.from_bytes(digest, "little") & _BITS_63
