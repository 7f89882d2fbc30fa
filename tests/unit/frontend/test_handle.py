"""Tests of `dpshm.frontend.handle`: who is chosen, what is booked, and how a handle may be used."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from dpshm import (
    CapacityExceeded,
    Coordinator,
    Engine,
    Frontend,
    HandleClosed,
    NoEngineAvailable,
    Overloaded,
    SegmentNotFound,
    SettingError,
    State,
)
from dpshm.board.words import pack_control, pack_load
from dpshm.frontend.decisions import Decisions
from dpshm.frontend.view_reader import ViewReader
from dpshm.policies import NAMES, LeastWork
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import (
    TIMEOUT_S,
    LoneBoard,
    Remote,
    count_fds,
    count_threads,
    frontend_verdict,
    gone,
    wait_until,
)


@pytest.fixture
def coordinator(group, using):
    """A coordinator of three ranks."""
    return using(Coordinator(group=group, dp_size=3, max_engines=8, max_frontends=8))


@pytest.fixture
def engines(coordinator, group, using):
    """Its three engines."""
    return [using(Engine.attach(group, dp_rank)) for dp_rank in range(3)]


@pytest.fixture
def board(group, using):
    """A board of two ranks, both alive, without a coordinator."""
    return using(LoneBoard(group, engines=40))


def chosen(frontend, count=12):
    """The ranks that a front-end chooses for so many requests, none of which stays booked."""
    ranks = []
    for _ in range(count):
        route = frontend.route()
        ranks.append(route.dp_rank)
        route.cancel()
    return set(ranks)


# Choosing.


@pytest.mark.parametrize("wrong", [None, 5, b"least_work", object(), dict])
@pytest.mark.parametrize("name", ["policy", "on_change"])
def test_what_cannot_be_called_is_refused_at_once(board, group, using, name, wrong):
    """A policy or a listener that is none is refused when it is given, not at the first request or change."""
    if (name, wrong) == ("on_change", None):  # its default
        return
    with pytest.raises(SettingError, match=f"{name} is .*: give a function"):
        Frontend.attach(group, **{name: wrong})
    assert using(Frontend.attach(group)).index == 0  # no row was taken


async def coroutine(*_):
    """What a server built on asyncio may give."""
    raise AssertionError


class CalledAsync:
    """An object whose call is a coroutine."""

    async def __call__(self, *_):
        """Never runs."""
        raise AssertionError


@pytest.mark.parametrize(
    "wrong", [coroutine, partial(coroutine, 1), CalledAsync()], ids=["def", "partial", "object"]
)
@pytest.mark.parametrize("name", ["policy", "on_change"])
def test_what_nobody_would_await_is_refused_at_once(board, group, using, name, wrong):
    """Guards against a coroutine function as listener, whose body never runs: Python only warns."""
    with pytest.raises(SettingError, match=f"{name} is .*: give a function without async"):
        Frontend.attach(group, **{name: wrong})
    assert using(Frontend.attach(group)).index == 0  # no row was taken


@pytest.mark.parametrize("dp_size", [3, 40])
@pytest.mark.parametrize("policy", NAMES)
def test_an_excluded_rank_is_not_chosen(board, group, using, policy, dp_size):
    """Guards against a retry that goes to the rank at which it has just failed."""
    board.marks.set_dp_size(dp_size)
    board.mark(range(dp_size), Verdict.ALIVE)
    frontend = using(Frontend.attach(group, policy=policy))
    board.load[2] = pack_load(50, 50, 0.5)  # 1 would be chosen by each that looks at loads
    for i in range(3 * dp_size):
        route = frontend.route(exclude={1}, key=i)
        assert route.dp_rank != 1
        assert frontend.choose(exclude=[1], key=i) != 1
        route.cancel()
    with pytest.raises(NoEngineAvailable, match="this request excludes"):
        frontend.route(exclude=range(dp_size))
    with pytest.raises(SettingError, match="both named and excluded"):
        frontend.route(dp_rank=1, exclude={1})
    with pytest.raises(NoEngineAvailable, match="this request excludes"):
        frontend.route(exclude=np.arange(dp_size, dtype=np.uint8))
    before = [row["in_flight"] for row in frontend.snapshot().to_dicts()]
    for wrong in ({"1"}, {1.0}, [None], 1, np.array(1)):  # compared as they are, they would exclude no rank
        for call in (frontend.route, frontend.choose):
            with pytest.raises(TypeError):
                call(exclude=wrong)
    assert [row["in_flight"] for row in frontend.snapshot().to_dicts()] == before
    assert not frontend.snapshot()["requests"][0]


def test_a_policy_that_chooses_an_excluded_rank_is_told(board, group, using):
    """Guards against a user's policy that looks past `view.ranks`, and sends a retry where it failed."""
    frontend = using(Frontend.attach(group, policy=lambda view, request: 1))
    assert chosen(frontend) == {1}
    with pytest.raises(SettingError, match=r"chose rank 1, which is not one of \[0\]"):
        frontend.route(exclude={1})
    assert frontend.snapshot()["in_flight"].tolist() == [0, 0]


