"""Information models with nodes of `RANKS_A_NODE` ranks: what crosses the network comes late.

`Remote` is what dpshm has: one board, with all front-ends beside it, to which ranks of other nodes send their
rows. `Nodes` is a board on each node, with front-ends on each, and a relay between them for rows and bookings.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from dpshm.policies import View
from dpshm.sim.lab.rank import Job, Row, SimRank
from dpshm.sim.lab.view_model import Information

RANKS_A_NODE = 8


class _Counts(NamedTuple):
    """Requests and tokens by rank."""

    requests: list[int]
    tokens: list[int]

    @classmethod
    def zeros(cls, ranks: int) -> _Counts:
        """None at any rank."""
        return cls([0] * ranks, [0] * ranks)

    def add(self, rank: int, tokens: int) -> None:
        """One request more."""
        self.requests[rank] += 1
        self.tokens[rank] += tokens


class Nodes(Information):
    """Rows and bookings of the own node at once, and those of others after a delay.

    Args:
        ranks: all ranks; node 0 has the first of them.
        own: see `Information`. The front-ends are spread evenly over the nodes.
        delay_s: from a change on one node until it shows on another.
        share: whether front-ends are on all nodes; if not, all are on node 0.
    """

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float, *, share: bool = True) -> None:
        super().__init__(ranks, own)
        n, self._delay_s = len(ranks), delay_s
        nodes = -(-n // RANKS_A_NODE)
        self._node_of = [f * nodes // len(own) if share else 0 for f in range(len(own))]
        self._sent = [_Counts.zeros(n) for _ in range(nodes)]  # by the front-ends of each node
        self._shown = [_Counts.zeros(n) for _ in range(nodes)]  # of those, what other nodes see
        self._all_shown = _Counts.zeros(n)
        self._bookings: deque[tuple[float, int, int, int]] = deque()  # (due, node, rank, tokens)
        self._rows: deque[tuple[float, int, Row]] = deque()
        self._late = [r.row for r in ranks]
        self._received = [_received(row) for row in self._late]
        self._now_s = 0.0

    def published(self, rank: int, now_s: float) -> None:
        self._rows.append((now_s + self._delay_s, rank, self.ranks[rank].row))

    def sent(self, job: Job) -> None:
        node = self._node_of[job.frontend]
        self._sent[node].add(job.rank, job.booked_tokens)
        self._bookings.append((self._now_s + self._delay_s, node, job.rank, job.booked_tokens))

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        self._arrive(now_s)
        node = self._node_of[frontend]
        rows, received = list(self._late), list(self._received)
        for rank in range(node * RANKS_A_NODE, min(len(rows), (node + 1) * RANKS_A_NODE)):
            rows[rank] = self.ranks[rank].row
            received[rank] = _received(rows[rank])
        mine, shown, every = self._sent[node], self._shown[node], self._all_shown
        # A row may be here before a booking of another node that it shows as received.
        counted = zip(mine.requests, shown.requests, every.requests, received, strict=True)
        in_flight = [max(0, now - then + all_ - of[0]) for now, then, all_, of in counted]
        counted = zip(mine.tokens, shown.tokens, every.tokens, received, strict=True)
        in_flight_tokens = [max(0, now - then + all_ - of[1]) for now, then, all_, of in counted]
        return self._view(frontend, order, now_s, rows, in_flight, in_flight_tokens)

    def _arrive(self, now_s: float) -> None:
        self._now_s = now_s
        while self._bookings and self._bookings[0][0] <= now_s:
            _, node, rank, tokens = self._bookings.popleft()
            self._shown[node].add(rank, tokens)
            self._all_shown.add(rank, tokens)
        while self._rows and self._rows[0][0] <= now_s:
            _, rank, row = self._rows.popleft()
            self._late[rank], self._received[rank] = row, _received(row)


class Remote(Nodes):
    """One board: the bookings of all front-ends at once, and rows of ranks on other nodes after a delay."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float) -> None:
        super().__init__(ranks, own, delay_s, share=False)


def _received(row: Row) -> tuple[int, int]:
    return sum(row.received), sum(row.received_tokens)
