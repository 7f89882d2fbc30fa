"""What a front-end knows of the ranks' caches: how much of a prompt each rank would find cached.

The prompt is hashed once for each kind of hash that the ranks use, which is one, and looked up in each rank's
index (`dpshm.board.prefix_index`). A rank without an index counts as one that has nothing cached.
"""

from __future__ import annotations

import logging

from dpshm.board.board import Board
from dpshm.board.prefix_index import PrefixIndexReader, index_path
from dpshm.errors import SegmentError
from dpshm.frontend.sent_prompts import SentPrompts
from dpshm.rules.prefix_hash import Prompt

logger = logging.getLogger(__name__)


class PrefixReader:
    """The prefix indexes of all ranks, as one front-end reads them. Called under the front-end's lock."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._key = board.segment.header.prefix_key
        self._known: list[int] = []  # by rank: the incarnation that was looked at last
        self._readers: dict[int, PrefixIndexReader] = {}
        self._sent = SentPrompts()
        self._warned = False

    def refresh(self) -> None:
        """Maps the indexes of ranks that have made one since."""
        board = self._board
        shown = board.cache_state[: board.dp_size, 0].tolist()
        if shown == self._known:
            return
        for dp_rank, incarnation in enumerate(shown):
            if dp_rank >= len(self._known) or self._known[dp_rank] != incarnation:
                self._readers.pop(dp_rank, None)
                self._sent.forget(dp_rank)
                if incarnation:
                    self._open(dp_rank, incarnation)
        for dp_rank in range(len(shown), len(self._known)):
            self._readers.pop(dp_rank, None)
        self._known = shown

    def sent(self, prompt: Prompt, dp_rank: int, now_ns: int) -> None:
        """The prompt goes to that rank."""
        if (reader := self._readers.get(dp_rank)) is not None:
            fingerprints = prompt.fingerprints(reader.block_tokens, reader.identity, self._key)
            if fingerprints is not None:
                self._sent.add(dp_rank, fingerprints, now_ns)

    def cached(self, prompt: Prompt, prompt_tokens: int, now_ns: int | None = None) -> list[int]:
        """By rank, how many of the prompt's tokens the rank would find cached; at least one is always computed.

        Args:
            prompt: the prompt.
            prompt_tokens: how many tokens it has.
            now_ns: CLOCK_MONOTONIC: what this front-end sent to a rank a moment before counts as cached there.
                None: only what the ranks' indexes hold.
        """
        found = [0] * self._board.dp_size
        most = max(0, prompt_tokens - 1)
        for dp_rank, reader in self._readers.items():
            fingerprints = prompt.fingerprints(reader.block_tokens, reader.identity, self._key)
            if fingerprints is not None and dp_rank < len(found):
                blocks = reader.match(fingerprints, prompt.growth)
                if now_ns is not None:
                    blocks = self._sent.match(dp_rank, fingerprints, blocks, now_ns)
                found[dp_rank] = min(most, blocks * reader.block_tokens)
        return found

    def _open(self, dp_rank: int, incarnation: int) -> None:
        try:
            reader = PrefixIndexReader.open(index_path(self._board.segment.sockets_path, dp_rank))
        except SegmentError as e:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the prefix index of rank %d is not used: %s. Further ones are not logged", dp_rank, e
                )
            return
        # A file of another incarnation is one that the engine has just replaced: the board tells of the next soon.
        if reader.incarnation == incarnation:
            self._readers[dp_rank] = reader