@pytest.mark.parametrize("dp_size", [2, 40])
def test_a_full_rank_gets_no_request(board, group, using, dp_size):
    """Guards against a server that queues without bound instead of answering 503."""
    board.marks.set_dp_size(dp_size)
    board.mark(range(dp_size), Verdict.ALIVE)
    board.load[0] = pack_load(1, 0, 0.1)
    board.request_offset[0] = 1
    frontend = using(Frontend.attach(group, max_requests=3, exclusive=True))
    other = using(Frontend.attach(group))
    routes = [(frontend if i % 3 else other).route() for i in range(3 * dp_size - 1)]
    assert frontend.snapshot()["requests"].tolist() == [3] * dp_size
    for pinned in (None, 1):
        with pytest.raises(Overloaded, match="has as many requests as max_requests=3 allows") as e:
            frontend.route(dp_rank=pinned)
        assert isinstance(e.value, NoEngineAvailable)
        assert "1: 3 of 3" in str(e.value)
    with pytest.raises(Overloaded):
        frontend.choose()
    assert frontend.snapshot()["requests"].tolist() == [3] * dp_size
    free = routes.pop()
    free.done()
    routes.append(frontend.route())
    assert routes[-1].dp_rank == free.dp_rank
    other.route().cancel()  # it has no limit
    for wrong in (0, 1.5, float("nan"), "64"):
        with pytest.raises(SettingError, match=f"max_requests is {wrong!r}, and must be a whole number"):
            Frontend.attach(group, max_requests=wrong)


@pytest.mark.parametrize("dp_size", [3, 40])
@pytest.mark.parametrize("policy", ["least_loaded", "least_work"])
def test_a_rank_twice_as_fast_gets_twice_as_much(board, group, using, policy, dp_size):
    """Guards against unlike GPUs that get equal shares, so that the slow ones queue."""
    board.marks.set_dp_size(dp_size)
    board.mark(range(dp_size), Verdict.ALIVE)
    frontend = using(Frontend.attach(group, policy=policy, weights={0: 2.0, 2: 0.5}, max_requests=8))
    routes = [frontend.route() for _ in range(4 * (dp_size - 2) + 8 + 2)]
    assert frontend.snapshot()["requests"].tolist() == [8, 4, 2, *[4] * (dp_size - 3)]
    routes += [frontend.route() for _ in range(4 * (dp_size - 2) + 8 + 2)]
    assert frontend.snapshot()["requests"].tolist() == [16, 8, 4, *[8] * (dp_size - 3)]
    with pytest.raises(Overloaded, match="0: 16 of 16, 1: 8 of 8, 2: 4 of 4"):
        frontend.route()
    for wrong in ({0: 0.0}, {0: -1}, {0: float("nan")}, {0: float("inf")}, {40: 1}, {-1: 1}):
        with pytest.raises(SettingError, match="weights has"):
            Frontend.attach(group, weights=wrong)
    del routes


@pytest.mark.parametrize("policy", ["vllm", "round_robin", "affinity", "affinity:epsilon=2"])
def test_weights_that_a_policy_does_not_look_at_are_refused(board, group, using, policy):
    """Guards against unlike GPUs that get equal shares although their weights were given."""
    with pytest.raises(
        SettingError, match=f"{policy.split(':')[0]}.* does not look at weights: choose least_loaded"
    ):
        Frontend.attach(group, policy=policy, weights={0: 2.0})
    assert not board.frontend_incarnation.any()
    using(
        Frontend.attach(group, policy=policy, weights={0: 2.0}, max_requests=8)
    )  # they bound what a rank is sent


def test_a_front_end_that_starts_first_waits_for_its_group(group, using):
    """Guards against API servers that have to be started after their coordinator, and hang if none comes."""
    with pytest.raises(SegmentNotFound):
        Frontend.attach(group, timeout_s=0.1)
    remote = using(Remote())
    remote.begin("frontend = Frontend.attach(group, timeout_s=60)", group=group)
    coordinator = using(Coordinator(group=group, dp_size=1))
    wait_until(lambda: coordinator.board.frontend_alive(0))
    assert remote.eval("frontend.index") == 0


def test_a_snapshot_can_be_serialised(engines, group, using):
    """Guards against a snapshot that a web framework cannot answer with, or a state that is no `State`."""
    engines[1].publish(waiting=2, running=3, kv_cache_usage=0.5)
    rows = json.loads(json.dumps(using(Frontend.attach(group)).snapshot().to_dicts()))
    assert [row["dp_rank"] for row in rows] == [0, 1, 2]
    assert (rows[1]["waiting"], rows[1]["requests"], rows[1]["stock"]) == (2, 5, False)
    assert {State(row["state"]) for row in rows} <= set(State)
    snapshot = using(Frontend.attach(group)).snapshot()
    assert snapshot[:1].to_dicts()[0]["dp_rank"] == 0
    with pytest.raises(SettingError, match="a column has no names"):
        snapshot["waiting"].to_dicts()


def test_the_least_loaded_engine_is_chosen(engines, group, using):
    """Guards against a choice that looks at something else than the load on the board."""
    frontend = using(Frontend.attach(group))
    for loads, best in (((3, 1, 2), 1), ((0, 1, 2), 0), ((9, 9, 8), 2)):
        for engine, running in zip(engines, loads, strict=True):
            engine.publish(waiting=0, running=running)
        assert chosen(frontend) == {best}


def test_bookings_count_at_once_for_everybody(engines, group, using):
    """Guards against API servers that send a burst to one engine because none sees what the others sent."""
    frontends = [using(Frontend.attach(group, owner=f"api-{i}")) for i in range(4)]
    routes = [frontends[i % 4].route(prompt_tokens=10) for i in range(30)]
    assert Counter(route.dp_rank for route in routes) == {0: 10, 1: 10, 2: 10}
    for frontend in frontends:
        seen = frontend.snapshot()
        assert seen["in_flight"].tolist() == [10, 10, 10]
        assert seen["in_flight_tokens"].tolist() == [100, 100, 100]


