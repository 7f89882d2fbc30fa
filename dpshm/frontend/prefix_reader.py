"""What a front-end knows of the ranks' caches: how much of a prompt each rank would find cached.

The prompt is hashed once for each kind of hash that the ranks use, which is one, and looked up in each rank's
index (`dpshm.board.prefix_index`). A rank without an index counts as one that has nothing cached. What front-ends
have just sent is added (`dpshm.frontend.sent_prompts`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from dpshm.board.board import Board
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexReader
from dpshm.errors import SegmentError
from dpshm.frontend.last_matches import LastMatches
from dpshm.frontend.sent_prompts import SentPrompts
from dpshm.rules.prefix_hash import FingerprintList, Fingerprints, Prompt
from dpshm.rules.prefix_samples import samples_of

logger = logging.getLogger(__name__)

_Match = Callable[[FingerprintList, int], int]

SAID_AFTER = 100
"""Requests without a prompt after which a front-end says once what it could know."""


class Lookup(NamedTuple):
    """What was found of one prompt.

    Attributes:
        cached: by rank, how many of its tokens the rank would find cached.
        samples: of its fingerprints, by tokens a block.
    """

    cached: list[int]
    samples: dict[int, Fingerprints]


class PrefixReader:
    """The prefix indexes of all ranks, as one front-end reads them. Called under the front-end's lock.

    Attributes:
        said: a prompt was looked up, or it is known that none comes, or it was logged.
    """

    def __init__(self, board: Board, frontend: int) -> None:
        self._board = board
        self._frontend = frontend
        self._key = board.segment.header.prefix_key
        self._known: list[int] = []  # by rank: the incarnation that was looked at last
        self._readers: dict[int, PrefixIndexReader] = {}
        self._kinds: dict[tuple[int, int], list[tuple[int, _Match]]] = {}  # by tokens a block and identity
        self._sent: SentPrompts | None = None  # made when a rank has an index
        self._last = LastMatches()
        self._warned = False
        self.said = False

    def refresh(self, now_ns: int, routed: int) -> None:
        """Maps the indexes of ranks that have made one since.

        Args:
            now_ns: CLOCK_MONOTONIC.
            routed: how many requests this front-end has routed.
        """
        if routed >= SAID_AFTER and not self.said and self._readers:
            self.said = True
            logger.warning(
                "front-end %d has routed %d requests without a prompt, and the ranks have prefix indexes: pass "
                "route(prompt=token_ids), or requests that share a prefix are computed on every rank. Without "
                "token ids use policy='affinity' and a key",
                *(self._frontend, routed),
            )
        board = self._board
        if self._sent is not None:
            self._sent.rows = board.frontends_used()
        shown = board.cache_state[: board.dp_size, 0].tolist()
        if shown == self._known:
            return
        for dp_rank, incarnation in enumerate(shown):
            if dp_rank >= len(self._known) or self._known[dp_rank] != incarnation:
                self._readers.pop(dp_rank, None)
                if self._sent is not None and dp_rank < len(self._known):
                    self._sent.forget(dp_rank, now_ns)
                if incarnation:
                    self._open(dp_rank, incarnation)
        for dp_rank in range(len(shown), len(self._known)):
            self._readers.pop(dp_rank, None)
        self._known = shown
        self._kinds = {}
        for dp_rank, reader in self._readers.items():
            self._kinds.setdefault((reader.block_tokens, reader.identity), []).append((dp_rank, reader.match))

    def look_up(self, prompt: Prompt, prompt_tokens: int, now_ns: int | None = None) -> Lookup:
        """How much of a prompt each rank would find cached; at least one token is always computed.

        Args:
            prompt: the prompt.
            prompt_tokens: how many tokens it has.
            now_ns: CLOCK_MONOTONIC: what front-ends sent to a rank a moment before counts as cached there.
                None: only what the ranks' indexes hold.
        """
        self.said = True
        samples: dict[int, Fingerprints] = {}
        blocks = self._match(prompt, samples if now_ns is not None else None)
        if now_ns is not None and self._sent is not None:
            for size, found in blocks.items():
                if size in samples:
                    self._sent.extend(found, samples[size], now_ns)
                    self._last.note(samples[size], found)
        cached, most = [0] * self._board.dp_size, max(0, prompt_tokens - 1)
        for size, by_rank in blocks.items():
            for dp_rank, matched in enumerate(by_rank):
                if matched > 0 and (tokens := (matched - self._readers[dp_rank].recomputed_blocks) * size) > 0:
                    cached[dp_rank] = tokens if tokens < most else most
        return Lookup(cached, samples)

    def _match(self, prompt: Prompt, samples: dict[int, Fingerprints] | None) -> dict[int, list[int]]:
        """By tokens a block, which all ranks should agree on, and by rank: how many blocks of a prompt it holds.

        Args:
            prompt: the prompt.
            samples: gets those of the prompt, by tokens a block, for which the last matches are known. None: the
                prompt has none, and nothing is guessed.
        """
        blocks: dict[int, list[int]] = {}
        count, key = self._board.dp_size, self._key
        for (size, identity), readers in self._kinds.items():
            fingerprints = prompt.fingerprints(size, identity, key)
            if fingerprints is None:
                continue
            guesses: list[int] = []
            if samples is not None:
                samples[size] = samples_of(prompt.token_fingerprints(size, key)[: len(fingerprints)])
                guesses = self._last.guess(samples[size])
            guessed, near = len(guesses), 0
            found = blocks.setdefault(size, [-1] * count)
            for dp_rank, match in readers:
                if dp_rank < count:
                    if dp_rank < guessed:
                        near = guesses[dp_rank]
                    found[dp_rank] = near = match(fingerprints, near)
        return blocks

    def sent(self, lookup: Lookup, dp_rank: int, now_ns: int) -> None:
        """The prompt of a lookup goes to a rank.

        Args:
            lookup: from `look_up` with a time.
            dp_rank: the rank.
            now_ns: CLOCK_MONOTONIC.
        """
        reader = self._readers.get(dp_rank)
        if reader is not None and self._sent is not None and reader.block_tokens in lookup.samples:
            self._sent.add(dp_rank, lookup.samples[reader.block_tokens], now_ns)

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
            if self._sent is None:
                self._sent = SentPrompts.open(self._board, self._frontend)
                self._sent.rows = self._board.frontends_used()
