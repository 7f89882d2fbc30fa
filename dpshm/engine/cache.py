"""An engine's KV cache as front-ends see it: the prefix index, and the words of `cache_state`.

An engine that does prefix caching opens it once it knows how many blocks its KV cache has, and tells it of every
block that enters or leaves the cache. Front-ends then know what each rank would find cached of a prompt. Without
an index, because there is no room for it or the engine opens none, front-ends choose by load alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from operator import index

import numpy as np
from numpy.typing import NDArray

from dpshm.board.board import Board
from dpshm.board.layout import CACHE_WORDS
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexWriter
from dpshm.board.words import saturate
from dpshm.errors import HandleClosed, SegmentError, SettingError
from dpshm.rules.prefix_hash import PrefixHasher

logger = logging.getLogger(__name__)

_NUMBER_BITS = 12


class EngineCache:
    """The KV cache of one engine; `open_cache` of `dpshm.Engine` makes it. Belongs to the engine's thread.

    Attributes:
        hasher: makes the fingerprints of prompts, equal to those that front-ends look up.
        has_index: whether there is an index. Without one, `insert`, `evict` and `clear` do nothing.

    All calls raise `HandleClosed` once another `open_cache` has replaced it.
    """

    def __init__(
        self,
        board: Board,
        dp_rank: int,
        num_blocks: int,
        block_tokens: int,
        *,
        identity: int | None = None,
        number: int = 0,
        recomputed_blocks: int = 0,
    ) -> None:
        """Makes the index and shows it on the board.

        Args:
            board: the board.
            dp_rank: the rank.
            num_blocks: blocks of the KV cache.
            block_tokens: tokens a block.
            identity: of the hash, if the fingerprints are not `hasher`'s; 63 bits.
            number: which index of this engine it is, so that readers tell it from the one before.
            recomputed_blocks: how many of the last cached blocks of a prompt are computed again.

        Raises:
            SettingError: an argument is out of range. Nothing was made.
        """
        self.hasher = PrefixHasher(block_tokens, board.segment.header.prefix_key)
        self._segment = board.segment
        self._words = board.words
        self._at = {name: board.index("cache_state", dp_rank, i) for i, name in enumerate(CACHE_WORDS)}
        self._at_cached = self._at["cached_tokens"]
        self._at_in_use = self._at["blocks_in_use"]
        self._at_indexed, self._at_dropped = self._at["indexed_blocks"], self._at["dropped_blocks"]
        self._num_blocks = num_blocks
        self._cached_tokens = saturate(int(board.words[self._at_cached]))  # counts on where there was a cache
        self._replaced = False
        self._index: PrefixIndexWriter | None = None
        incarnation = int(board.engine_incarnation[dp_rank]) << _NUMBER_BITS | number & (1 << _NUMBER_BITS) - 1
        try:
            if not board.segment.linked:
                raise SegmentError("its board has no name by which front-ends could find the index")
            self._index = PrefixIndexWriter.create(
                index_path(board.segment.sockets_path, dp_rank),
                num_blocks=num_blocks,
                block_tokens=block_tokens,
                identity=self.hasher.identity if identity is None else identity,
                incarnation=incarnation,
                recomputed_blocks=recomputed_blocks,
            )
        except SegmentError as e:
            logger.log(
                logging.WARNING if board.segment.linked else logging.DEBUG,
                "rank %d has no prefix index, and requests are routed to it by load alone: %s",
                dp_rank,
                e,
            )
        words = self._words
        words[self._at["block_tokens"]] = block_tokens
        words[self._at["num_blocks"]] = num_blocks
        words[self._at_in_use] = words[self._at_indexed] = words[self._at_dropped] = 0  # of the cache before
        # SYNC: publication. The file is complete before its incarnation is stored; a reader that sees the
        # incarnation opens the file by its name, a system call, and finds that incarnation in it or none.
        words[self._at["index_incarnation"]] = incarnation if self._index is not None else 0

    @property
    def has_index(self) -> bool:
        """Whether there is an index."""
        return self._index is not None

    @property
    def index(self) -> PrefixIndexWriter | None:
        """The index, for an engine that inserts and evicts one block at a time in its own thread."""
        return self._index

    def insert(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks have been computed and are in the cache.

        Args:
            fingerprints: from `hasher.fingerprints`, of these blocks.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was inserted.
        """
        self._check()
        if self._index is not None:
            self._index.insert(fingerprints)

    def evict(self, fingerprints: Iterable[int] | NDArray[np.uint64]) -> None:
        """Blocks have left the cache. A block that several requests hold counts once for each.

        Raises:
            SettingError: a fingerprint is not an integer from 1 to 2**64 - 1. None was evicted.
        """
        self._check()
        if self._index is not None:
            self._index.evict(fingerprints)

    def clear(self) -> None:
        """The cache was reset: it holds no block."""
        self._check()
        if self._index is not None:
            self._index.clear()

    def found(self, cached_tokens: int) -> None:
        """Counts prompt tokens of a request that were found in the cache and are not computed.

        Raises:
            SettingError: they are fewer than 0. Nothing was counted.
        """
        self._check()
        if (tokens := index(cached_tokens)) < 0:
            raise SettingError(f"cached_tokens is {tokens}: give 0 or more")
        self._cached_tokens = saturate(self._cached_tokens + tokens)
        self._words[self._at_cached] = self._cached_tokens

    def show(self, *, blocks_in_use: int) -> None:
        """Stores how full the cache and the index are.

        Args:
            blocks_in_use: blocks that requests hold.

        Raises:
            SettingError: the cache has not so many blocks. Nothing was stored.
        """
        self._check()
        if not 0 <= (in_use := index(blocks_in_use)) <= self._num_blocks:
            raise SettingError(f"blocks_in_use is {in_use}: the cache has {self._num_blocks} blocks")
        words, held = self._words, self._index
        words[self._at_in_use] = in_use
        if held is not None:
            held.show()
            words[self._at_indexed], words[self._at_dropped] = len(held), held.dropped

    def close(self) -> None:
        """Takes the index away from front-ends. `dpshm.Engine.close` calls it."""
        if self._segment.usable and not self._replaced:
            self._words[self._at["index_incarnation"]] = 0
        self._let_go()

    def replace(self) -> None:
        """Another cache of this engine has taken its place: lets go of the index, and takes no further calls."""
        self._replaced = True
        self._let_go()

    def _let_go(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None

    def _check(self) -> None:
        if not self._segment.usable:
            raise self._segment.why_unusable()
        if self._replaced:
            raise HandleClosed("this cache was replaced by a later open_cache(): use engine.cache")