def test_a_new_frontends_first_booking_is_seen_by_the_others(engines, group, using):
    """Guards against bookings that no front-end counts until the watcher has marked a new front-end alive."""
    frontends, routes = [], []
    for i in range(8):
        frontends.append(using(Frontend.attach(group, owner=f"api-{i}")))
        routes.append(frontends[-1].route(dp_rank=1))
        assert [f.snapshot()[1]["in_flight"] for f in frontends] == [i + 1] * (i + 1)


def test_a_restarted_frontends_first_booking_is_seen_by_the_others(engines, group, using):
    """Guards against a predecessor's verdict that hides the bookings of the row's new holder."""
    observer = using(Frontend.attach(group, owner="observer"))
    remote = using(Remote())
    remote.run("frontend = Frontend.attach(group, owner='api')", group=group)
    index = remote.eval("frontend.index")
    remote.kill()
    wait_until(lambda: frontend_verdict(observer.board, index) is Verdict.DEAD)
    successor = using(Frontend.attach(group, owner="api"))
    assert successor.index == index
    _booked = successor.route(dp_rank=2)
    assert observer.snapshot()[2]["in_flight"] == 1


def test_ties_go_round(engines, group, using):
    """Guards against equal engines of which one always wins, in one front-end or in all of them."""
    frontends = [using(Frontend.attach(group, owner=f"api-{i}")) for i in range(3)]
    assert all(chosen(frontend, 3) == {0, 1, 2} for frontend in frontends)
    first = []
    for frontend in frontends:
        route = frontend.route()
        first.append(route.dp_rank)
        route.cancel()
    assert len(set(first)) > 1


@pytest.mark.parametrize("dp_size", [2, 40])
def test_marks_decide_who_may_be_chosen(board, group, using, dp_size):
    """Guards against an absent, dead, stalled or drained engine that is chosen, with lists and with arrays."""
    marks = board.marks
    marks.set_dp_size(dp_size)
    frontend = using(Frontend.attach(group))
    board.mark(range(dp_size), Verdict.ALIVE)
    everybody = set(range(dp_size))
    assert chosen(frontend, 2 * dp_size) == everybody
    for verdict_ in (Verdict.DEAD, Verdict.STALLED, Verdict.ABSENT):
        marks.set_engine(1, verdict=verdict_)
        assert chosen(frontend, 2 * dp_size) == everybody - {1}
    marks.set_engine(1, verdict=Verdict.ALIVE, drained=True)
    assert chosen(frontend, 2 * dp_size) == everybody - {1}
    marks.set_engine(1, drained=False)
    assert chosen(frontend, 2 * dp_size) == everybody


def test_when_nobody_is_left(board, group, using):
    """Guards against a request that goes to an engine which cannot answer, and an error that does not say why."""
    marks = board.marks
    marks.set_dp_size(4)
    marks.set_engine(0, verdict=Verdict.DEAD)
    marks.set_engine(1, verdict=Verdict.STALLED)
    marks.set_engine(2, verdict=Verdict.ALIVE, drained=True)
    frontend = using(Frontend.attach(group))
    with pytest.raises(NoEngineAvailable, match="0 dead, 1 stalled, 2 drained, 3 absent"):
        frontend.route(prompt_tokens=5)
    assert not board.sent_requests.any()
    assert not board.sent_tokens.any()
    marks.set_engine(3, verdict=Verdict.ALIVE)
    assert frontend.route().dp_rank == 3


def test_a_group_without_ranks(board, group, using):
    """Guards against a division by zero if no rank may be chosen."""
    board.marks.set_dp_size(0)
    frontend = using(Frontend.attach(group))
    with pytest.raises(NoEngineAvailable, match="there are none"):
        frontend.route()


def test_a_pinned_request_is_booked(board, group, using):
    """Guards against requests of a session or a pinned rank that no front-end counts."""
    frontend = using(Frontend.attach(group))
    board.marks.set_engine(0, drained=True)
    board.mark([1], Verdict.STALLED)
    routes = [frontend.route(7, dp_rank=dp_rank) for dp_rank in (0, 1)]
    assert [route.dp_rank for route in routes] == [0, 1]
    assert board.sent_requests[0, :2].tolist() == [1, 1]
    assert board.sent_tokens[0, :2].tolist() == [7, 7]
    board.mark([1], Verdict.DEAD)
    with pytest.raises(NoEngineAvailable, match="engine 1"):
        frontend.route(dp_rank=1)
    for outside in (-1, 2):
        with pytest.raises(SettingError, match="0 to 1"):
            frontend.route(dp_rank=outside)
    assert board.sent_requests.sum() == 2


def test_ranks_restrict_the_choice(board, group, using):
    """Guards against a front-end of another node, or behind a balancer, that takes an engine not its own."""
    frontend = using(Frontend.attach(group, ranks=[1]))
    assert chosen(frontend) == {1}
    with pytest.raises(SettingError, match=r"\[1\]"):
        frontend.route(dp_rank=0)
    board.mark([1], Verdict.DEAD)
    with pytest.raises(NoEngineAvailable, match=r"this front-end may choose \[1\] alone"):
        frontend.route()


@pytest.mark.parametrize("ranks", [[], [-1], [0, 40]])
def test_ranks_that_cannot_be(board, group, ranks):
    """Guards against a restriction that leaves nothing, or is silently ignored."""
    with pytest.raises(SettingError, match="0 to 39"):
        Frontend.attach(group, ranks=ranks)


