"""Information models with nodes of `RANKS_A_NODE` ranks: what crosses the network comes late.

`Remote` is what dpshm has: one board, with all front-ends beside it, to which ranks of other nodes send their
rows. `Nodes` is a board on each node, with front-ends on each, and a relay between them for rows and bookings.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from dpshm.policies import Policy, View
from dpshm.policies.old_news import OldNews
from dpshm.sim.lab.rank import Job, Row, SimRank
from dpshm.sim.lab.view_model import Information

RANKS_A_NODE = 8


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
        # Requests and tokens by rank: sent by a node's front-ends; of those, what other nodes see; the sum of it.
        self._sent: list[NDArray[np.int64]] = [np.zeros((2, n), np.int64) for _ in range(nodes)]
        self._shown = [sent.copy() for sent in self._sent]
        self._all_shown = np.zeros((2, n), np.int64)
        self._bookings: deque[tuple[float, int, int, int]] = deque()  # (due, node, rank, tokens)
        self._rows: deque[tuple[float, int, Row]] = deque()
        self._late = [r.row for r in ranks]
        self._received = np.zeros((2, n), np.int64)
        self._now_s = 0.0

    def suited(self, policy: Policy, frontend: int) -> Policy:
        """Of ranks of other nodes two are compared, as by front-ends on a board with a relay."""
        here = self._node_of[frontend]
        ages_ns = [0 if r // RANKS_A_NODE == here else int(self._delay_s * 1e9) for r in range(len(self.ranks))]
        return OldNews(policy, ages_ns, draws=not self.lockstep)

    def published(self, rank: int, now_s: float) -> None:
        self._rows.append((now_s + self._delay_s, rank, self.ranks[rank].row))

    def sent(self, job: Job) -> None:
        node = self._node_of[job.frontend]
        self._sent[node][:, job.rank] += 1, job.booked_tokens
        self._bookings.append((self._now_s + self._delay_s, node, job.rank, job.booked_tokens))

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        self._arrive(now_s)
        node = self._node_of[frontend]
        rows, received = list(self._late), self._received.copy()
        first, end = node * RANKS_A_NODE, min(len(rows), (node + 1) * RANKS_A_NODE)
        rows[first:end] = [rank.row for rank in self.ranks[first:end]]
        received[:, first:end] = np.array([row.in_all for row in rows[first:end]]).T
        # A row may be here before a booking of another node that it shows as received.
        known = self._sent[node] - self._shown[node] + self._all_shown - received
        in_flight, in_flight_tokens = np.maximum(known, 0).tolist()
        return self._view(frontend, order, now_s, rows, in_flight, in_flight_tokens)

    def _arrive(self, now_s: float) -> None:
        self._now_s = now_s
        while self._bookings and self._bookings[0][0] <= now_s:
            _, node, rank, tokens = self._bookings.popleft()
            self._shown[node][:, rank] += 1, tokens
            self._all_shown[:, rank] += 1, tokens
        while self._rows and self._rows[0][0] <= now_s:
            _, rank, row = self._rows.popleft()
            self._late[rank], self._received[:, rank] = row, row.in_all


class Remote(Nodes):
    """One board: the bookings of all front-ends at once, and rows of ranks on other nodes after a delay."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float) -> None:
        super().__init__(ranks, own, delay_s, share=False)

    def suited(self, policy: Policy, frontend: int) -> Policy:  # noqa: ARG002 - one node has all
        """All bookings are known at once: all ranks are compared."""
        return policy
