"""Ranks whose step models may be out of date."""

from __future__ import annotations

from dpshm.policies import comparable
from dpshm.policies.idle_ranks import IDLE_NS, IdleRanks


def test_a_rank_is_idle_once_it_has_made_no_step_for_long():
    """Guards against busy ranks that count as idle, and against idleness that outlives the first step."""
    ranks = IdleRanks()
    assert ranks.look([5, 9], 100) == [False, False]
    assert ranks.look([5, 10], 100 + IDLE_NS - 1) == [False, False]
    assert ranks.look([5, 10], 100 + IDLE_NS) == [True, False]
    assert ranks.look([6, 10], 101 + IDLE_NS) == [False, False]
    assert ranks.look([6, 10], 99 + 2 * IDLE_NS) == [False, True]


def test_ranks_that_come_and_go():
    """Guards against a group that grows and so shows a new rank as idle, or raises."""
    ranks = IdleRanks()
    assert ranks.look([5], 0) == [False]
    assert ranks.look([5, 0], IDLE_NS) == [True, False]
    assert ranks.look([5, 0], 2 * IDLE_NS) == [True, True]
    assert ranks.look([], 2 * IDLE_NS) == []
    assert ranks.look([5, 0], 3 * IDLE_NS) == [False, False]


def test_an_idle_rank_is_tried_again():
    """Guards against a rank that was slow, gets no requests, and so never shows that it has recovered."""
    fast, slow = [8_000_000, 200_000, 40_000, 0, 0, 0, 65_000], [16_000_000, 400_000, 80_000, 512, 0, 0, 130_000]
    assert comparable([fast, slow, fast])[1][:3] == slow[:3]
    tried = comparable([fast, slow, fast], idle=[False, True, False])
    assert [row[:3] for row in tried] == [fast[:3]] * 3
    assert tried[1][3] == 512
    # Where all are idle, or the others have learnt nothing, what it learnt is the best there is.
    assert comparable([fast, slow], idle=[True, True]) == comparable([fast, slow])
    assert comparable([[0] * 7, slow], idle=[False, True])[1][:3] == slow[:3]
