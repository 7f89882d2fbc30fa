"""Tests of `dpshm.frontend.route`: how a booking ends, also one that its owner forgot."""

from __future__ import annotations

import gc
import logging
import signal
import threading

import pytest

from dpshm import Frontend
from tests.support import LoneBoard


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
    """Guards against a request that was never sent and counts as on its way while another one is."""
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
    """Guards against a sent request whose booking is taken back, which hides another one that is on its way."""
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
        assert goes_on.wait(10)
        return 1

    frontend = using(Frontend.attach(group, policy=policy))
    forgotten = [frontend.route(5, dp_rank=0)]
    routes = []
    routing = threading.Thread(target=lambda: routes.append(frontend.route(6)), daemon=True)
    routing.start()
    assert ends.wait(10)
    forgotten.clear()  # in this thread, while the other one has the lock
    assert booked(board) == (1, 5)
    goes_on.set()
    routing.join(10)
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
        if opened:
            route = opened.pop()
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
