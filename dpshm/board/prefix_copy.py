"""A prefix index on another node: what changed in one, and a copy that follows it.

The one who tells compares the table with what it told last, in slices, and so needs nothing of the engine. A word
that changed is told as its place and its value. A *pass* tells the table from its first word to its last, slice by
slice, each with all that is in it; so a copy that missed something is right once it has heard a pass, and keeps
what it has meanwhile.

SYNC: as for a reader of the index, each word is loaded and stored whole, and their order is of no account.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpshm.board.prefix_file import BUCKET_WORDS, TABLE, make_file
from dpshm.board.prefix_index import PrefixIndexReader

SLICE_WORDS = 1 << 17
"""So many words of a table are compared in one look: an index of 32,768 blocks."""
Words = NDArray[np.uint64]


class Part(NamedTuple):
    """Words of a table.

    Attributes:
        begin, end: all words from `begin` to `end` that are not in `places` are empty; equal: nothing is said.
        places: of some words in the table, shape (n,), dtype uint32.
        words: their values, shape (n,), dtype uint64.
    """

    begin: int
    end: int
    places: NDArray[np.uint32]
    words: Words

    @property
    def says(self) -> bool:
        """Whether it says anything."""
        return self.end > self.begin or len(self.places) > 0


class Followed:
    """An index of this node, and what was told of it.

    Args:
        reader: of the index; `close` closes it.
    """

    def __init__(self, reader: PrefixIndexReader) -> None:
        self.reader = reader
        self._table = reader.table
        self._told = self._table.copy()
        self._at = self._passed = 0
        self._counts: tuple[int, int] | None = None
        self._at_rest = False

    def changes(self, most: int) -> Part:
        """Up to `most` words that changed in the next slice."""
        if self._at == 0:
            counters = self.reader.counters()
            counts = counters["inserted"], counters["evicted"]
            # A count may be seen before the words that it counts: the table is looked through once more.
            if counts == self._counts and self._at_rest:
                return _part(0, 0, self._told[:0], np.empty(0, np.intp))
            self._counts, self._at_rest = counts, counts == self._counts
        begin, now = self._at, self._table[self._at : self._at + SLICE_WORDS].copy()
        places = np.flatnonzero(now != self._told[begin : begin + len(now)])
        size = len(now)
        if len(places) > most:
            size, places = int(places[most]), places[:most]
        self._told[begin + places] = now[places]
        self._at = begin + size if begin + size < len(self._table) else 0
        return _part(0, 0, now[places], begin + places)

    @property
    def passes(self) -> bool:
        """Whether a pass is under way."""
        return self._passed < len(self._table)

    def begin_pass(self) -> None:
        """The next call of `next_slice` begins with the first word."""
        self._passed = 0

    def next_slice(self, most: int) -> Part:
        """The next slice of a pass, with up to `most` words that are not empty."""
        begin, now = self._passed, self._table[self._passed : self._passed + SLICE_WORDS].copy()
        places = np.flatnonzero(now)
        size = len(now)
        if len(places) > most:
            size, places = int(places[most]), places[:most]
        self._told[begin : begin + size] = now[:size]
        self._passed = begin + size
        return _part(begin, begin + size, now[places], begin + places)

    def close(self) -> None:
        """Lets go of the index."""
        del self._table
        self.reader.close()


def _part(begin: int, end: int, words: Words, places: NDArray[np.intp]) -> Part:
    return Part(begin, end, places.astype(np.uint32), words)


class IndexCopy:
    """A copy on this node, empty when it is made. Front-ends open it as each other index.

    Args:
        path: from `index_path`.
        buckets: of the table, a power of two.
        header: other words of its header.

    Raises:
        SegmentNoSpace: the file system is full.
        SegmentError: the file cannot be made.
    """

    def __init__(self, path: Path, buckets: int, **header: int) -> None:
        what = f"a copy of a prefix index of {buckets * BUCKET_WORDS} words"
        self._table = np.frombuffer(make_file(path, buckets, what, **header), np.uint64)[TABLE:]

    def write(self, part: Part) -> None:
        """Writes what was told.

        Raises:
            IndexError: a place is not in the table. Nothing was written.
        """
        whole = part.end > part.begin
        low, high = (part.begin, part.end) if whole else (0, len(self._table))
        places = part.places.astype(np.intp)
        if high > len(self._table) or (len(places) and not low <= places.min() <= places.max() < high):
            raise IndexError(
                f"places must be from {low} to {high - 1}, and the table has {len(self._table)} words"
            )
        if whole:
            words = np.zeros(high - low, np.uint64)
            words[places - low] = part.words
            self._table[low:high] = words
        else:
            self._table[places] = part.words
