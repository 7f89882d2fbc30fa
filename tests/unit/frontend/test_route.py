"""Tests of `dpshm.frontend.route`: how a booking ends, also one that its owner forgot."""

from __future__ import annotations

import gc
import logging
import signal
import threading

import numpy as np
import pytest

from dpshm import Frontend
from dpshm.errors import SettingError
from dpshm.rules.hashing import key_of
from dpshm.rules.waves import CoordinatorState, Phase
from tests.support import LoneBoard, interrupted, wait_until


@pytest.fixture
def board(group, using):
    """A board of two ranks, both alive, without a coordinator."""
    return using(LoneBoard(group, engines=8))


@pytest.fixture
def frontend(board, group, using):
    """Its one front-end."""
    return using(Frontend.attach(group))


def booked(board):
    """Requests and tokens that are booked at rank 0."""
    return int(board.sent_requests[0, 0]), int(board.sent_tokens[0, 0])


class SendError(Exception):
    """What a test's sending raises."""


def raise_once_received(board, route):
    """Says that a request was sent, has it received, and raises."""
    route.sent()
    receive(board, route.prompt_tokens)
    raise SendError


def receive(board, tokens):
    """Stores, as rank 0's engine would, that it received one request."""
    board.received_tokens[0, 0] += tokens
    board.received_requests[0, 0] += 1


def test_a_block_that_is_left_ends_the_booking(board, frontend):
    """Guards against a request that finished and stays booked because its owner left it to the block."""
    for say_sent in (False, True):
        with frontend.route(5, dp_rank=0) as route:
            assert booked(board) == (1, 5)
            if say_sent:
                route.sent()
        assert not route.open
        assert booked(board) == (0, 0)


def test_an_exception_before_the_request_was_sent_cancels(board, frontend):
    """Guards against a request that was never sent and counts as in flight while another one is."""
    other = frontend.route(7, dp_rank=0)
    running = frontend.route(3, dp_rank=0)
    receive(board, 3)
    with pytest.raises(SendError), frontend.route(5, dp_rank=0):
        raise SendError
    assert booked(board) == (2, 10)  # done would have left it: another unfinished request may be the one received
    running.done()
    other.done()
    assert booked(board) == (1, 3)


def test_an_exception_after_the_request_was_sent_does_not_cancel(board, frontend):
    """Guards against a sent request whose booking is taken back, which hides another one that is in flight."""
    other = frontend.route(7, dp_rank=0)
    route = frontend.route(5, dp_rank=0)
    with pytest.raises(SendError), route:
        raise_once_received(board, route)
    assert booked(board) == (2, 12)  # cancelled, it would show one request: the one received
    other.done()
    assert booked(board) == (1, 5)


def test_a_block_ends_a_booking_once(board, frontend):
    """Guards against a booking that the block takes back a second time."""
    other = frontend.route(7, dp_rank=0)
    with frontend.route(5, dp_rank=0) as route:
        route.cancel()
        assert booked(board) == (1, 7)
    assert booked(board) == (1, 7)
    other.done()


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_collected_route_gives_its_booking_back(board, frontend, caplog, in_a_cycle):
    """Guards against a forgotten Route whose booking weighs on an engine for ever, and a log line for each."""
    for _ in range(3):
        route = frontend.route(5, dp_rank=0)
        if in_a_cycle:
            cycle = [route]
            cycle.append(cycle)
            del cycle
        assert booked(board) == (1, 5)
        del route
        gc.collect()
        assert booked(board) == (0, 0)
    frontend.choose()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "route.done()" in warnings[0]
    assert "with frontend.route(...)" in warnings[0]


def test_routes_that_ended_are_collected_in_silence(board, frontend, caplog):
    """Guards against warnings for those who do as they should."""
    frontend.route(5, dp_rank=0).done()
    frontend.route(5, dp_rank=0).cancel()
    with frontend.route(5, dp_rank=0):
        pass
    gc.collect()
    frontend.choose()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_closed_front_ends_routes_are_collected_in_silence(board, group, caplog):
    """Guards against a finalizer that writes into a row which another front-end may have locked by now."""
    frontend = Frontend.attach(group)
    route = frontend.route(5, dp_rank=0)
    frontend.close()
    del route
    gc.collect()
    assert booked(board) == (1, 5)  # a row that was left counts no more, and keeps its words
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_finalizer_never_waits_for_the_lock(board, group, using):
    """Guards against a deadlock: the collector runs in a thread with a lock for which the routing thread waits."""
    ends, goes_on = threading.Event(), threading.Event()

    def policy(view, request):
        ends.set()
        assert goes_on.wait(60)
        return 1

    frontend = using(Frontend.attach(group, policy=policy))
    forgotten = [frontend.route(5, dp_rank=0)]
    routes = []
    routing = threading.Thread(target=lambda: routes.append(frontend.route(6)), daemon=True)
    routing.start()
    assert ends.wait(60)
    forgotten.clear()  # in this thread, while the other one has the lock
    assert booked(board) == (1, 5)
    goes_on.set()
    routing.join(60)
    assert booked(board) == (0, 0)  # the thread that had the lock has settled it
    assert [route.dp_rank for route in routes] == [1]


