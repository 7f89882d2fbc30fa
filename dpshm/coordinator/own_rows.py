"""What a node tells the others: the rows of its ranks and its front-ends, when they change.

A look compares this node's rows with what they were when they were told last, in a few calls of numpy, and with
them the words that say which rows there are. Many looks find no change, and end there. Rows that changed are told
whole, but for the counts of pairs, of which those that changed are told. A row that another process has, and now
and then each row, is told with all counts, so that nothing that was lost stays lost.

What is told of a pair has the numbering of the board on the rank's node (`dpshm.net.relay_wire`). A front-end's
counts at a rank of another board are its words less a base (`dpshm.coordinator.relayed_rows`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpshm.board.layout import CARRIED_WORDS, REMOTE_WORDS
from dpshm.board.words import COUNT_MASK, DRAINED, MAX_WORD, ON_BEHALF, RELAYED, VERDICT_MASK
from dpshm.net.relay_wire import EngineNews, FrontendNews, Received, Sent
from dpshm.net.wire import CARRIED_BYTES

if TYPE_CHECKING:
    from dpshm.board.board import Board

LEAST_INTERVAL_NS = 1_000_000
"""The shortest time between two messages of a row: a thousand in a second."""
_HOME = REMOTE_WORDS.index("home")
# SYNC: the offsets come first, and so are loaded before the counts of what was received: see `LiveOutstanding`.
_ENGINE = (
    *(("request_offset", 0), ("token_offset", 0), ("engine_incarnation", 0), ("beat", 0)),
    *CARRIED_WORDS,
)
_ENGINE_INCARNATION, _FRONTEND_INCARNATION = 2, 0
_ENGINE_BEAT, _FRONTEND_BEAT = 3, 4
_CARRIED = 4  # the place of the first word of `layout.CARRIED_WORDS`
_FRONTEND = ("frontend_incarnation", "frontend_pid", "frontend_version", "routed", "frontend_beat")
Words = NDArray[np.int64]


class Told(NamedTuple):
    """Rows to tell, and the boards whose numbering their counts have."""

    boards: list[int]
    engines: list[EngineNews]
    frontends: list[FrontendNews]


NOTHING = Told([], [], [])


class _Table:
    """Some rows: words, and two counts for each of some items.

    Args:
        rows: their numbers.
        at: by row, where its words are; the counts begin at the last two, requests and tokens.
        items: how many counts of each.

    Attributes:
        places: shape (rows, words and counts): where all of these are.
        now, last: the same shape, once `share` was called: as they are, and as they were told last.
    """

    now: Words
    last: Words

    def __init__(self, rows: list[int], at: list[list[int]], items: int) -> None:
        self.rows, self._items = rows, items
        self.number = len(at[0]) - 2 if at else 0
        places = [
            [*words, *range(requests, requests + items), *range(tokens, tokens + items)]
            for *words, requests, tokens in at
        ]
        self.places = np.array(places, np.intp).reshape(len(rows), self.number + 2 * items)
        self._told_ns = [0] * len(rows)
        self._begin = 0

    def share(self, begin: int, now: Words, last: Words) -> None:
        """Takes its part of what is looked at in one piece."""
        self._begin, part, shape = begin, slice(begin, begin + self.places.size), self.places.shape
        self.now, self.last = now[part].reshape(shape), last[part].reshape(shape)

    def forget(self, item: int) -> None:
        """All rows tell the counts of an item again."""
        if item < self._items:
            self.last[:, self.number + item] = -1

    def to_tell(
        self, changed: Sequence[int], now_ns: int, whole: slice | None
    ) -> list[tuple[int, bool, list[int]]]:
        """Rows to tell: the place of each, whether with all its counts, and which of its columns changed.

        Args:
            changed: which of all that is looked at in one piece changed, and is of this table.
            now_ns: CLOCK_MONOTONIC.
            whole: the rows to tell with all of them.
        """
        columns: dict[int, list[int]] = {}
        begin, width = self._begin, self.places.shape[1]
        for at in changed:
            i, column = divmod(at - begin, width)
            if i in columns:
                columns[i].append(column)
            else:
                columns[i] = [column]
        before_ns, told_ns = now_ns - LEAST_INTERVAL_NS, self._told_ns
        places = [i for i in columns if told_ns[i] <= before_ns]
        if whole is None:
            return [(i, False, columns[i]) for i in places]
        all_ = set(range(len(self.rows))[whole])
        return [(i, i in all_, columns.get(i, [])) for i in sorted(all_.union(places))]

    def counts(self, i: int, columns: list[int]) -> list[tuple[int, int, int]]:
        """(item, requests, tokens) of those of row i that changed."""
        begin, middle, of = self.number, self.number + self._items, self.now.item
        items = {column - (middle if column >= middle else begin) for column in columns if column >= begin}
        return [(item, of(i, begin + item), of(i, middle + item)) for item in sorted(items)]

    def all_counts(self, row: list[int], also: Sequence[int] = ()) -> list[tuple[int, int, int]]:
        """The same of all that are not 0, and of more items."""
        begin, n = self.number, self._items
        of_all = zip(range(n), row[begin : begin + n], row[begin + n :], strict=True)
        return [of_one for of_one in of_all if of_one[1] or of_one[2] or of_one[0] in also]

    def told(self, i: int, now_ns: int) -> Words:
        """Row i is told now; returns it."""
        row: Words = self.now[i]
        self.last[i], self._told_ns[i] = row, now_ns
        return row


class OwnRows:
    """Looks at this node's rows. Used under the relay's lock.

    Attributes:
        ranks: of this node, as the last look found them.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._flat: Words = np.asarray(board.words)
        self._number = board.segment.header.board_number
        self._at_revision, self._at_dp_size = board.index("revision"), board.index("dp_size")
        self._sizes = 0, 0
        self._unused: list[int] = []  # ranks of this node whose rows no process has had yet
        self.ranks: frozenset[int] = frozenset()
        self._engines, self._frontends = _Table([], [], 0), _Table([], [], 0)
        self._share(range(board.frontends))
        self._marks: list[int] = []
        self._report = 0

    def renumbered(self, ranks: Collection[int]) -> None:
        """The counts of front-ends at these ranks have another numbering: all are told again."""
        for rank in ranks:
            self._frontends.forget(rank)

    def look(self, now_ns: int, whole: slice | None = None) -> Told:
        """The rows that changed, and those of a slice with all their counts.

        Args:
            now_ns: CLOCK_MONOTONIC.
            whole: which rows to tell whatever they are.
        """
        changed = self._changed()
        if changed and changed[0] < self._own_places:
            self._find_rows()
            changed = self._changed()
            # What changed meanwhile is no column of a row: the next look finds the rows anew.
            changed = changed[bisect_left(changed, self._own_places) :]
        if whole is None and not changed:
            return NOTHING
        self._report = max(self._report + 1, now_ns)
        boards: dict[int, int] = {self._number: 0}
        middle = bisect_left(changed, self._own_places + self._frontends.places.size)
        frontends = self._look_at_frontends(changed[:middle], now_ns, whole, boards)
        engines = self._look_at_engines(changed[middle:], now_ns, whole)
        return Told(list(boards), engines, frontends)

    def _changed(self) -> list[int]:
        """Which of all that is looked at is not as it was told last."""
        # SYNC: loads every word once, in one 64-bit access, each row from its first word on.
        self._flat.take(self._places, out=self._now, mode="clip")
        changed: list[int] = (self._now != self._last).nonzero()[0].tolist()
        return changed

    def _share(self, unused: range) -> None:
        """Has all that is looked at in one piece: what rows there are, front-ends, engines.

        Args:
            unused: front-end rows that were never taken.
        """
        at, tables = self._board.index, (self._frontends, self._engines)
        own = [self._at_revision, at("dp_size"), *(at("engine_incarnation", e) for e in self._unused)]
        own += [at("frontend_incarnation", f) for f in unused]
        self._own_places = begin = len(own)
        self._places = np.concatenate([np.array(own, np.intp), *(table.places.ravel() for table in tables)])
        self._now, self._last = np.zeros_like(self._places), np.full_like(self._places, -1)
        for table in tables:
            table.share(begin, self._now, self._last)
            begin += table.places.size

    def _find_rows(self) -> None:
        """Which rows are this node's. A mark changes when a process comes or goes.

        The mark of a new engine may come before its incarnation: the watch sees that its row is locked.
        """
        board = self._board
        # SYNC: the revision before the marks, as front-ends load them (`dpshm.coordinator.row`). The next look
        # compares with this one.
        revision, dp_size = board.words[self._at_revision], board.words[self._at_dp_size]
        n, used, at = board.dp_size, board.frontends_used(), board.index
        self._marks = marks = board.engine_mark[:n].tolist()
        mine = [e for e in range(n) if not marks[e] & (RELAYED | ON_BEHALF)]
        self.ranks = frozenset(mine)
        incarnations = board.engine_incarnation[:n].tolist()
        ranks = [e for e in mine if incarnations[e] > 0]
        unused = [e for e in mine if incarnations[e] <= 0]
        frontends = list(range(board.node, used, board.nodes))
        rows = self._engines.rows, self._frontends.rows
        if (ranks, frontends, self._sizes, self._unused) != (*rows, (used, n), unused):
            self._sizes, self._unused = (used, n), unused
            words = [
                [*(at(name, e, i) for name, i in _ENGINE), at("received_requests", e), at("received_tokens", e)]
                for e in ranks
            ]
            self._engines = _Table(ranks, words, used)
            words = [
                [*(at(name, f) for name in _FRONTEND), at("sent_requests", f), at("sent_tokens", f)]
                for f in frontends
            ]
            self._frontends = _Table(frontends, words, n)
            self._share(range(used, board.frontends))
        self._last[: self._own_places] = 0  # unused rows are
        self._last[: 2 + len(unused)] = revision, dp_size, *(incarnations[e] for e in unused)
        # Verdicts are no words of these rows: a change of one is a change of its row.
        for table, beat in ((self._engines, _ENGINE_BEAT), (self._frontends, _FRONTEND_BEAT)):
            if table.rows:
                table.last[:, beat] = -1

    def _look_at_engines(self, changed: Sequence[int], now_ns: int, whole: slice | None) -> list[EngineNews]:
        table, number, told = self._engines, self._engines.number, []
        if not (places := table.to_tell(changed, now_ns, whole)):
            return []
        firsts = table.now[:, :_CARRIED].tolist()
        carried = (table.now[:, _CARRIED:number] & MAX_WORD).tobytes()
        for i, due, columns in places:
            row, rank = table.told(i, now_ns), table.rows[i]
            requests, tokens, incarnation, beat = firsts[i]
            received: list[Received] = []
            if (all_ := due or _ENGINE_INCARNATION in columns) or columns[-1] >= number:
                counts = table.all_counts(row.tolist()) if all_ else table.counts(i, columns)
                received = [Received(f, r & COUNT_MASK, t & COUNT_MASK) for f, r, t in counts]
            told.append(
                EngineNews(
                    *(rank, incarnation & COUNT_MASK, self._report, self._marks[rank] & (VERDICT_MASK | DRAINED)),
                    *(all_, beat & MAX_WORD, _clip(requests), _clip(tokens)),
                    *(carried[CARRIED_BYTES * i : CARRIED_BYTES * (i + 1)], received),
                )
            )
        return told

    def _look_at_frontends(
        self, changed: Sequence[int], now_ns: int, whole: slice | None, boards: dict[int, int]
    ) -> list[FrontendNews]:
        board, table, told = self._board, self._frontends, []
        for i, due, columns in table.to_tell(changed, now_ns, whole):
            row, f = table.told(i, now_ns).tolist(), table.rows[i]
            incarnation, pid, version, routed, beat = row[: table.number]
            if all_ := due or _FRONTEND_INCARNATION in columns:
                n = len(self._marks)
                based = (board.base_requests[:n, f] | board.base_tokens[:n, f]).nonzero()[0]
                counts = table.all_counts(row, based.tolist())
            else:
                counts = table.counts(i, columns)
            told.append(
                FrontendNews(
                    *(f, incarnation & COUNT_MASK, self._report),
                    mark=int(board.frontend_mark[f]) & VERDICT_MASK,
                    whole=all_,
                    pid=pid & MAX_WORD,
                    version=version & MAX_WORD,
                    routed=routed & MAX_WORD,
                    beat=beat & MAX_WORD,
                    owner=board.owner[f].tobytes(),
                    sent=self._sent(f, counts, boards),
                )
            )
        return told

    def _sent(self, f: int, counts: list[tuple[int, int, int]], boards: dict[int, int]) -> list[Sent]:
        """What a front-end sent to some ranks, in the numbering of each rank's board."""
        board, sent = self._board, []
        for e, requests, tokens in counts:
            home = self._number
            if e not in self.ranks:
                home = int(board.remote_state[e, _HOME])
                requests -= int(board.base_requests[e, f])  # noqa: PLW2901
                tokens -= int(board.base_tokens[e, f])  # noqa: PLW2901
            if home > 0:
                sent.append(Sent(e, boards.setdefault(home, len(boards)), _count(requests), _count(tokens)))
        return sent


def _clip(offset: int) -> int:
    return max(-COUNT_MASK, min(offset, COUNT_MASK))


def _count(number: int) -> int:
    return max(0, min(number, COUNT_MASK))
