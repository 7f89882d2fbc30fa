"""How old the row of each rank may be, where rows come from other nodes."""

from __future__ import annotations

from dpshm.board.board import Board
from dpshm.board.layout import REMOTE_WORDS
from dpshm.board.words import REMOTE
from dpshm.policies import Policy
from dpshm.policies.old_news import OldNews
from dpshm.rules.liveness import REMOTE_INTERVAL_NS

_HEARD, _DELAY = REMOTE_WORDS.index("heard"), REMOTE_WORDS.index("delay")


def read_ages_ns(board: Board, now_ns: int) -> list[int]:
    """By rank, ns, at least 1; 0 for a rank of this node.

    A change is told at once, so a row is as old as its news take: half of the round trip to its node. It is older
    if it was not repeated when it should have been.
    """
    n = board.dp_size
    state, marks = board.remote_state[:n].tolist(), board.engine_mark[:n].tolist()
    return [
        max(row[_DELAY], now_ns - row[_HEARD] - REMOTE_INTERVAL_NS, 1) if mark & REMOTE else 0
        for row, mark in zip(state, marks, strict=True)
    ]


def with_ages(policy: Policy, board: Board, now_ns: int) -> Policy:
    """A policy for a board with a relay: it knows how old the rows are, until the next refresh."""
    return OldNews(policy, read_ages_ns(board, now_ns), draws=not board.segment.header.waves)