def test_a_group_that_grows_and_shrinks(board, group, using):
    """Guards against a front-end that keeps to the size the group had when it attached."""
    frontend = using(Frontend.attach(group))
    assert chosen(frontend) == {0, 1}
    for dp_size in (3, 40, 2):
        board.mark(range(dp_size), Verdict.ALIVE)
        board.marks.set_dp_size(dp_size)
        assert chosen(frontend, 2 * dp_size) == set(range(dp_size))


def test_a_policy_of_ones_own(board, group, using):
    """Guards against policies that see another order, another front-end's numbers, or stale ones."""
    seen = []

    def last(view, request):
        seen.append((sorted(view.ranks), list(view.requests), list(view.own)[:2], request.prompt_tokens))
        return 1

    board.load[:2] = [pack_load(1, 2, 0.5), pack_load(0, 4, 0.0)]
    board.request_offset[:2] = [3, 4]
    frontend = using(Frontend.attach(group, policy=last))
    _booked = frontend.route(prompt_tokens=9)
    frontend.route()
    assert seen == [([0, 1], [3, 4], [0, 0], 9), ([0, 1], [3, 5], [0, 1], 0)]


@pytest.mark.parametrize("dp_size", [2, 40])
@pytest.mark.parametrize("policy", [*NAMES, "a user's", "derived"])
def test_attach_rehearses_a_decision_and_leaves_nothing_behind(group, using, monkeypatch, policy, dp_size):
    """Guards against a first request that pays for what is done once, and against a trace of the rehearsal."""
    board = using(LoneBoard(group, engines=40, dp_size=dp_size, waves=False))
    board.mark(range(dp_size), Verdict.ALIVE)
    for e in range(dp_size):  # step models that all share: least_work has a short way
        for i, word in enumerate((0, 0, 0, 1_000_000, 1000, 100, 0, 256, 0, 10)):
            board.step_model[e, i] = word
    calls, views = [], []
    read = ViewReader.read
    monkeypatch.setattr(ViewReader, "read", lambda self, *a, **k: views.append(1) or read(self, *a, **k))

    class Derived(LeastWork):
        """Counts its calls."""

        def __call__(self, view, request):
            calls.append(request)
            return super().__call__(view, request)

    def own(view, request):
        calls.append(request)
        return view.ranks[0]

    given = {"a user's": own, "derived": Derived()}.get(policy, policy)
    frontend = using(Frontend.attach(group, policy=given, record=True))
    assert len(views) == 1
    assert (calls, frontend._decisions.recorder._written) == ([], 0)
    assert frontend._decisions.next_refresh_ns == 0
    assert not board.sent_requests.any()
    assert board.routed[frontend.index] == 0
    monkeypatch.setattr(Decisions, "rehearse", lambda _: None)
    other = using(Frontend.attach(group, policy=given))  # of another row, which begins elsewhere: what it would be
    other._decisions.reader._number = frontend._decisions.reader._number
    other._decisions.reader.rewind()
    assert [frontend.choose() for _ in range(5)] == [other.choose() for _ in range(5)]


def test_attach_to_full_ranks(board, group, using):
    """Guards against a front-end that cannot start while the others have filled all ranks."""
    board.mark(range(2), Verdict.ALIVE)
    board.load[:2] = pack_load(9, 9, 0.5)
    board.request_offset[:2] = 18
    frontend = using(Frontend.attach(group, max_requests=4))
    with pytest.raises(Overloaded):
        frontend.route()


@pytest.mark.parametrize("answer", [2, -1, None, 0.5, [0], np.array(0), {0: 1}], ids=repr)
def test_a_policy_that_is_wrong(board, group, using, answer):
    """Guards against a policy's mistake that books at a rank that cannot take it, or leaves the lock held."""
    answers = [answer, 0]
    frontend = using(Frontend.attach(group, policy=lambda view, request: answers.pop(0)))
    with pytest.raises(SettingError, match="the policy chose"):
        frontend.route(5)
    assert not board.sent_requests.any()
    assert frontend.route().dp_rank == 0


def test_a_policy_that_raises(board, group, using):
    """Guards against an error in a policy that leaves the lock held and stops every later request."""
    answers = [0, 1]
    frontend = using(Frontend.attach(group, policy=lambda view, request: 1 // answers.pop(0)))
    with pytest.raises(ZeroDivisionError):
        frontend.route(5)
    assert not board.sent_requests.any()
    assert frontend.route().dp_rank == 1


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "vllm"])
@pytest.mark.parametrize("dp_size", [2, 40])
def test_every_policy_by_name(board, group, using, policy, dp_size):
    """Guards against a policy that works on lists alone, or on arrays alone."""
    board.mark(range(dp_size), Verdict.ALIVE)
    board.marks.set_dp_size(dp_size)
    frontend = using(Frontend.attach(group, policy=policy))
    routes = [frontend.route() for _ in range(3 * dp_size)]
    assert Counter(route.dp_rank for route in routes) == dict.fromkeys(range(dp_size), 3)


def test_a_policy_that_does_not_exist(board, group):
    """Guards against a typing error that silently takes the default."""
    with pytest.raises(SettingError, match="least_loaded"):
        Frontend.attach(group, policy="fastest")


# Booking.


