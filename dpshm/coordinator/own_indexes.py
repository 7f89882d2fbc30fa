"""What a node tells the others of its ranks' prefix indexes: what changed, and a whole pass to one who asks.

Bounded: at most `WORDS_A_LOOK` words of 12 bytes in `LOOK_NS`, of all ranks together, which is 1 MB a second. If
more changes, it is told later. A look compares a slice of each index that changed (`dpshm.board.prefix_copy`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dpshm.board.prefix_copy import Followed, Part
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexReader
from dpshm.errors import SegmentError
from dpshm.net.relay_wire import IndexNews

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dpshm.board.board import Board
    from dpshm.net.relay_wire import Wanted

logger = logging.getLogger(__name__)

LOOK_NS = 50_000_000
WORDS_A_LOOK = 4096
WORDS_A_MESSAGE = 1024
"""Rows that follow such a message wait for 12 KB."""
_PLACE_BYTES = 4


class _Index:
    """One index that is told.

    Attributes:
        pass_, number: as `IndexNews` has them.
        again: who follows it asked for another pass.
    """

    def __init__(self, dp_rank: int, reader: PrefixIndexReader, now_ns: int) -> None:
        self.dp_rank, self.index = dp_rank, reader.incarnation
        self._header = reader.block_tokens, reader.identity, reader.buckets, reader.recomputed_blocks
        self.followed = Followed(reader)
        self.pass_, self.number, self.again = now_ns, 0, False

    def begin_pass_if_asked(self, now_ns: int) -> None:
        """Once the one that is under way has ended."""
        if self.again and not self.followed.passes:
            self.followed.begin_pass()
            self.pass_, self.number, self.again = max(self.pass_ + 1, now_ns), 0, False

    def news(self, part: Part | None = None) -> IndexNews:
        """A message with these words, or with none."""
        said = IndexNews(self.dp_rank, self.index, self.pass_, self.number, self._header)
        if part is None:
            return said
        self.number += 1
        return IndexNews(
            *(self.dp_rank, self.index, self.pass_, self.number, self._header, part.begin, part.end),
            places=part.places.astype("<u4").tobytes(),
            words=part.words.astype("<u8").tobytes(),
        )


def in_messages(told: list[IndexNews]) -> list[list[IndexNews]]:
    """What goes in one message each, in the same order: as many as have `WORDS_A_MESSAGE` words."""
    messages: list[list[IndexNews]] = []
    left = 0
    for said in told:
        size = len(said.places)
        if not messages or size > left:
            messages.append([])
            left = _PLACE_BYTES * WORDS_A_MESSAGE
        messages[-1].append(said)
        left -= size
    return messages


class OwnIndexes:
    """Looks at the indexes of this node's ranks. For one thread; `want` under the relay's lock."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._indexes: dict[int, _Index] = {}
        self._gone: set[int] = set()  # ranks that had an index
        self._refused: dict[int, int] = {}  # by rank: an index that cannot be read
        self._next_ns = 0
        self._first = 0

    def want(self, wanted: Wanted) -> None:
        """Another node asks for a pass."""
        index = self._indexes.get(wanted.rank)
        if index is not None and (index.index, index.pass_) == (wanted.index, wanted.pass_):
            index.again = True

    def look(self, ranks: Iterable[int], now_ns: int, *, due: bool) -> list[IndexNews]:
        """What there is to tell.

        Args:
            ranks: of this node.
            now_ns: CLOCK_MONOTONIC.
            due: says of each index at least how many messages there were.
        """
        if not due and now_ns < self._next_ns:
            return []
        self._next_ns = now_ns + LOOK_NS
        self._find(set(ranks), now_ns)
        told: list[IndexNews] = []
        left = WORDS_A_LOOK
        indexes = list(self._indexes.values())
        self._first += 1  # each of them is the first in its turn
        for i in range(len(indexes)):
            index = indexes[(self._first + i) % len(indexes)]
            index.begin_pass_if_asked(now_ns)
            before = len(told)
            left -= self._tell(index, left, told)
            if due and len(told) == before:
                told.append(index.news())
        if due:
            told += [IndexNews(dp_rank, 0, 0, 0) for dp_rank in self._gone]
        return told

    def _tell(self, index: _Index, most: int, told: list[IndexNews]) -> int:
        """Appends up to so many words of one index; returns how many."""
        said, followed = 0, index.followed
        looks = (followed.changes, followed.next_slice) if followed.passes else (followed.changes,)
        for look in looks:
            full = True
            while full and said < most:  # what is in the next slice is told after the next look
                part = look(room := min(WORDS_A_MESSAGE, most - said))
                full = len(part.places) == room
                said += len(part.places)
                if part.says:
                    told.append(index.news(part))
        return said

    def _find(self, ranks: set[int], now_ns: int) -> None:
        """Opens the indexes of ranks that have made one since."""
        shown = self._board.cache_state[:, 0]
        for dp_rank in [*self._indexes]:
            if dp_rank not in ranks or int(shown[dp_rank]) != self._indexes[dp_rank].index:
                self._indexes.pop(dp_rank).followed.close()
                self._gone.add(dp_rank)
        self._gone &= ranks
        for dp_rank in ranks:
            index = int(shown[dp_rank])
            if index <= 0 or dp_rank in self._indexes or self._refused.get(dp_rank) == index:
                continue
            try:
                reader = PrefixIndexReader.open(index_path(self._board.segment.sockets_path, dp_rank))
            except SegmentError as e:
                self._refused[dp_rank] = index
                logger.warning("the prefix index of rank %d is not told to other nodes: %s", dp_rank, e)
                continue
            # A file of another incarnation is one that the engine has just replaced: the board tells soon.
            if reader.incarnation == index:
                self._indexes[dp_rank] = _Index(dp_rank, reader, now_ns)
                self._gone.discard(dp_rank)
