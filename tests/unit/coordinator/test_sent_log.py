"""Tests of `dpshm.coordinator.sent_log`: bookings at stock engines, whose reports come late."""

from __future__ import annotations

import numpy as np

from dpshm import Frontend
from dpshm.coordinator.sent_log import IN_FLIGHT_NS, SAMPLE_NS, SentLog
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.net import wire
from tests.support import LoneBoard

MS = 1_000_000


def test_a_sample_is_as_old_as_asked():
    """Guards against a booking that counts as received too early, or never."""
    log, sent = SentLog(), np.zeros((1, 1), np.int64)
    for now_ms in range(400):
        sent[0, 0] = now_ms
        sample = log.look(sent, sent, now_ms * MS)
        if now_ms * MS < IN_FLIGHT_NS:
            assert sample is None
        else:
            assert IN_FLIGHT_NS <= now_ms * MS - sample.taken_ns < IN_FLIGHT_NS + SAMPLE_NS
            assert sample.requests[0, 0] == sample.taken_ns // MS


def test_a_report_erases_no_booking_in_flight(group, using):
    """Guards against a request that is counted at no rank: sent, not received, and a report came meanwhile.

    Requests take 40 ms to a stock engine and its reports 40 ms back, and it reports at each change.
    """
    board = using(LoneBoard(group))
    stock = StockEngines(board, board.marks)
    frontend = using(Frontend.attach(group))
    board.marks.set_engine(1, on_behalf=True)
    delay_ms, sent, reports, outstanding = 40, [], [], []
    kept = []
    for now_ms in range(0, 1500, 5):
        if now_ms < 1000 and now_ms % 20 == 0:
            kept.append(frontend.route(10, dp_rank=1))
            sent.append(now_ms)
        received = sum(at + delay_ms <= now_ms for at in sent)
        ended = sum(at + delay_ms + 100 <= now_ms for at in sent)
        reports.append((now_ms, received - ended))
        for at, running in reports:
            if at + delay_ms == now_ms:
                stats = wire.SchedulerStats(num_running_reqs=running, step_counter=now_ms)
                stock.report(1, stats, now_ms * MS)
        stock.on_time(now_ms * MS)
        outstanding.append(int(board.snapshot()[1]["requests"]) - (len(sent) - ended))
    assert min(outstanding) >= 0  # never too few
    assert max(outstanding) <= 2 + (IN_FLIGHT_NS + SAMPLE_NS + delay_ms * MS) // (20 * MS)
    assert outstanding[-1] == 0
    assert (board.sent_requests[:, 1] == board.received_requests[1]).all()
    assert (board.sent_tokens[:, 1] == board.received_tokens[1]).all()


def test_a_booking_is_settled_without_another_report(group, using):
    """Guards against a request that counts twice for as long as its stock engine has nothing new to say."""
    board = using(LoneBoard(group))
    stock = StockEngines(board, board.marks)
    frontend = using(Frontend.attach(group))
    stock.report(1, wire.SchedulerStats(), 0)
    stock.on_time(IN_FLIGHT_NS)
    _booked = frontend.route(10, dp_rank=1)
    stock.report(1, wire.SchedulerStats(num_running_reqs=1), IN_FLIGHT_NS + 5 * MS)
    assert int(board.snapshot()[1]["requests"]) == 2
    for now_ms in range(110, 400, 10):
        stock.on_time(now_ms * MS)
    assert int(board.snapshot()[1]["requests"]) == 1
    assert stock.due_ns is None
