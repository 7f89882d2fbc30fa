"""The prefix index: which blocks of prompts each rank's KV cache holds right now, in shared memory.

A rank's index is a file ``prefix-RANK`` in the folder of its group's sockets. Only the owner may enter that
folder, and the file has mode 0600 whatever the board's mode, because the index tells a reader who knows a prompt
whether it was seen. The file goes with the group.

    offset 0     +------------------------------------------------------------------+
                 | magic 8 | version | incarnation | buckets | block_tokens |       |
                 | identity of the hash | inserted | evicted | dropped | held       |  one page
                 | recomputed_blocks                                                |
    page 1       +------------------------------------------------------------------+
                 | bucket 0: 16 words | bucket 1: 16 words | ...                    |  128 bytes each
                 +------------------------------------------------------------------+

A word of the table is a fingerprint (`dpshm.rules.prefix_hash`); 0 is empty. A fingerprint's low bits choose its
bucket, two neighbouring cache lines, and any of the bucket's 16 words may hold it. There are at least four words
for each block of the cache. With fingerprints spread evenly a bucket then holds 4 on average, and fewer than one
block in a million finds its bucket full. Such a block is left out and counted as dropped.

SYNC: one writer, any number of readers, no lock, no order. Each word is true when it is stored. An insertion is
one aligned 64-bit store, and so is an eviction; a reader loads each word whole (x86-64, Armv8). A reader may see
insertions in another order than they were made, or a word that was evicted an instant ago. Both only make its
match too long or too short by some blocks. That costs a computation of a prefix and never changes an answer.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpshm.board.layout import WORD_BYTES
from dpshm.board.prefix_file import AT, BUCKET_WORDS, MAX_BLOCKS, TABLE, buckets_for, make_file, open_file
from dpshm.errors import SettingError
from dpshm.rules.prefix_hash import FingerprintList

_INSERTED, _EVICTED, _DROPPED, _HELD = (AT[name] for name in ("inserted", "evicted", "dropped", "held"))
_FULL = (1 << BUCKET_WORDS) - 1
_SHIFT = BUCKET_WORDS.bit_length() - 1
_NO_PLACE = -1
# SYNC: in the native mode that has no sign before it, struct loads each word whole.
_bucket_at = struct.Struct(f"{BUCKET_WORDS}Q").unpack_from
_TABLE_BYTES = TABLE * WORD_BYTES
_BYTE_SHIFT = (BUCKET_WORDS * WORD_BYTES).bit_length() - 1


class PrefixIndexWriter:
    """The writing end, of one engine. It belongs to the thread that runs the scheduler.

    A block that is held has a name. `insert` and `evict` name it by its fingerprint and count how many blocks
    share it. `enter` and `leave` are for an engine that has names of its own and knows what is held.

    Attributes:
        num_blocks: blocks of the KV cache; the index has room for more.
        dropped: blocks that found no place.
        names: of the blocks that are held.
    """

    def __init__(self, words: memoryview, num_blocks: int, buckets: int) -> None:
        self.num_blocks = num_blocks
        self._words = words
        self._mask = buckets - 1
        self._used = [0] * buckets  # by bucket, one bit a word
        self._places: dict[Hashable, int] = {}  # name -> index of its word, or _NO_PLACE
        self._more_holders: dict[Hashable, int] = {}  # of names of several blocks: how many more than one
        self.names = self._places.keys()
        self._evicted = 0
        self.dropped = 0

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        num_blocks: int,
        block_tokens: int,
        identity: int,
        incarnation: int,
        recomputed_blocks: int = 0,
    ) -> PrefixIndexWriter:
        """Makes an empty index; one of that name is replaced, its readers keep the old one until they look again.

        Args:
            path: from `index_path`.
            num_blocks: blocks of the engine's KV cache.
            block_tokens: tokens a block.
            identity: of the hash, 63 bits.
            incarnation: of the index; readers map the file anew when the board shows another.
            recomputed_blocks: how many of the last cached blocks of a prompt the engine computes again.

        Raises:
            SettingError: `num_blocks`, `recomputed_blocks` or `identity` is out of range.
            SegmentNoSpace: the file system is full.
            SegmentError: the file cannot be made.
        """
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise SettingError(f"num_blocks is {num_blocks}: an index has 1 to {MAX_BLOCKS} blocks")
        if not 0 <= recomputed_blocks <= num_blocks:
            raise SettingError(f"recomputed_blocks is {recomputed_blocks}: choose 0 to num_blocks, {num_blocks}")
        if not 0 <= identity < 1 << 63:
            raise SettingError(f"identity is {identity}: it has 63 bits, as `PrefixHasher.identity`")
        buckets = buckets_for(num_blocks)
        words = make_file(
            *(path, buckets, f"a prefix index of {num_blocks} blocks"),
            incarnation=incarnation,
            block_tokens=block_tokens,
            identity=identity,
            recomputed_blocks=recomputed_blocks,
        )
        return cls(words, num_blocks, buckets)

    def __len__(self) -> int:
        """How many different blocks are held, dropped ones included."""
        return len(self._places)

    def insert(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks are in the cache now. A fingerprint that another block has too counts once more.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was inserted.
        """
        more = self._more_holders
        for fingerprint in _checked(fingerprints):
            if fingerprint in self._places:
                more[fingerprint] = more.get(fingerprint, 0) + 1
            else:
                self.enter(fingerprint, fingerprint)
        self.show()

    def evict(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks have left the cache. A fingerprint that is not held is ignored.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was evicted.
        """
        more = self._more_holders
        for fingerprint in _checked(fingerprints):
            if holders := more.pop(fingerprint, 0):
                self._evicted += 1
                if holders > 1:
                    more[fingerprint] = holders - 1
            elif fingerprint in self._places:
                self.leave(fingerprint)
        self.show()

    def enter(self, name: Hashable, fingerprint: int) -> None:
        """A block is in the cache that was not; unchecked, and not counted until `show`."""
        bucket = fingerprint & self._mask
        used = self._used[bucket]
        if used == _FULL:
            self._places[name] = _NO_PLACE
            self.dropped += 1
            return
        free = ~used & (used + 1)  # the lowest bit that is not set
        self._places[name] = at = TABLE - 1 + (bucket << _SHIFT) + free.bit_length()
        self._used[bucket] = used | free
        self._words[at] = fingerprint

    def leave(self, name: Hashable) -> None:
        """A block of `names` is in the cache no more; not counted until `show`."""
        at = self._places.pop(name)
        self._evicted += 1
        if at != _NO_PLACE:
            self._words[at] = 0
            self._used[at - TABLE >> _SHIFT] &= ~(1 << (at & BUCKET_WORDS - 1))

    def changes(self) -> tuple[int, int]:
        """Differs from before once a block has entered or left."""
        return len(self._places), self._evicted

    def show(self) -> None:
        """Stores the counters."""
        words, held = self._words, len(self._places)
        holders = held + sum(self._more_holders.values()) if self._more_holders else held
        words[_INSERTED], words[_EVICTED] = self._evicted + holders, self._evicted
        words[_DROPPED], words[_HELD] = self.dropped, held

    def clear(self) -> None:
        """The cache was reset: no block is held."""
        # SYNC: memset may tear a word for an instant. Half a fingerprint is the fingerprint of nothing.
        np.frombuffer(self._words, np.uint64)[TABLE:] = 0
        self._evicted += len(self._places) + sum(self._more_holders.values())
        self._used = [0] * len(self._used)
        self._places.clear()
        self._more_holders.clear()
        self.show()

    def close(self) -> None:
        """Lets go of the memory. The file stays: its readers see from the board whether the engine lives."""
        self._words.release()


class PrefixIndexReader:
    """The reading end, of one rank's index.

    Attributes:
        incarnation: which index it is; the board shows the same.
        block_tokens: tokens a block.
        identity: of the hash.
        buckets: of the table.
        recomputed_blocks: how many of the last blocks of a match the engine computes again.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.incarnation = int(words[AT["incarnation"]])
        self.block_tokens = int(words[AT["block_tokens"]])
        self.identity = int(words[AT["identity"]])
        self.buckets = int(words[AT["buckets"]])
        self.recomputed_blocks = int(words[AT["recomputed_blocks"]])
        self._mask = self.buckets - 1

    @classmethod
    def open(cls, path: Path) -> PrefixIndexReader:
        """Maps an index and checks it. Nothing read from it is trusted afterwards.

        Raises:
            SegmentInvalid: it is not an index of this version, or not this user's.
            SegmentError: it cannot be opened.
        """
        return cls(open_file(path))

    def has(self, fingerprint: int) -> bool:
        """Whether a block is held now."""
        return fingerprint in _bucket_at(self._words, _TABLE_BYTES + ((fingerprint & self._mask) << _BYTE_SHIFT))

    def match(self, fingerprints: FingerprintList, near: int = 0) -> int:
        """How many leading blocks of a prompt are held.

        It looks at ever farther blocks until one is missing, then bisects: a cache loses the ends of prompts
        first, so held blocks have no gaps but for an instant. Where one is missing in between, the answer is a
        number of blocks whose last is held and whose next is not.

        Args:
            fingerprints: of the prompt's blocks, such as an array of shape (blocks,) and dtype uint64. Of those
                that are made on demand up to twice as many are made as match, or up to `near`.
            near: a guess, such as the match of another rank. If it is right, two looks are enough.
        """
        words, mask, fingerprint_at, bucket_at = self._words, self._mask, fingerprints.item, _bucket_at
        low, high = 0, len(fingerprints)
        at, stride = 0, 1
        if near > 0 and high:
            at = (near if near < high else high) - 1
            fingerprint = fingerprint_at(at)
            if fingerprint in bucket_at(words, _TABLE_BYTES + ((fingerprint & mask) << _BYTE_SHIFT)):
                low = at = at + 1
                stride = 4 if at > 2 else at + 1
            else:  # the guess was too high
                high, at = at, 0
        while low < high:
            if at >= high:
                at = high - 1
            fingerprint = fingerprint_at(at)
            if fingerprint in bucket_at(words, _TABLE_BYTES + ((fingerprint & mask) << _BYTE_SHIFT)):
                low = at + 1
                if stride:
                    at += stride
                    stride = min(4 * stride, at + 1)
                else:
                    at = low + high >> 1
            else:
                high, stride = at, 0
                at = low + high >> 1
        return low

    @property
    def table(self) -> NDArray[np.uint64]:
        """The words of the table as they are; let go of it before `close`."""
        return np.frombuffer(self._words, np.uint64)[TABLE:]

    def counters(self) -> dict[str, int]:
        """Blocks inserted, evicted and dropped since the index was made, and held now."""
        return {name: int(self._words[AT[name]]) for name in ("inserted", "evicted", "dropped", "held")}

    def close(self) -> None:
        """Lets go of the memory."""
        self._words.release()


def _checked(fingerprints: Iterable[int] | NDArray[np.uint64]) -> Sequence[int]:
    """Fingerprints as Python integers, all checked before any is used."""
    try:
        if isinstance(fingerprints, (bytes, bytearray)):  # array() would take eight bytes for a fingerprint
            raise TypeError(f"{type(fingerprints).__name__} holds none")
        if isinstance(fingerprints, np.ndarray) and fingerprints.dtype.kind == "b":
            raise TypeError("an array of bool holds none")
        given = array("Q", fingerprints.tolist() if isinstance(fingerprints, np.ndarray) else fingerprints)
        if 0 in given:
            raise ValueError("0 is the empty word")
    except (TypeError, ValueError, OverflowError) as e:
        raise SettingError(f"fingerprints are integers from 1 to 2**64 - 1 (see PrefixHasher): {e}") from None
    return given
