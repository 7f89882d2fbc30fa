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

import mmap
import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpshm.board.files import NO_SPACE
from dpshm.board.layout import PAGE_BYTES, WORD_BYTES
from dpshm.errors import SegmentError, SegmentInvalid, SegmentNoSpace, SettingError
from dpshm.rules.prefix_hash import FingerprintList

MAGIC = int.from_bytes(b"DPSHMPFX", "little") & ((1 << 63) - 1)
VERSION = 1
BUCKET_WORDS = 16
WORDS_A_BLOCK = 4
MAX_BLOCKS = 1 << 26
HEADER_WORDS = (
    "magic",
    "version",
    "incarnation",
    "buckets",
    "block_tokens",
    "identity",
    "inserted",
    "evicted",
    "dropped",
    "held",
    "recomputed_blocks",
)
_AT = {name: i for i, name in enumerate(HEADER_WORDS)}
_INSERTED, _EVICTED, _DROPPED, _HELD = (_AT[name] for name in ("inserted", "evicted", "dropped", "held"))
_TABLE = PAGE_BYTES // WORD_BYTES
_FULL = (1 << BUCKET_WORDS) - 1
_SHIFT = BUCKET_WORDS.bit_length() - 1
_NO_PLACE = -1


def index_path(folder: Path, dp_rank: int) -> Path:
    """The index of a rank, in the folder of its group's sockets."""
    return folder / f"prefix-{dp_rank}"