def test_route_done_and_cancel(board, group, using):
    """Guards against counts that the end of a request does not bring back, or brings back twice."""
    frontend = using(Frontend.attach(group))
    first, second = frontend.route(5, dp_rank=0), frontend.route(6, dp_rank=0)
    assert "dp_rank=0" in repr(first)
    first.cancel()
    first.cancel()
    first.done()
    assert (board.sent_requests[0, 0], board.sent_tokens[0, 0]) == (1, 6)
    second.done()
    second.cancel()
    assert (board.sent_requests[0, 0], board.sent_tokens[0, 0]) == (0, 0)
    third = frontend.route(0, dp_rank=0)
    assert third.prompt_tokens == 0
    assert board.sent_requests[0, 0] == 1
    assert board.routed[0] == 3


def test_a_request_that_never_arrived_heals_with_the_next_end(board, group, using):
    """Guards against bookings of lost requests that make an engine look busy for ever."""
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    lost, arrives = frontend.route(100, dp_rank=0), frontend.route(7, dp_rank=0)
    engine.receive(frontend.index, 7)
    engine.publish(waiting=1, running=0)
    lost.done()
    assert frontend.snapshot()[0]["in_flight"] == 1  # it cannot know yet which of the two arrived
    engine.publish(waiting=0, running=0)
    arrives.done()
    assert (board.sent_requests[0, 0], board.sent_tokens[0, 0]) == (1, 7)
    assert frontend.snapshot()[0]["requests"] == 0


def test_a_booking_on_top_of_a_predecessors_late_message(board, group, using):
    """Guards against a request that is not counted because another one, unbooked, arrived before it.

    A message of a request that was aborted while in flight (or of the row's previous holder) makes the engine
    count one more than was ever sent; the next booking has to start from there.
    """
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    frontend.route(10, dp_rank=0).done()  # aborted at once; its message is still in flight
    engine.receive(frontend.index, 10)
    engine.publish(waiting=0, running=0)
    _booked = frontend.route(20, dp_rank=0)
    seen = frontend.snapshot()[0]
    assert (seen["in_flight"], seen["in_flight_tokens"]) == (1, 20)


@pytest.mark.parametrize("prompt_tokens", [1 << 70, "12", 1.5])
def test_an_argument_that_cannot_be_booked(board, group, using, prompt_tokens):
    """Guards against half a booking, which would poison every later one at that engine."""
    frontend = using(Frontend.attach(group, policy=lambda view, request: 0))
    try:
        route = frontend.route(prompt_tokens)
    except (SettingError, TypeError, ValueError):
        assert not board.sent_requests.any()
    else:
        route.cancel()
    frontend.route(10).done()
    assert (board.sent_requests[0, 0], board.sent_tokens[0, 0]) == (0, 0)


def test_many_threads_book_and_finish(board, group, using):  # noqa: C901 - threads in one scenario
    """Guards against bookings that threads lose or double between a load and a store."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group))
    inboxes = [[], []]  # append and pop are atomic
    finished = threading.Event()

    def api_server(seed):
        rng = random.Random(seed)
        opened = []
        for _ in range(150):
            route = frontend.route(rng.randrange(100), dp_rank=rng.choice([None, None, 0, 1]))
            if rng.random() < 0.1:
                route.cancel()
                continue
            inboxes[route.dp_rank].append(route.prompt_tokens)
            opened.append(route)
            if rng.random() < 0.7:
                opened.pop(rng.randrange(len(opened))).done()
        for route in opened:
            route.done()

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(api_server, seed) for seed in range(8)]
        while not all(f.done() for f in futures) or any(inboxes):
            for engine, inbox in zip(engines, inboxes, strict=True):
                for _ in range(len(inbox)):
                    engine.receive(frontend.index, inbox.pop())
                engine.publish(waiting=0, running=0)
        for future in futures:
            future.result()
    finished.set()
    assert frontend._row.own[:2] == [0, 0]
    for dp_rank in (0, 1):
        frontend.route(dp_rank=dp_rank).cancel()  # any end settles the rank
        assert board.sent_requests[0, dp_rank] == board.received_requests[dp_rank, 0]
        assert board.sent_tokens[0, dp_rank] == board.received_tokens[dp_rank, 0]
    assert board.routed[0] == 8 * 150 + 2


def test_a_request_that_ends_inside_route(board, group):
    """Guards against a deadlock: the collector or a signal may end a request in the thread that is routing."""
    ended = []

    class Stream:
        """A response in a reference cycle, as a cancelled task leaves it: the collector finishes it."""

        def __init__(self, route):
            self.me, self.route = self, route

        def __del__(self):
            self.route.done()
            ended.append(self.route.dp_rank)

    def policy(view, request):
        gc.collect()
        return 0

    frontend = Frontend.attach(group, policy=policy)
    Stream(frontend.route(5))
    routing = threading.Thread(target=frontend.route, daemon=True)
    routing.start()
    routing.join(TIMEOUT_S)
    assert not routing.is_alive()
    assert ended == [0]
    frontend.close()


# Rows.


def test_a_restart_gets_the_same_row_when_nothing_is_in_flight(engines, group, using):
    """Guards against rows that run out with every restart, and engines that lose track of a front-end."""
    Frontend.attach(group, owner="other").close()
    other = using(Frontend.attach(group, owner="other"))
    first = Frontend.attach(group, owner="api")
    route = first.route(10, dp_rank=0)
    engines[0].receive(first.index, 10)
    engines[0].publish(waiting=1, running=0)
    route.done()
    first.close()
    second = using(Frontend.attach(group, owner="api"))
    assert (other.index, first.index, second.index) == (0, 1, 1)
    assert second.board.owner_of(1) == "api"
    assert second.board.frontend_incarnation[1] == 2
    assert second.snapshot()["in_flight"].tolist() == [0, 0, 0]


def test_a_restart_gets_another_row_when_something_is_in_flight(engines, group, using):
    """Guards against a late message of the predecessor that is taken for one of its successor."""
    first = Frontend.attach(group, owner="api")
    _booked = first.route(10, dp_rank=0)
    first.close()
    second = using(Frontend.attach(group, owner="api"))
    assert (first.index, second.index) == (0, 1)
    engines[0].receive(first.index, 10)
    engines[0].publish(waiting=1, running=0)
    assert second.snapshot()["in_flight"].tolist() == [0, 0, 0]
    third = using(Frontend.attach(group, owner="api"))
    assert third.index == 0


def test_messages_to_a_dead_engine_do_not_keep_a_row(coordinator, group, using):
    """Guards against rows that stay unusable because an engine died with messages that no process will receive."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    first = Frontend.attach(group, owner="api")
    _booked = first.route(dp_rank=0)
    first.close()
    remote.kill()
    wait_until(lambda: not coordinator.board.engine_alive(0))
    assert using(Frontend.attach(group, owner="api")).index == 0


