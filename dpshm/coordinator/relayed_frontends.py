"""Front-end rows of other nodes: what their relays tell is written to this node's board.

What a front-end sent to a rank is told in the numbering of the board on the rank's node, and with the number of
that board. It is written if this board knows the rank in the same numbering (`dpshm.coordinator.relayed_rows`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dpshm.board.layout import OWNER_BYTES, REMOTE_WORDS, WORD_BYTES
from dpshm.board.words import COUNT_MASK, VERDICT_MASK, saturate
from dpshm.rules.liveness import Verdict

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow
    from dpshm.net.relay_wire import FrontendNews, News, Sent


class RelayedFrontends:
    """Writes front-end rows of other nodes. Used under the relay's lock."""

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board, self._row = board, row
        self._number = board.segment.header.board_number
        self._known: dict[int, tuple[int, int, int]] = {}  # by row: board, newest report, mark
        for f in range(board.frontends_used()):
            if f % board.nodes != board.node:
                self._lose(f)

    def of_node(self, node: int) -> range:
        """The rows of a node's front-ends that were ever taken."""
        return range(node, self._board.frontends_used(), self._board.nodes)

    def lose(self, node: int) -> None:
        """Nothing is heard of a node any more: the bookings of its front-ends do not count."""
        for f in self.of_node(node):
            self._lose(f)

    def heard(self, node: int, board: int) -> None:
        """A node is heard: what its board told of its front-ends holds."""
        for f in self.of_node(node):
            known, _, mark = self._known.get(f, (0, 0, 0))
            if known == board and self._row.frontend_verdict(f) is Verdict.UNKNOWN:
                self._row.set_frontend(f, Verdict(mark))

    def _lose(self, f: int) -> None:
        if self._row.frontend_verdict(f) is Verdict.ALIVE:
            self._row.set_frontend(f, Verdict.UNKNOWN)

    def write(self, news: News, said: FrontendNews, shift_ns: int) -> None:
        """Writes one row.

        Args:
            news: what it is a part of.
            said: a row of a front-end of that node.
            shift_ns: from the sender's clock to this one.
        """
        board, words, f = self._board, self._board.words, said.index
        known, report, _ = self._known.get(f, (0, 0, 0))
        if said.report <= report if known == news.board else not said.whole:
            return  # the rows of another board of its node count once they are told whole
        verdict = Verdict(said.mark & VERDICT_MASK)
        self._known[f] = news.board, said.report, verdict
        for sent in said.sent:
            self._store_sent(news, f, sent)
        if said.whole:
            self._settle(f, {sent.rank for sent in said.sent})
        for i in range(OWNER_BYTES // WORD_BYTES):
            part = said.owner[i * WORD_BYTES : (i + 1) * WORD_BYTES]
            words[board.index("owner", f, i)] = int.from_bytes(part, "little", signed=True)
        words[board.index("frontend_pid", f)] = said.pid
        words[board.index("frontend_start_time", f)] = words[board.index("frontend_pid_namespace", f)] = 0
        words[board.index("frontend_version", f)] = said.version
        words[board.index("routed", f)] = said.routed
        words[board.index("frontend_beat", f)] = saturate(said.beat + shift_ns)
        # SYNC: publication, as in `dpshm.frontend.row`: the incarnation last.
        words[board.index("frontend_incarnation", f)] = said.incarnation
        if self._row.frontend_verdict(f) is not verdict:
            self._row.set_frontend(f, verdict)

    def _settle(self, f: int, told: set[int]) -> None:
        """Nothing is in flight from a front-end to ranks to which it has sent nothing."""
        board, words = self._board, self._board.words
        for name, received_name in (("sent_requests", "received_requests"), ("sent_tokens", "received_tokens")):
            received = getattr(board, received_name)[:, f]
            for e in np.flatnonzero(getattr(board, name)[f] > received).tolist():
                if e not in told:
                    words[board.index(name, f, e)] = int(received[e]) & COUNT_MASK

    def _store_sent(self, news: News, f: int, sent: Sent) -> None:
        board, words, e = self._board, self._board.words, sent.rank
        if e >= board.engines or sent.board >= len(news.boards):
            return
        home = self._number
        if self._row.is_relayed(e):
            home = words[board.index("remote_state", e, REMOTE_WORDS.index("home"))]
        # In another numbering: one of the two nodes has not heard of the rank's new board yet.
        if news.boards[sent.board] == home:
            words[board.index("sent_requests", f, e)] = sent.requests
            words[board.index("sent_tokens", f, e)] = sent.tokens
