"""The rules of the field, each by its formula, on small views."""

from __future__ import annotations

import pytest

from dpshm.board.words import pack_load
from dpshm.errors import SettingError
from dpshm.policies import Request, View, comparable, least_loaded
from dpshm.policies.columns import ListColumns, ListWork
from dpshm.rules.hashing import mix
from dpshm.sim.lab.rivals import RIVALS, bounded_hashing, br_0, lmetric, rival_or_policy, shortest_kv, sticky


def view(requests: list[int], tokens: list[int], ranks: list[int] | None = None) -> View:
    """So many running requests and uncomputed prompt tokens by rank."""
    n = len(requests)
    work = ListWork(tokens, [[0] * n] * 3, comparable([[0] * 7] * n), 0)
    load = [pack_load(0, count, 0.0) for count in requests]
    return View(ListColumns(ranks or list(range(n)), load, requests, [0] * n, 1, work))


@pytest.mark.parametrize(
    ("requests", "tokens", "cached", "chosen"),
    [
        ([3, 1], [0, 0], None, 1),  # 1000 * 4, 1000 * 2
        ([3, 1], [0, 1200], None, 0),  # 1000 * 4, 2200 * 2
        ([3, 1], [0, 0], [600, 0], 0),  # 400 * 4, 1000 * 2
        ([3, 1], [200, 0], [600, 0], 1),  # 600 * 4, 1000 * 2
        ([9, 1], [0, 0], [1000, 800], 0),  # 1 * 10, 200 * 2: one token at least is computed
    ],
)
def test_lmetric(requests, tokens, cached, chosen):
    """Guards against a sum in the place of the product, and against cached tokens that count."""
    assert lmetric(view(requests, tokens), Request(1000, cached=cached)) == chosen


def test_bounded_hashing_stays_on_its_ring():
    """Guards against a ring that depends on load, and against a bound that never or always diverts."""
    idle = view([0] * 8, [0] * 8)
    at = {key: bounded_hashing(idle, Request(1, mix(key) >> 1)) for key in range(300)}
    assert set(at.values()) == set(range(8))
    for key, rank in at.items():
        # Requests that are not below 1.25 * (mean + 1) send the key on: mean 1.25, bound 2.8.
        full, free = [1] * 8, [1] * 8
        full[rank], free[rank] = 3, 2
        assert bounded_hashing(view(full, [0] * 8), Request(1, mix(key) >> 1)) != rank
        assert bounded_hashing(view(free, [0] * 8), Request(1, mix(key) >> 1)) == rank
        others = [r for r in range(8) if r != rank]
        assert bounded_hashing(view([0] * 8, [0] * 8, others), Request(1, mix(key) >> 1)) in others
    assert bounded_hashing(view([2, 1, 3], [0] * 3), Request(1)) == 1


@pytest.mark.parametrize(
    ("requests", "cached", "chosen"),
    [
        ([9, 5, 4], [0, 500, 0], 1),  # half of it is enough
        ([9, 5, 4], [0, 499, 0], 2),  # less is not
        ([38, 5, 4], [999, 500, 0], 0),  # 38 <= 1.5 * 4 + 32
        ([39, 5, 4], [999, 500, 0], 2),  # no room there, and then the least requests
        ([9, 5, 4], None, 2),
    ],
)
def test_sticky(requests, cached, chosen):
    """Guards against thresholds that are not those of the documentation."""
    assert sticky(view(requests, [0] * 3), Request(1000, cached=cached)) == chosen


def holding(held: list[int], tokens: list[int], requests: list[int]) -> View:
    """Ranks whose requests hold so much context."""
    seen = view(requests, tokens)
    work = ListWork(tokens, [[0] * 3, [0] * 3, held], seen.columns.work.models, 0)
    return View(ListColumns([0, 1, 2], seen.columns.load, requests, [0] * 3, 1, work))


def test_shortest_kv_counts_what_is_held_and_what_will_be():
    """Guards against a rival that sees the queue alone, or the KV cache alone."""
    assert shortest_kv(holding([900, 100, 500], [0, 700, 0], [1, 1, 9]), Request(10)) == 2


def test_br_0_fills_what_lies_below_the_most_loaded_rank():
    """Guards against a rival that takes the least loaded rank where several have room, or the wrong one where none
    has.
    """
    seen = holding([900, 500, 100], [0, 0, 0], [2, 3, 9])
    assert br_0(seen, Request(300)) == 1  # both have room, and rank 1 has fewer requests
    assert br_0(seen, Request(500)) == 2
    assert br_0(seen, Request(5000)) == 2


@pytest.mark.parametrize("name", RIVALS)
def test_ties_and_ranks_that_may_not_be_chosen(name: str):
    """Guards against a rival that is handicapped: all its front-ends would go to the same rank of equals."""
    rule = RIVALS[name]
    for order in ([2, 0, 1], [1, 2, 0]):
        assert rule(view([1, 1, 1], [0, 0, 0], order), Request(10, cached=[0, 0, 0])) == order[0]
    assert rule(view([0, 0, 9], [0, 0, 9], [2]), Request(10, 5, [9, 9, 0])) == 2


def test_rules_are_found_by_name():
    """Guards against a rival that hides a policy, and against a name that is taken in silence."""
    assert rival_or_policy("sticky") is sticky
    assert rival_or_policy("least_loaded") is least_loaded
    with pytest.raises(SettingError, match="no policy 'stickiest'"):
        rival_or_policy("stickiest")
