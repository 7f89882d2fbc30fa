"""What is on its way, by rank: the sum over front-ends of what they sent and the engine has not received.

A decision needs this over all pairs of engine and front-end, in words that lie apart: a front-end's counts are
in its row, an engine's in another. `Unseen` is made once for the front-ends that count and gathers the words
with precomputed indices into two dense arrays, whose difference and sum are then one numpy call each, so that 8
engines and 1024 go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpshm.board import Board, Words
from dpshm.policies import VECTOR_FROM


class Unseen:
    """Counts one pair of columns. Not to be used by two threads at once: its buffers are its own.

    Args:
        board: the board.
        sent: the column [front-end, engine] of what was sent.
        received: the column [engine, front-end] of what was received.
        frontends: the rows that count.
        num_engines: ranks.
    """

    def __init__(self, board: Board, sent: str, received: str, frontends: Sequence[int], num_engines: int) -> None:
        words = np.ndarray((len(board.words),), np.int64, board.words.cast("B"))
        self._take = words.take
        engines = np.arange(num_engines)
        shape = (len(frontends), num_engines)
        at_sent = np.array([board.index(sent, f) for f in frontends], np.intp)
        at_received = np.array([board.index(received, e) for e in range(num_engines)], np.intp)
        self._at_sent = (at_sent[:, None] + engines).ravel()
        self._at_received = (np.array(frontends, np.intp)[:, None] + at_received).ravel()
        self._sent = np.empty(shape[0] * shape[1], np.int64)
        self._received = np.empty_like(self._sent)
        self._difference = self._sent.reshape(shape)
        self._zeros = np.zeros_like(self._sent)
        # The sum over rows: of few columns a product with ones is faster, of many a reduction.
        self._ones = np.ones(shape[0], np.int64) if num_engines < VECTOR_FROM else None

    def count(self) -> Words:
        """By rank; a negative difference counts as 0. The array is the caller's."""
        sent, received = self._sent, self._received
        # SYNC: rule 3: all of `sent` is loaded before any of `received`, and both before the caller loads the
        # loads. Each take() has copied its words, one 64-bit access each, when it returns.
        self._take(self._at_sent, 0, sent, "clip")
        self._take(self._at_received, 0, received, "clip")
        np.subtract(sent, received, sent)
        np.maximum(sent, self._zeros, out=sent)
        if self._ones is not None:
            return self._ones.dot(self._difference)  # type: ignore[no-any-return]
        return np.add.reduce(self._difference, 0)  # type: ignore[no-any-return]