def test_a_signal_may_end_requests_within_any_booking(board, frontend):
    """Guards against sums that a signal handler breaks when it ends a request between a load and a store.

    A timer interrupts the thread at whatever instruction it is; the handler ends requests in each way.
    """
    opened = []
    ended = 0

    def end_one(signum, frame):
        nonlocal ended
        try:
            route = opened.pop()
        except IndexError:  # not asked before: the next signal may interrupt this function, and take the last one
            return
        ended += 1
        if ended % 3 == 0:
            route.done()
        elif ended % 3 == 1:
            route.cancel()

    before = signal.signal(signal.SIGALRM, end_one)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while ended < 300:
            opened.append(frontend.route(5, dp_rank=0))
            frontend.route(3, dp_rank=0).done()
            frontend.route(2, dp_rank=0).cancel()
            if len(opened) > 20:
                opened.clear()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    opened.clear()
    assert frontend._row.own[0] == 0
    assert booked(board) == (0, 0)


@pytest.mark.parametrize("form", ["route", "pinned", "exclusive", "asleep", "prompt"])
def test_an_interrupted_route_leaves_no_booking(board, group, using, form):
    """Guards against a request that a signal handler's exception (Ctrl-C, a timeout) leaves booked for ever."""
    frontend = using(Frontend.attach(group, exclusive=form == "exclusive"))
    if form != "asleep":
        board.marks.set_control(CoordinatorState(0, Phase.RUNNING))
    arguments = {"prompt_tokens": 7}
    if form == "prompt":
        arguments = {"prompt": list(range(7))}
    elif form != "route":
        arguments["dp_rank"] = 0
    at, went_through = 0, False
    while not went_through:
        at += 1
        routes = []
        went_through = not interrupted(lambda routes=routes: routes.append(frontend.route(**arguments)), at)
        routes.clear()
        gc.collect()
        assert frontend.snapshot()["requests"].tolist() == [0, 0], f"at call {at}"
        assert frontend.snapshot()["prefill_backlog"].tolist() == [0, 0], f"at call {at}"
        assert frontend._row.own == [0] * board.engines
    assert at > 5  # there were places to interrupt it


@pytest.mark.parametrize("end", ["done", "cancel"])
def test_an_interrupted_end_can_be_done_again(board, frontend, end):
    """Guards against a Route that is closed and still booked, and one that is ended twice."""
    at, went_through = 0, False
    while not went_through:
        at += 1
        with frontend.route(7, dp_rank=0), frontend.route(5, dp_rank=0) as route:
            went_through = not interrupted(getattr(route, end), at)
            assert booked(board) == ((2, 12) if route.open else (1, 7 if end == "cancel" else 12))
            getattr(route, end)()
            assert booked(board)[0] == 1
        assert booked(board) == (0, 0)
    assert at > 2


def test_an_interrupted_settlement_is_done_later(board, frontend):
    """Guards against the booking of a collected Route that an interruption of the next call loses."""
    for at in range(1, 40):
        routes = [frontend.route(7, dp_rank=0) for _ in range(3)]
        with frontend._lock:
            threading.Thread(target=routes.clear).start()
            wait_until(lambda: len(frontend._bookings._collected) == 3)
        interrupted(frontend._bookings.heal, at)
        frontend.choose()
        assert booked(board) == (0, 0)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, np.int64])
def test_integers_of_numpy(board, group, using, kind):
    """Guards against a rank that numpy chose: it was booked, and then its wake-up could not be encoded."""
    frontend = using(Frontend.attach(group, ranks=np.arange(2, dtype=kind)))
    with frontend.route(kind(100), dp_rank=kind(1), key=kind(7)) as route:
        assert (type(route.dp_rank), type(route.prompt_tokens)) == (int, int)
        assert int(board.sent_tokens[0, 1]) == 100
    assert key_of(kind(7)) == key_of(7)
    for wrong in (1.5, [1], object()):
        with pytest.raises(TypeError, match=r"key .* must be an int, a str or bytes"):
            key_of(wrong)


@pytest.mark.parametrize("wrong", [1.0, "1", None, [1], np.float64(1), np.array([1, 2])])
def test_what_is_no_integer_is_refused(board, frontend, wrong):
    """Guards against an argument that is found to be wrong after the booking."""
    with pytest.raises(TypeError):
        frontend.route(wrong)
    if wrong is not None:
        with pytest.raises(TypeError):
            frontend.route(5, dp_rank=wrong)
    assert booked(board) == (0, 0)
    assert int(board.sent_requests[0, 1]) == 0


# Latencies.


@pytest.mark.parametrize("queue_s", [-0.1, float("nan"), float("inf"), 1e9])
def test_a_time_in_the_queue_that_cannot_be_is_refused(frontend, queue_s):
    """Guards against a figure that no clock gave, and which spoils every sum from then on."""
    route = frontend.route(dp_rank=0)
    with pytest.raises(SettingError, match="queue_s"):
        route.first_token(queue_s)
    assert not route.first_token_ns
    route.cancel()


def test_latencies_without_a_place_cost_one_warning(board, frontend, caplog):
    """Guards against a front-end that fails, or fills its log, because shared memory is full."""
    for _ in range(3):  # there is no folder for them: no coordinator made one
        route = frontend.route(dp_rank=0)
        route.first_token()
        route.done(5)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no more latencies" in caplog.text
    assert booked(board) == (0, 0)