def test_rows_run_out(coordinator, group, using):
    """Guards against two front-ends in one row; unsettled rows are better than none."""
    frontends = [Frontend.attach(group, owner=f"api-{i}") for i in range(8)]
    assert [f.index for f in frontends] == list(range(8))
    with pytest.raises(CapacityExceeded, match="all 8"):
        Frontend.attach(group)
    with using(Engine.attach(group, 0)):
        _booked = frontends[5].route(dp_rank=0)
        frontends[5].close()
        frontends[5] = Frontend.attach(group, owner="late")
        assert frontends[5].index == 5
    for frontend in frontends:
        frontend.close()


def test_two_at_once_never_share_a_row(coordinator, group, using):
    """Guards against the race of two front-ends that start together."""
    with ThreadPoolExecutor(8) as pool:
        frontends = list(pool.map(lambda i: using(Frontend.attach(group, owner="same")), range(8)))
    assert sorted(f.index for f in frontends) == list(range(8))


@pytest.mark.parametrize("owner", ["x" * 49, "ü" * 25, "a\0b"])
def test_an_owner_that_does_not_fit(coordinator, group, owner):
    """Guards against a name that is cut, after which two front-ends look the same."""
    with pytest.raises(SettingError, match="48 bytes"):
        Frontend.attach(group, owner=owner)


def test_owners_are_kept_whole(coordinator, group, using):
    """Guards against a name whose bytes come back in another order, or with the sign of a word lost."""
    owner = "ü€😀" + "z" * 39
    frontend = using(Frontend.attach(group, owner=owner))
    assert frontend.board.owner_of(frontend.index) == frontend.owner == owner
    named = using(Frontend.attach(group))
    assert str(os.getpid()) in named.board.owner_of(named.index)


def test_close_takes_the_bookings_out_of_the_sums(engines, group, using):
    """Guards against a front-end that left and whose lost requests weigh on an engine for ever."""
    observer, frontend = (using(Frontend.attach(group, owner=name)) for name in ("observer", "api"))
    _booked = frontend.route(10, dp_rank=0)
    assert observer.snapshot()[0]["in_flight"] == 1
    frontend.close()
    frontend.close()
    wait_until(lambda: observer.snapshot()[0]["in_flight"] == 0)


def test_no_such_group(group):
    """Guards against a missing coordinator that shows as anything but a clear error."""
    with pytest.raises(SegmentNotFound, match=group):
        Frontend.attach(group)


# How a handle may be used.


def test_closed(engines, group):
    """Guards against use of memory that is not there any more."""
    frontend = Frontend.attach(group)
    route, cancelled = frontend.route(), frontend.route()
    frontend.close()
    for use in (frontend.route, frontend.snapshot):
        with pytest.raises(HandleClosed, match=group):
            use()
    route.done()
    cancelled.cancel()


def test_a_second_close_leaves_the_successor_alone(engines, group, using):
    """Guards against two threads that close one handle: the later would write into another's row."""
    first = Frontend.attach(group, owner="api")
    begun = threading.Event()

    def close():
        begun.set()
        first.close()

    with ThreadPoolExecutor(1) as pool, first._lock:
        closing = pool.submit(close)
        begun.wait()
        time.sleep(0.05)  # it waits for the lock by now
        first.close()
        second = using(Frontend.attach(group, owner="api"))
        assert second.index == first.index
    closing.result()
    assert second.board.frontend_pid[second.index] == os.getpid()


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("what", ["frontend.route().done()", "frontend.snapshot()", "frontend.health()"])
def test_close_while_other_threads_use_it(engines, group, using, what, watched):
    """Guards against a server that ends with a crash, or with errors of released memory, when it shuts down.

    In a process of its own, because memory that is unmapped under a reader ends the process.
    """
    remote = using(Remote())
    remote.run(f"def use(frontend): {what}")
    if not watched:  # then it asks the locks itself
        remote.run("from dpshm.board import presence\npresence.COORDINATOR_SILENCE_NS = 0")
    remote.run(
        """
def user(frontend, begun, ended):
    begun.wait()
    try:
        while True:
            use(frontend)
    except Exception as e:
        ended.append(type(e).__name__)

ended = []
for _ in range(5):
    frontend, begun = Frontend.attach(group), threading.Barrier(5)
    users = [threading.Thread(target=user, args=(frontend, begun, ended)) for _ in range(4)]
    for thread in users:
        thread.start()
    begun.wait()
    time.sleep(0.02)
    frontend.close()
    for thread in users:
        thread.join()
""",
        group=group,
    )
    assert Counter(remote.eval("ended")) == {"HandleClosed": 20}