def buckets_for(num_blocks: int) -> int:
    """How many buckets an index of that many blocks has: a power of two, at least 4 words a block."""
    words = max(BUCKET_WORDS, num_blocks * WORDS_A_BLOCK)
    return 1 << (-(-words // BUCKET_WORDS) - 1).bit_length()


class PrefixIndexWriter:
    """The writing end, of one engine. It belongs to the thread that runs the scheduler.

    Attributes:
        num_blocks: blocks of the KV cache; the index has room for more.
        dropped: blocks that found no place.
    """

    def __init__(self, mapped: mmap.mmap, num_blocks: int, buckets: int) -> None:
        self.num_blocks = num_blocks
        self._words = memoryview(mapped).cast("Q")
        self._mask = buckets - 1
        self._used = [0] * buckets  # by bucket, one bit a word
        self._places: dict[int, int] = {}  # fingerprint -> index of its word, or _NO_PLACE
        self._more_holders: dict[int, int] = {}  # of fingerprints of several blocks: how many more than one
        self._inserted = self._evicted = 0
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
            SettingError: `num_blocks` or `recomputed_blocks` is out of range.
            SegmentNoSpace: the file system is full.
            SegmentError: the file cannot be made.
        """
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise SettingError(f"num_blocks is {num_blocks}: an index has 1 to {MAX_BLOCKS} blocks")
        if recomputed_blocks < 0:
            raise SettingError(f"recomputed_blocks is {recomputed_blocks}: choose 0 or more")
        buckets = buckets_for(num_blocks)
        size = PAGE_BYTES + buckets * BUCKET_WORDS * WORD_BYTES
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                # With ftruncate alone a full tmpfs would kill the engine with SIGBUS later.
                os.posix_fallocate(fd, 0, size)
                mapped = mmap.mmap(fd, size)
            finally:
                os.close(fd)
            writer = cls(mapped, num_blocks, buckets)
            for name, value in (
                ("version", VERSION),
                ("incarnation", incarnation),
                ("buckets", buckets),
                ("block_tokens", block_tokens),
                ("identity", identity),
                ("recomputed_blocks", recomputed_blocks),
                ("magic", MAGIC),
            ):
                writer._words[_AT[name]] = value
            # SYNC: publication. The name appears only now; rename(2) is a system call that orders the stores
            # above.
            draft.replace(path)
        except OSError as e:
            with suppress(OSError):
                draft.unlink()
            if e.errno in NO_SPACE:
                raise SegmentNoSpace(
                    f"{path.parent} has no room for a prefix index of {size // 1024} KiB ({num_blocks} blocks): "
                    "free some, enlarge it (containers: --shm-size), or set DPSHM_DIR to another tmpfs"
                ) from e
            raise SegmentError(f"cannot make the prefix index {path}: {e.strerror}") from e
        return writer

    def __len__(self) -> int:
        """How many different blocks are held, dropped ones included."""
        return len(self._places)

    def insert(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks are in the cache now. A fingerprint that another block has too counts once more.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was inserted.
        """
        for fingerprint in _checked(fingerprints):
            self.insert_one(fingerprint)

    def evict(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks have left the cache. A fingerprint that is not held is ignored.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was evicted.
        """
        for fingerprint in _checked(fingerprints):
            self.evict_one(fingerprint)

    def insert_one(self, fingerprint: int) -> None:
        """`insert` of one fingerprint, unchecked: for an engine that makes its fingerprints itself."""
        words, places = self._words, self._places
        self._inserted += 1
        words[_INSERTED] = self._inserted
        if fingerprint in places:
            self._more_holders[fingerprint] = self._more_holders.get(fingerprint, 0) + 1
            return
        bucket = fingerprint & self._mask
        used = self._used[bucket]
        if used == _FULL:
            places[fingerprint] = _NO_PLACE
            self.dropped += 1
            words[_DROPPED] = self.dropped
        else:
            free = ~used & (used + 1)  # the lowest bit that is not set
            at = _TABLE + (bucket << _SHIFT) + free.bit_length() - 1
            words[at] = fingerprint
            self._used[bucket] = used | free
            places[fingerprint] = at
        words[_HELD] = len(places)

    def evict_one(self, fingerprint: int) -> None:
        """`evict` of one fingerprint, unchecked."""
        words = self._words
        if self._more_holders and (more := self._more_holders.pop(fingerprint, 0)):
            if more > 1:
                self._more_holders[fingerprint] = more - 1
        else:
            at = self._places.pop(fingerprint, None)
            if at is None:
                return
            if at != _NO_PLACE:
                words[at] = 0
                self._used[at - _TABLE >> _SHIFT] &= ~(1 << (at & BUCKET_WORDS - 1))
            words[_HELD] = len(self._places)
        self._evicted += 1
        words[_EVICTED] = self._evicted

    def clear(self) -> None:
        """The cache was reset: no block is held."""
        # SYNC: memset may tear a word for an instant. Half a fingerprint is the fingerprint of nothing.
        np.frombuffer(self._words, np.uint64)[_TABLE:] = 0
        self._evicted += len(self._places) + sum(self._more_holders.values())
        self._used = [0] * len(self._used)
        self._places.clear()
        self._more_holders.clear()
        self._words[_EVICTED] = self._evicted
        self._words[_HELD] = 0

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
        self.incarnation = int(words[_AT["incarnation"]])
        self.block_tokens = int(words[_AT["block_tokens"]])
        self.identity = int(words[_AT["identity"]])
        self.buckets = int(words[_AT["buckets"]])
        self.recomputed_blocks = int(words[_AT["recomputed_blocks"]])
        self._mask = self.buckets - 1

    @classmethod
    def open(cls, path: Path) -> PrefixIndexReader:
        """Maps an index and checks it. Nothing read from it is trusted afterwards.

        Raises:
            SegmentInvalid: it is not an index of this version, or not this user's.
            SegmentError: it cannot be opened.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as e:
            raise SegmentError(f"cannot open the prefix index {path}: {e.strerror}") from e
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise SegmentInvalid(
                    f"{path} is not a file that uid {os.geteuid()} alone may read (uid {info.st_uid}, mode "
                    f"{stat.filemode(info.st_mode)}): it is not used. Remove it"
                )
            if info.st_size <= PAGE_BYTES:
                raise SegmentInvalid(f"{path} has {info.st_size} bytes: it is no prefix index. Remove it")
            words = memoryview(mmap.mmap(fd, info.st_size, access=mmap.ACCESS_READ)).cast("Q")
        finally:
            os.close(fd)
        buckets, block_tokens = int(words[_AT["buckets"]]), int(words[_AT["block_tokens"]])
        if words[_AT["magic"]] != MAGIC or words[_AT["version"]] != VERSION:
            raise SegmentInvalid(f"{path} is not a prefix index of version {VERSION}: use one dpshm for the group")
        if (
            buckets & (buckets - 1)
            or info.st_size != PAGE_BYTES + buckets * BUCKET_WORDS * WORD_BYTES
            or not 1 <= block_tokens < 1 << 31
        ):
            raise SegmentInvalid(
                f"{path} has {info.st_size} bytes and its header says {buckets} buckets: remove it"
            )
        return cls(words)

    def has(self, fingerprint: int) -> bool:
        """Whether a block is held now."""
        at = _TABLE + ((fingerprint & self._mask) << _SHIFT)
        return fingerprint in self._words[at : at + BUCKET_WORDS].tolist()

    def match(self, fingerprints: FingerprintList, growth: int = 4, near: int = 0) -> int:
        """How many leading blocks of a prompt are held.

        It looks at ever farther blocks until one is missing, then bisects: a cache loses the ends of prompts
        first, so held blocks have no gaps but for an instant. Where one is missing in between, the answer is a
        number of blocks whose last is held and whose next is not.

        Args:
            fingerprints: of the prompt's blocks, such as an array of shape (blocks,) and dtype uint64.
            growth: by what factor each stride is longer than the one before. Fingerprints that are made on demand
                are made up to the last stride's end: with 2, up to twice as many as match.
            near: a guess, such as the match of another rank. If it is right, two looks are enough.
        """
        words, mask, fingerprint_at = self._words, self._mask, fingerprints.item
        low, high = 0, len(fingerprints)
        at, stride = (near - 1, 1) if near > 0 else (0, growth)
        while low < high:
            if at >= high:
                at = high - 1
            fingerprint = fingerprint_at(at)
            bucket = _TABLE + ((fingerprint & mask) << _SHIFT)
            if fingerprint in words[bucket : bucket + BUCKET_WORDS].tolist():
                low = at + 1
                at = low + stride - 1 if stride else low + high >> 1
                stride *= growth
            elif near > 0 and not low:  # the guess was too high
                high, at, stride, near = at, 0, growth, 0
            else:
                high, stride = at, 0
                at = low + high >> 1
        return low

    def counters(self) -> dict[str, int]:
        """Blocks inserted, evicted and dropped since the index was made, and held now."""
        return {name: int(self._words[_AT[name]]) for name in ("inserted", "evicted", "dropped", "held")}

    def close(self) -> None:
        """Lets go of the memory."""
        self._words.release()


def _checked(fingerprints: Iterable[int] | NDArray[np.uint64]) -> Sequence[int]:
    """Fingerprints as Python integers, all checked before any is used."""
    try:
        given = array("Q", fingerprints.tolist() if isinstance(fingerprints, np.ndarray) else fingerprints)
        if 0 in given:
            raise ValueError("0 is the empty word")
    except (TypeError, ValueError, OverflowError) as e:
        raise SettingError(f"fingerprints are integers from 1 to 2**64 - 1 (see PrefixHasher): {e}") from None
    return given
