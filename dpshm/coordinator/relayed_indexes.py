"""Prefix indexes of ranks of other nodes: a copy of each on this node, which front-ends open as each other index.

A copy holds what was told since it was made. Messages are numbered within a pass (`dpshm.net.relay_wire`). Where
one is missing, and where the copy is new, another pass is asked for, until one was heard from its beginning and
nothing after it was missed. What a copy lacks meanwhile counts as not cached.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from dpshm.board.layout import CACHE_WORDS
from dpshm.board.prefix_copy import IndexCopy
from dpshm.board.prefix_file import index_path
from dpshm.errors import SegmentError, WireError
from dpshm.net.relay_wire import Wanted
from dpshm.rules.liveness import REMOTE_INTERVAL_NS

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.net.relay_wire import IndexNews, News

logger = logging.getLogger(__name__)

_SHOWN = CACHE_WORDS.index("index_incarnation")
_INCARNATION_BITS = 61


class _Copy:
    """What is known of one copy.

    Attributes:
        of: board and index that it is of.
        pass_, number: of the newest message.
        whole: nothing was missed since the pass began.
    """

    def __init__(self, of: tuple[int, int], copy: IndexCopy | None) -> None:
        self.of, self.copy = of, copy
        self.pass_ = self.number = self.asked_ns = 0
        self.whole = False


class RelayedIndexes:
    """Writes copies of indexes. Used under the relay's lock.

    Attributes:
        wanted: passes to ask for.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._copies: dict[int, _Copy] = {}
        self.wanted: list[Wanted] = []

    def forget(self, e: int) -> None:
        """Another process has the rank, or it has no index any more."""
        self._copies.pop(e, None)
        self._board.words[self._board.index("cache_state", e, _SHOWN)] = 0

    def write(self, news: News, said: IndexNews, now_ns: int) -> None:
        """Writes what is told of an index of a rank whose row is that node's.

        Args:
            news: what it is a part of.
            said: of one index.
            now_ns: CLOCK_MONOTONIC.

        Raises:
            WireError: it says words that the index does not have. They were not written.
        """
        if not said.index:
            if said.rank in self._copies:
                self.forget(said.rank)
            return
        copy = self._copies.get(said.rank)
        if copy is None or copy.of != (news.board, said.index):
            copy = self._begin(news, said)
        if copy.copy is None:
            return  # there was no room for it
        part = said.part
        if said.pass_ != copy.pass_:
            copy.pass_, copy.number, copy.whole = said.pass_, 0, True
        copy.whole = copy.whole and said.number == copy.number + part.says
        copy.number = said.number
        try:
            copy.copy.write(part)
        except IndexError as e:
            raise WireError(f"of the prefix index of rank {said.rank}: {e}") from e
        if not copy.whole and now_ns - copy.asked_ns >= REMOTE_INTERVAL_NS:
            copy.asked_ns = now_ns
            self.wanted.append(Wanted(news.board, said.rank, said.index, said.pass_))

    def _begin(self, news: News, said: IndexNews) -> _Copy:
        """Makes an empty copy, and shows it."""
        self.forget(said.rank)
        incarnation = 1 + secrets.randbits(_INCARNATION_BITS)
        block_tokens, identity, buckets, recomputed_blocks = said.header
        made = None
        try:
            made = IndexCopy(
                *(index_path(self._board.segment.sockets_path, said.rank), buckets),
                incarnation=incarnation,
                block_tokens=block_tokens,
                identity=identity,
                recomputed_blocks=recomputed_blocks,
            )
            # SYNC: as an engine shows its index (`dpshm.engine.cache`): the file is complete before.
            self._board.words[self._board.index("cache_state", said.rank, _SHOWN)] = incarnation
        except SegmentError as e:
            logger.warning("what rank %d has cached is not known on this node: %s", said.rank, e)
        copy = self._copies[said.rank] = _Copy((news.board, said.index), made)
        return copy