def test_arrays_outlive_the_handle(engines, group, using):
    """Guards against memory that is unmapped under an array that is still in use, which ends the process."""
    remote = using(Remote())
    remote.run("board = Board.attach(group)\nload = board.load\nboard.close()", group=group)
    assert remote.eval("load.tolist()") == [0] * 8


def test_a_forked_child_may_not_use_it(coordinator, engines, group, using):
    """Guards against a child that books in its parent's row, or that hangs in a lock held when it was forked."""
    remote = using(Remote())
    remote.run(
        """
frontend = Frontend.attach(group)
route = frontend.route(dp_rank=0)
read_end, write_end = os.pipe()
frontend._lock.acquire()  # as if another thread were routing at this moment
if (child := os.fork()) == 0:
    signal.alarm(5)
    said = []
    for use in (frontend.route, frontend.snapshot):
        try:
            use()
        except HandleForked as e:
            said.append("attach after the fork" in str(e))
    route.done()
    frontend.close()
    os.write(write_end, repr(said).encode())
    os._exit(0)
frontend._lock.release()
os.close(write_end)
said = os.read(read_end, 1000)
os.waitpid(child, 0)
""",
        group=group,
    )
    assert remote.eval("said") == b"[True, True]"
    assert coordinator.board.sent_requests[remote.eval("frontend.index"), 0] == 1
    assert remote.eval("frontend.route(dp_rank=1).dp_rank") == 1


def test_a_child_that_outlives_its_frontend_does_not_keep_the_row(coordinator, engines, group, using):
    """Guards against bookings of a dead front-end that count because a child has its descriptors."""
    remote = using(Remote())
    remote.run(
        """
frontend = Frontend.attach(group, owner="api")
_booked = frontend.route(dp_rank=0)
if (child := os.fork()) == 0:
    signal.pause()
    os._exit(0)
""",
        group=group,
    )
    index, child = remote.eval("(frontend.index, child)")
    wait_until(lambda: frontend_verdict(coordinator.board, index) is Verdict.ALIVE)
    try:
        remote.kill()
        wait_until(lambda: frontend_verdict(coordinator.board, index) is Verdict.DEAD)
        assert not gone(child)
        assert coordinator.board.snapshot()[0]["in_flight"] == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_left_open(engines, group):
    """Guards against descriptors and threads that pile up over restarts in one process."""

    def cycle():
        with Frontend.attach(group) as frontend:
            frontend.route().cancel()
        with pytest.raises(SettingError):
            Frontend.attach(group, ranks=[99])

    cycle()
    before, threads = count_fds(), count_threads()
    for _ in range(30):
        cycle()
    wait_until(lambda: count_fds() <= before)  # ZMQ closes in its own thread
    assert count_threads() <= threads


# Waves.


def test_routes_are_stamped_with_the_wave(board, group, using):
    """Guards against requests whose stamp is older than what the front-end could know."""
    frontend = using(Frontend.attach(group))
    for wave, phase in ((0, Phase.PAUSED), (4, Phase.RUNNING), (7, Phase.WAKING)):
        board.control[0] = pack_control(wave, phase)
        assert frontend.route().wave == wave


def test_a_paused_group_is_woken(coordinator, engines, group, using):
    """Guards against a group that sleeps until the engine which got the request has woken it."""
    frontend = using(Frontend.attach(group))
    _booked = frontend.route(dp_rank=2)
    wait_until(lambda: coordinator.board.phase is Phase.WAKING)
    for engine in engines:
        wait_until(lambda engine=engine: engine.poll(10))
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    assert coordinator.board.words[coordinator.board.index("messages_dropped")] == 0


def test_a_running_group_is_left_alone(board, group, using):
    """Guards against a message for every request."""
    board.control[0] = pack_control(1, Phase.RUNNING)
    frontend = using(Frontend.attach(group))
    frontend.route()
    assert frontend._decisions.wakeup._socket is None


def test_dense_ranks_are_not_woken(group, using):
    """Guards against wave messages in a group that has no waves."""
    using(LoneBoard(group, waves=False))
    frontend = using(Frontend.attach(group))
    frontend.route()
    assert frontend._decisions.wakeup._socket is None


def test_it_never_waits_for_a_coordinator(board, group, using):
    """Guards against a server that stops when wake-ups pile up at a coordinator that is gone."""
    frontend = using(Frontend.attach(group))
    for _ in range(3000):  # more than a socket's queue holds; each sends one, for the group stays paused
        frontend.route().done()
    assert board.routed[0] == 3000


# Without a coordinator.


def test_without_a_coordinator_locks_decide(group, using):
    """Guards against routing to dead engines while no coordinator sets verdicts."""
    using(LoneBoard(group, dp_size=3, watched=False))
    remotes = [using(Remote()) for _ in range(2)]
    for dp_rank, remote in enumerate(remotes):
        remote.run("engine = Engine.attach(group, dp_rank)", group=group, dp_rank=dp_rank)
    frontend = using(Frontend.attach(group))
    assert chosen(frontend) == {0, 1}
    remotes[0].kill()
    wait_until(lambda: chosen(frontend) == {1})
    with pytest.raises(NoEngineAvailable):
        frontend.route(dp_rank=0)
    engine = using(Engine.attach(group, 2))
    wait_until(lambda: chosen(frontend) == {1, 2})
    remotes[1].kill()
    engine.close()

    def none_eligible():
        try:
            frontend.route().cancel()
        except NoEngineAvailable:
            return True

    wait_until(none_eligible)


