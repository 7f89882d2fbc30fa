"""Policies where the rows of some ranks are old."""

from __future__ import annotations

from collections import Counter

import pytest

from dpshm.policies import Request, View, by_name, least_loaded
from dpshm.policies.old_news import OldNews

OLD, NEW = 1, 0


def view_of(requests, *, turn=0):
    """A view of ranks with so many requests each, in an order that turns."""
    n = len(requests)
    ranks = [(turn + i) % n for i in range(n)]
    return View.of([0] * n, requests, own=[turn] + [0] * (n - 1), ranks=ranks)


@pytest.mark.parametrize("n", [8, 32])
def test_of_old_rows_two_are_compared(n):
    """Guards against all front-ends that choose the one rank that looked best a while ago."""
    policy = OldNews(least_loaded, [OLD] * n, draws=True)
    requests = list(range(n))
    chosen = Counter(policy(view_of(requests, turn=turn), Request(turn)) for turn in range(200 * n))
    # The best of all is among the two in 2 of n decisions, and the worst is never the better one.
    assert 1.5 * 200 < chosen[0] < 2.5 * 200
    assert chosen[n - 1] == 0
    assert len(chosen) == n - 1


def test_ranks_of_this_node_are_all_compared():
    """Guards against a draw that leaves out ranks of which all is known."""
    policy = OldNews(least_loaded, [0] * 4 + [OLD] * 4, draws=True)
    best_here = [5, 5, 3, 5, 4, 4, 4, 4]
    assert {policy(view_of(best_here, turn=turn), Request(turn)) for turn in range(100)} == {2}
    best_there = [5, 5, 5, 5, 4, 4, 4, 4]
    chosen = Counter(policy(view_of(best_there, turn=turn), Request(turn)) for turn in range(800))
    assert set(chosen) == {4, 5, 6, 7}
    assert min(chosen.values()) > 50


def test_rows_that_are_not_old_are_all_compared():
    """Guards against a draw where news come at once, and among ranks in lockstep."""
    requests = [3, 2, 1, 2, 3, 4]
    for policy in (OldNews(least_loaded, [NEW] * 6, draws=True), OldNews(least_loaded, [OLD] * 6, draws=False)):
        assert {policy(view_of(requests, turn=turn), Request(turn)) for turn in range(50)} == {2}


def test_a_policy_sees_the_ages():
    """Guards against a user's policy that cannot tell old news from new."""
    seen = []

    def policy(view, _):
        seen.append((view.ages_ns, sorted(view.ranks)))
        return view.ranks[0]

    ages_ns = [0, 400_000, 20_000_000]
    OldNews(policy, ages_ns, draws=True)(view_of([1, 1, 1]), Request())
    assert seen == [(ages_ns, [0, 1, 2])]
    assert view_of([1, 1, 1]).ages_ns == [0, 0, 0]


def test_equal_views_are_decided_equally():
    """Guards against a draw that a replay cannot repeat."""
    policy = OldNews(by_name("least_work"), [OLD] * 8, draws=True)
    assert len({policy(view_of([3] * 8, turn=5), Request(9)) for _ in range(20)}) == 1
