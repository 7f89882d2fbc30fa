"""The words of one rank of another node on this node's board: where they are, and how its relay's news are stored.

Counts of a pair have the numbering of the board on the rank's node. So what a front-end of this node sent is told
less a base, and what the rank received of it is stored plus that base (`dpshm.coordinator.relayed_rows`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dpshm.board.carried import carried_places
from dpshm.board.layout import CARRIED_WORDS, REMOTE_WORDS, STEP_WORDS
from dpshm.board.words import COUNT_MASK, saturate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dpshm.board.board import Board
    from dpshm.net.relay_wire import EngineNews

_STEP_TIMES = (
    CARRIED_WORDS.index(("step_start", 0)),
    CARRIED_WORDS.index(("step_model", STEP_WORDS.index("step_end"))),
)


class RelayedWords:
    """Of one rank.

    Attributes:
        heard, report, process, home, delay: where the items of `layout.REMOTE_WORDS` are.
        incarnation, clock: where its incarnation and its time namespace are.
        base_requests, base_tokens: where its bases begin, one for each front-end.
    """

    def __init__(self, board: Board, e: int) -> None:
        self._words, self._frontends = board.words, board.frontends
        self._flat: NDArray[np.int64] = np.asarray(board.words)
        self._carried = np.array(carried_places(board, e))
        names = ("heard", "heard_report", "heard_process", "home", "delay")
        state = (board.index("remote_state", e, REMOTE_WORDS.index(name)) for name in names)
        self.heard, self.report, self.process, self.home, self.delay = state
        self.incarnation, self.clock = (
            board.index("engine_incarnation", e),
            board.index("engine_time_namespace", e),
        )
        self.base_requests, self.base_tokens = board.index("base_requests", e), board.index("base_tokens", e)
        self._beat = board.index("beat", e)
        self._request_offset, self._token_offset = board.index("request_offset", e), board.index("token_offset", e)
        self._requests, self._tokens = board.index("received_requests", e), board.index("received_tokens", e)
        self._bases: tuple[int, int] | None = None  # the sums of both

    def forget(self) -> None:
        """The bases change."""
        self._bases = None

    def store(self, said: EngineNews, values: NDArray[np.int64], shift_ns: int) -> None:
        """Stores what is told of the rank.

        Args:
            said: of this rank.
            values: its words as an array, which is changed.
            shift_ns: from the sender's clock to this one.
        """
        words = self._words
        for i in _STEP_TIMES:
            if value := int(values[i]):
                values[i] = max(1, saturate(value + shift_ns))
        # SYNC: in the engine's place, and in its order: tokens, then requests received, then the offsets. A reader
        # loads an offset before the counts (`LiveOutstanding`). The load follows at once: until then a reader may
        # see the sums of one publication beside the load of another, as at an engine.
        for received in said.received:
            if received.frontend < self._frontends:
                self.store_received(received.frontend, received.requests, received.tokens)
        bases = self._bases or self._sum_bases()
        words[self._request_offset] = said.request_offset - bases[0]
        words[self._token_offset] = said.token_offset - bases[1]
        # SYNC: each word is stored once, in one 64-bit access, in the order of `layout.CARRIED_WORDS`.
        self._flat[self._carried] = values
        words[self._beat] = saturate(said.beat + shift_ns)

    def store_received(self, f: int, requests: int, tokens: int) -> None:
        """Stores what the rank received from one front-end, in the numbering of its own board."""
        words = self._words
        requests += words[self.base_requests + f]
        tokens += words[self.base_tokens + f]
        words[self._tokens + f] = tokens if 0 <= tokens <= COUNT_MASK else _clamped(tokens)
        words[self._requests + f] = requests if 0 <= requests <= COUNT_MASK else _clamped(requests)

    def _sum_bases(self) -> tuple[int, int]:
        begins = self.base_requests, self.base_tokens
        requests, tokens = (sum(self._words[begin : begin + self._frontends]) for begin in begins)
        self._bases = requests, tokens
        return self._bases


def _clamped(count: int) -> int:
    return max(0, min(count, COUNT_MASK))
