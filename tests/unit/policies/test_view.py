"""The view that a user's policy sees: the same names and types in a group of any size."""

from __future__ import annotations

from typing import ClassVar

import pytest

from dpshm import Frontend
from dpshm.board.layout import MODEL_WORDS, STEP_WORDS
from dpshm.board.words import pack_load
from dpshm.errors import SettingError
from dpshm.policies import Request, View, Work, least_loaded, sees_work
from dpshm.policies.columns import VECTOR_FROM, ArrayColumns, ListColumns, ListWork, columns_of
from tests.support import LoneBoard

SIZES = (1, 8, VECTOR_FROM, 80)


def view_of(size: int) -> View:
    """A group in which every number is another one."""
    ranks = list(reversed(range(size)))
    load = [pack_load(e, 2 * e, 1.0 if e % 2 else 0.0) for e in range(size)]
    requests, own = [3 * e + e % 3 for e in range(size)], [e % 5 for e in range(size)]
    steps = [[10 * e + i for e in range(size)] for i in range(len(STEP_WORDS))]
    models = [[100 * e + i + 1 for i in range(len(MODEL_WORDS))] for e in range(size)]
    work = ListWork([7 * e for e in range(size)], steps, models, 1234)
    return View(columns_of(ListColumns(ranks, load, requests, own, 4, work)))


@pytest.mark.parametrize("size", SIZES)
def test_a_policy_sees_the_same_types_at_every_size(size: int):
    """Guards against `if view.requests` that works at 8 ranks and raises at 40, where arrays stand behind it."""
    view, every = view_of(size), range(size)
    assert type(view.columns) is (ListColumns if size < VECTOR_FROM else ArrayColumns)
    work = view.work
    seen = {
        "ranks": (view.ranks, [size - 1 - e for e in every]),
        "waiting": (view.waiting, [*every]),
        "running": (view.running, [2 * e for e in every]),
        "in_flight": (view.in_flight, [e % 3 for e in every]),
        "requests": (view.requests, [3 * e + e % 3 for e in every]),
        "own": (view.own, [e % 5 for e in every]),
        "tokens": (work.tokens, [7 * e for e in every]),
        "step_end_ns": (work.step_end_ns, [10 * e for e in every]),
        "step_tokens": (work.step_tokens, [10 * e + 1 for e in every]),
    }
    for i, name in enumerate(MODEL_WORDS):
        seen[name] = (getattr(work, name), [100 * e + i + 1 for e in every])
    for name, (got, expected) in seen.items():
        assert got == expected, name
        assert type(got) is list, name
        assert {type(x) for x in got} == {int}, name
    assert view.kv_cache_usage == [float(e % 2) for e in every]
    assert (view.num_frontends, work.now_ns, work.learnt, view.has_work) == (4, 1234, True, True)


@pytest.mark.parametrize("size", SIZES)
def test_helpers_take_and_give_lists(size: int):
    """Guards against helpers that work on the built-in policies' form alone."""
    view = view_of(size)
    busy = [rank for rank in view.ranks if view.waiting[rank] and view.kv_cache_usage[rank] > 0.95]
    assert [rank for rank in view.ranks if view.overloaded(rank)] == busy
    assert view.free() == [rank for rank in view.ranks if rank not in busy]
    assert view.least(view.requests) == least_loaded(view, Request()) == 0
    assert view.least([-score for score in view.requests]) == view.free()[0]
    assert type(view.least([0.5] * size)) is int


def test_a_column_is_made_once():
    """Guards against a policy's loop over ranks that makes the list again for each of them."""
    view = view_of(80)
    assert view.waiting is view.waiting
    assert view.work.base_ns is view.work.base_ns


def test_a_view_without_work_says_how_to_get_it():
    """Guards against a policy that is not marked and fails with an error about None."""
    view = View.of([0, 0], [1, 2])
    assert not view.has_work
    with pytest.raises(SettingError, match=r"mark the policy with dpshm\.policies\.sees_work"):
        _ = view.work


@sees_work
def shortest_backlog(view: View, request: Request) -> int:
    """A user's function that reads tokens."""
    work: Work = view.work
    return view.least(work.tokens)


class ShortestBacklog:
    """A user's class that does."""

    sees_work: ClassVar[bool] = True

    def __call__(self, view: View, request: Request) -> int:
        """The same."""
        return shortest_backlog(view, request)


@pytest.mark.parametrize("policy", [shortest_backlog, ShortestBacklog()])
@pytest.mark.parametrize("dp_size", [2, 40])
def test_a_marked_policy_sees_tokens(group, using, policy, dp_size):
    """Guards against a mark that a front-end does not look for."""
    using(LoneBoard(group, engines=40, dp_size=dp_size))
    frontend = using(Frontend.attach(group, policy=policy))
    _booked = [frontend.route(500, dp_rank=rank) for rank in range(dp_size) if rank != 1]
    assert frontend.choose() == 1


@pytest.mark.parametrize("size", [3, 40])
def test_views_for_a_policys_own_tests(size: int):
    """Guards against views that a user makes and that differ from those of a front-end."""
    rest = [0] * (size - 2)
    view = View.of(
        *([1, 0, *rest], [2, 3, *rest]),
        kv_cache_usage=[1.0, 0.0, *rest],
        in_flight=[4, 0, *rest],
        own=[1, 0, *rest],
        ranks=[1, 0],
        num_frontends=2,
    )
    assert (view.ranks, view.waiting[:2], view.running[:2], view.requests[:2]) == ([1, 0], [1, 0], [2, 3], [7, 3])
    assert (view.in_flight[:2], view.own[:2], view.num_frontends) == ([4, 0], [1, 0], 2)
    assert view.overloaded(0)
    assert view.free() == [1]
    for wrong in ({"waiting": [], "running": []}, {"waiting": [1], "running": [1, 2]}):
        with pytest.raises(SettingError, match="one item for each rank"):
            View.of(**wrong)