def test_without_a_coordinator_the_error_tells_what_the_locks_tell(group, using):
    """Guards against an error that calls engines absent, or running, which the front-end itself found dead."""
    using(LoneBoard(group, watched=False))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    remote.kill()
    frontend = using(Frontend.attach(group))
    with pytest.raises(NoEngineAvailable, match="0 dead, 1 absent"):
        frontend.route()


def test_without_a_coordinator_dead_frontends_do_not_count(group, using):
    """Guards against a dead front-end's lost requests that weigh on an engine until a coordinator comes."""
    using(LoneBoard(group, watched=False))
    using(Engine.attach(group, 0)).publish(waiting=0, running=1)
    using(Engine.attach(group, 1)).publish(waiting=0, running=0)
    remote = using(Remote())
    remote.run("frontend = Frontend.attach(group)", group=group)
    seen = []

    def policy(view, request):
        seen.append(list(view.requests))
        return 0

    frontend = using(Frontend.attach(group, policy=policy))
    remote.run("routes = [frontend.route(dp_rank=1) for _ in range(5)]")
    frontend.route().cancel()
    assert seen[-1] == [1, 5]
    assert frontend.snapshot()["requests"].tolist() == [1, 5]  # what it sees is what it decides from
    remote.kill()

    def forgotten():
        frontend.route().cancel()
        return seen[-1] == [1, 0]

    wait_until(forgotten)


def test_without_a_coordinator_ones_own_bookings_count(group, using):
    """Guards against a front-end that cannot see its own lock, takes itself for dead and sends a burst to one."""
    using(LoneBoard(group, watched=False))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    engines[1].publish(waiting=0, running=4)
    frontend = using(Frontend.attach(group))
    routes = [frontend.route(10) for _ in range(12)]
    assert Counter(route.dp_rank for route in routes) == {0: 8, 1: 4}
    seen = frontend.snapshot()
    assert seen["in_flight"].tolist() == [8, 4]
    assert seen["verdict"].tolist() == ["alive", "alive"]


def test_an_engine_without_a_coordinator_sees_itself(group, using):
    """Guards against an engine whose own snapshot calls it dead."""
    using(LoneBoard(group, watched=False))
    engine = using(Engine.attach(group, 0))
    assert engine.board.snapshot()["verdict"].tolist() == ["alive", "absent"]


def test_a_stalled_engine_without_a_coordinator(group, using):
    """Guards against an engine that moves again and is never chosen, because who called it stalled is gone."""
    board = using(LoneBoard(group, watched=False))
    engine = using(Engine.attach(group, 0))
    board.mark([0], Verdict.STALLED)
    frontend = using(Frontend.attach(group))
    engine.publish(waiting=0, running=1)
    wait_until(lambda: not frontend.route(dp_rank=0).cancel())
    assert chosen(frontend) == {0}


@pytest.mark.parametrize("dp_size", [8, 40])
def test_what_a_policy_sees_has_the_groups_size(board, group, using, dp_size):
    """Guards against columns of the board's capacity beside those of the group's size."""
    board.mark(range(dp_size), Verdict.ALIVE)
    board.marks.set_dp_size(dp_size)
    sizes = []

    def policy(view, request):
        sizes.append({len(a) for a in (view.ranks, view.waiting, view.in_flight, view.requests, view.own)})
        return dp_size - 1

    frontend = using(Frontend.attach(group, policy=policy))
    assert frontend.route().dp_rank == dp_size - 1
    assert sizes == [{dp_size}]


def test_choose_books_nothing(board, group, using):
    """Guards against a question that changes the answer: `choose` only looks."""
    frontend = using(Frontend.attach(group))
    board.load[0], board.request_offset[0] = pack_load(5, 0, 0.0), 5
    assert frontend.choose(100) == 1
    assert frontend.choose(100) == 1
    route = frontend.route(100)
    assert route.dp_rank == 1
    assert board.sent_requests[frontend.index, :2].tolist() == [0, 1]


def test_a_route_may_leave_the_wake_up_to_its_caller(coordinator, engines, group, using):
    """Guards against ranks that wake up before their request has come, and go back to sleep: vLLM's since 0.32."""
    frontend = using(Frontend.attach(group))
    frontend.route(wake=False)
    frontend.route(dp_rank=1, wake=False)
    assert frontend._decisions.wakeup._socket is None
    assert not any(engine.poll(50) for engine in engines)
    frontend.wake()
    wait_until(lambda: all(engine.poll(10) for engine in engines))


def test_wake_wakes_paused_ranks_without_a_booking(coordinator, engines, group, using):
    """Guards against a request that is sent past `route` and leaves the other ranks asleep."""
    frontend = using(Frontend.attach(group))
    frontend.wake()
    wait_until(lambda: all(engine.poll(10) for engine in engines))
    assert not coordinator.board.sent_requests.any()


@pytest.mark.parametrize("wrong", [{"owner": 5}, {"owner": b"api"}, {"owner": "a\0"}, {"timeout_s": float("nan")}])
def test_an_argument_of_attach_that_is_none_is_refused_by_its_name(group, board, wrong):
    """Guards against an AttributeError of a line that the caller never wrote, and a wait that never ends."""
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Frontend.attach(group, **wrong)
    assert not board.frontend_alive(0)


def test_an_owner_named_after_a_file_that_is_no_utf8(group, board, using):
    """A name of bytes that are no text is taken, escaped."""
    frontend = using(Frontend.attach(group, owner="api-\udcff"))
    assert board.owner_of(frontend.index) == "api-\\udcff"
