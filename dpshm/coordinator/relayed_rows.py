"""Rows of other nodes: what their relays tell is written to this node's board.

Each row is of the node that tells it, and here the relay is its one writer. All sums of this board hold with them
as they hold with the rows of this node, because each count of a pair of a front-end and a rank has one numbering:
that of the board on the rank's node (`dpshm.net.relay_wire`). A front-end of this node counts what it sent by
itself. So for its pairs with ranks of another board

    received here = base + received there        told to others: sent here - base

and the base is chosen so that nothing is in flight when that board is heard for the first time. It is on the
board: a coordinator that takes the board over goes on where the last one was. All other pairs need no base.

Nothing old comes back. A board that another one of its node replaced is not heard again, nor is a process that
another one replaced in its rank; and rows of one process come with growing numbers. Times are of this node's
clock, and no clocks of two nodes are compared: what is told as a time is as far from the message as it was there.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from dpshm.board.layout import REMOTE_WORDS
from dpshm.board.words import COUNT_MASK, DRAINED, RELAYED, REMOTE, VERDICT_MASK
from dpshm.coordinator.holders import REPLACED_KEPT, Holders
from dpshm.coordinator.relayed_frontends import RelayedFrontends
from dpshm.coordinator.relayed_indexes import RelayedIndexes
from dpshm.coordinator.relayed_words import RelayedWords
from dpshm.errors import WireError
from dpshm.linux import processes
from dpshm.net.wire import unpack_words, words_arrays
from dpshm.rules.liveness import HANGING, REMOTE_INTERVAL_NS, SILENT_INTERVALS, Silence, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow
    from dpshm.net.relay_wire import EngineNews, News

logger = logging.getLogger(__name__)

HEARD_NS = 20_000_000
"""The shortest time between two notes that a node was heard."""
_HEARD = REMOTE_WORDS.index("heard")
_ID_MASK = (1 << 62) - 1
_LIVE = (Verdict.ALIVE, *HANGING)
_VERDICTS = frozenset(Verdict)


class _Came(NamedTuple):
    """When news came (CLOCK_MONOTONIC), how long they were on their way, and from their clock to this one."""

    now_ns: int
    delay_ns: int
    shift_ns: int


class _Node:
    """What is known of one other node."""

    def __init__(self, board: int) -> None:
        self.board = board
        self.replaced: deque[int] = deque(maxlen=REPLACED_KEPT)
        self.ranks: set[int] = set()
        self.heard_ns = self.noted_ns = 0
        self.silence = Silence()
        self.silent = False


class RelayedRows:
    """Writes rows of other nodes. Used under the relay's lock.

    Attributes:
        renumbered: ranks whose counts have another numbering since this was last emptied.
        indexes: copies of their prefix indexes.
    """

    def __init__(self, board: Board, row: CoordinatorRow, now_ns: int) -> None:
        self._board, self._row = board, row
        self._number = board.segment.header.board_number
        self._time_namespace = processes.namespace_inode("time")
        self._at: dict[int, RelayedWords] = {}
        self._nodes: dict[int, _Node] = {}
        self._holders = Holders(board)
        self._marks: dict[int, int] = {}  # by rank: verdict and `DRAINED`, as its node said last
        self._frontends = RelayedFrontends(board, row)
        self.indexes = RelayedIndexes(board)
        self._unheard = {e: Silence() for e in range(board.engines) if row.is_relayed(e)}
        self.renumbered: set[int] = set()
        self._forget_what_is_old(now_ns)

    def _forget_what_is_old(self, now_ns: int) -> None:
        """An earlier coordinator's rows: those that were not heard lately are unknown now, the others soon."""
        old_ns = SILENT_INTERVALS * REMOTE_INTERVAL_NS
        for e in self._unheard:
            if now_ns - int(self._board.remote_state[e, _HEARD]) >= old_ns:
                self._lose(e)

    def write(self, news: News, delay_ns: int, now_ns: int) -> None:
        """Writes what another node tells.

        Args:
            news: of that node.
            delay_ns: how long its news may have been on their way.
            now_ns: CLOCK_MONOTONIC at which they came.

        Raises:
            WireError: they are not of another node of this group, or of a board that was replaced. The rows of
                other ranks in the same news were written.
        """
        node = self._node_of(news)
        node.heard_ns = now_ns
        if node.silent:
            node.silent = False
            logger.info("node %d is heard again", news.node)
        refused, came = "", _Came(now_ns, delay_ns, now_ns - news.clock_ns)
        if news.engines:
            refused = self._write_engines(node, news, came)
        for frontend in news.frontends:
            if frontend.index % self._board.nodes == news.node and frontend.index < self._board.frontends:
                self._frontends.write(news, frontend, came.shift_ns)
            else:
                refused = f"front-end row {frontend.index} is not one of node {news.node}"
        for index in news.indexes:
            if index.rank in node.ranks and self._is_of(index.rank, node):
                self.indexes.write(news, index, now_ns)
        if now_ns - node.noted_ns >= HEARD_NS:
            node.noted_ns = now_ns
            self._note_heard(news.node, node, delay_ns, now_ns)
        if refused:
            raise WireError(refused)

    def listen(self, now_ns: int) -> None:
        """Finds nodes that are silent: their rows are unknown until they are heard."""
        for number, node in self._nodes.items():
            if node.silence.look(node.heard_ns, now_ns) and not node.silent:
                node.silent = True
                logger.warning(
                    "nothing was heard of node %d for %g s: its ranks %s are unknown, and the bookings of its "
                    "front-ends do not count",
                    *(number, SILENT_INTERVALS * REMOTE_INTERVAL_NS / 1e9, sorted(node.ranks)),
                )
                for e in node.ranks:
                    self._lose(e)
                self._frontends.lose(number)
        for e, silence in list(self._unheard.items()):
            if silence.look(int(self._board.remote_state[e, _HEARD]), now_ns):
                del self._unheard[e]
                self._lose(e)

    def _node_of(self, news: News) -> _Node:
        if news.node >= self._board.nodes or news.node == self._board.node:
            raise WireError(
                f"from node {news.node}, and this is node {self._board.node} of {self._board.nodes}: each node "
                "needs a number of its own (the setting `node`), and all the same `nodes`"
            )
        node = self._nodes.get(news.node)
        if node is None:
            node = self._nodes[news.node] = _Node(news.board)
        elif news.board in node.replaced:
            raise WireError(
                f"from a board of node {news.node} that another board replaced. Have two nodes the number "
                f"{news.node} (the setting `node`)?"
            )
        elif news.board != node.board:
            logger.info("node %d has another board", news.node)
            node.replaced.append(node.board)
            node.board = news.board
            for e in node.ranks:
                self._lose(e)
        return node

    # Ranks.

    def _write_engines(self, node: _Node, news: News, came: _Came) -> str:
        """Writes rows of ranks; returns why one of them was refused."""
        refused, rows, ranks = "", news.engines, self._board.dp_size
        try:
            values = words_arrays([said.words for said in rows])
        except WireError as error:  # the others count
            refused = f"a row of node {news.node}: {error}"
            rows = [said for said in rows if not _is_damaged(said)]
            values = words_arrays([said.words for said in rows])
        for said, words in zip(rows, values, strict=True):
            if said.rank < ranks:  # else this board learns of a larger group a moment later
                refused = self._write_engine(node, news, said, words, came) or refused
        return refused

    def _write_engine(
        self, node: _Node, news: News, said: EngineNews, values: NDArray[np.int64], came: _Came
    ) -> str:
        """Writes one rank's row; returns why it was refused."""
        e, words = said.rank, self._board.words
        if said.mark & ~DRAINED not in _VERDICTS:
            return f"rank {e} of node {news.node} has the mark {said.mark}, which is no verdict"
        mark = self._row.engine(e)
        if not self._is_free(e, mark, came.now_ns):
            return f"rank {e} of node {news.node} is a process of this node, too"
        at = self._at.get(e) or self._at.setdefault(e, RelayedWords(self._board, e))
        process = news.board + said.incarnation & _ID_MASK
        if words[at.process] != process or not mark & RELAYED:
            live = said.mark & VERDICT_MASK in _LIVE
            if self._holders.was_replaced(e, process) or not live or not said.whole:
                return ""
            self._begin(e, at, news.board, process, said)
        elif said.report <= words[at.report]:
            return ""
        if e not in node.ranks:
            for other in self._nodes.values():
                other.ranks.discard(e)
            node.ranks.add(e)
        words[at.report], words[at.heard], words[at.delay] = said.report, came.now_ns, came.delay_ns
        at.store(said, values, came.shift_ns)
        self._mark(e, said.mark)
        return ""

    def _is_of(self, e: int, node: _Node) -> bool:
        """Whether a rank's row is of a process on the board of that node, and of none on this one."""
        return (
            self._row.is_relayed(e)
            and self._board.words[self._at[e].home] == node.board
            and not self._board.engine_alive(e)
        )

    def _is_free(self, e: int, mark: int, now_ns: int) -> bool:
        """Whether the row is no process's of this node, nor that of a live engine without a board."""
        if mark & REMOTE and not mark & RELAYED and mark & VERDICT_MASK in _LIVE:
            return False
        return self._holders.is_free(e, now_ns)

    def _begin(self, e: int, at: RelayedWords, home: int, process: int, said: EngineNews) -> None:
        """Another process has a rank. If it is of another board, its counts have another numbering."""
        board, words = self._board, self._board.words
        self._holders.replace(e, words[at.process])
        self.indexes.forget(e)
        words[at.report] = 0
        at.forget()
        if words[at.home] != home or not self._row.is_relayed(e):
            received = {r.frontend: (r.requests, r.tokens) for r in said.received}
            for f in range(board.frontends):
                requests, tokens = received.get(f, (0, 0))
                sent_requests, sent_tokens = board.index("sent_requests", f, e), board.index("sent_tokens", f, e)
                if f % board.nodes == board.node:
                    # SYNC: what this front-end sends from here on is in flight, and nothing before.
                    words[at.base_requests + f] = (words[sent_requests] & COUNT_MASK) - requests
                    words[at.base_tokens + f] = (words[sent_tokens] & COUNT_MASK) - tokens
                else:
                    words[at.base_requests + f] = words[at.base_tokens + f] = 0
                    words[sent_tokens], words[sent_requests] = tokens, requests
                at.store_received(f, requests, tokens)
            # SYNC: after the bases: a coordinator that takes over between these stores makes them once more.
            words[at.home] = home
            self.renumbered.add(e)
        words[at.clock] = self._time_namespace
        words[at.incarnation] = (words[at.incarnation] & COUNT_MASK) + 1
        words[at.process] = process

    def _mark(self, e: int, said: int) -> None:
        self._unheard.pop(e, None)
        self._marks[e] = said
        if self._row.engine(e) & (VERDICT_MASK | DRAINED | REMOTE | RELAYED) == said | REMOTE | RELAYED:
            return
        verdict, drained = Verdict(said & VERDICT_MASK), bool(said & DRAINED)
        before = self._row.engine_verdict(e)
        self._row.set_engine(e, verdict=verdict, on_behalf=False, remote=True, relayed=True, drained=drained)
        if verdict is not before:
            logger.info("engine %d of another node is %s, was %s", e, verdict.name.lower(), before.name.lower())

    def _lose(self, e: int) -> None:
        """Nothing is heard of a rank any more."""
        if self._row.is_relayed(e) and self._row.engine_verdict(e) in _LIVE:
            self._row.set_engine(e, verdict=Verdict.UNKNOWN)

    def _note_heard(self, number: int, node: _Node, delay_ns: int, now_ns: int) -> None:
        """A node is heard: what it told of its rows holds, and they are as late as its news."""
        words = self._board.words
        for e in list(node.ranks):
            at = self._at[e]
            if not self._row.is_relayed(e):  # a process of this node has the rank now
                node.ranks.discard(e)
                continue
            if words[at.home] != node.board:
                continue  # of this node's last board
            words[at.heard], words[at.delay] = now_ns, delay_ns
            if self._row.engine_verdict(e) is Verdict.UNKNOWN:
                self._mark(e, self._marks.get(e, Verdict.UNKNOWN))
        self._frontends.heard(number, node.board)


def _is_damaged(said: EngineNews) -> bool:
    try:
        unpack_words(said.words)
    except WireError:
        return True
    return False
