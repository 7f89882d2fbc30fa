"""Tests of `dpshm.coordinator.readiness`: each row of the table, at times of the test's choosing."""

from __future__ import annotations

import pytest

from dpshm.coordinator.readiness import RECOUNT_NS, Readiness, ReadinessEvent

RETURNED, CONNECTED = ReadinessEvent.ENGINE_RETURNED, ReadinessEvent.ALL_CONNECTED
READY, LATE = ReadinessEvent.BECAME_READY, ReadinessEvent.TIMED_OUT
NOW_NS = 1_000_000_000_000
LATER_NS = NOW_NS + RECOUNT_NS


def held():
    """Every rank's row is held."""
    return True


def not_held():
    """Some rank's row is not held."""
    return False


@pytest.fixture
def readiness():
    """A new group, which may take ten recounts to come up."""
    return Readiness(NOW_NS, 10 * RECOUNT_NS, ready=False)


def join(readiness, count=1, at_ns=NOW_NS, rows=not_held):
    """So many engines of two join; what follows from the last."""
    events = []
    for _ in range(count):
        events = readiness.on_join(at_ns, 2, rows)
    return events


def test_at_once_if_every_row_is_held(readiness):
    """Guards against a start of dpshm's own engines that waits for a recount."""
    assert join(readiness, 1, rows=held) == []
    assert join(readiness, 1, rows=held) == [CONNECTED, READY]
    assert readiness.ready


def test_stock_engines_are_ready_after_a_recount(readiness):
    """Guards against READY while one engine counts twice, because it is back before its old connection is gone."""
    assert join(readiness, 2) == []
    assert not readiness.settled
    assert readiness.on_time(LATER_NS - 1, 2) == []
    assert readiness.on_time(LATER_NS, 2) == [CONNECTED, READY]
    assert readiness.settled
    assert readiness.on_time(2 * LATER_NS, 2) == []


def test_each_join_and_leave_starts_the_recount_anew(readiness):
    """Guards against a recount in the middle of a restart."""
    join(readiness, 2)
    readiness.on_leave(LATER_NS - 1)
    assert readiness.on_time(LATER_NS, 2) == []
    join(readiness, 1, LATER_NS + 1)
    assert readiness.on_time(LATER_NS + RECOUNT_NS, 2) == []
    assert readiness.on_time(LATER_NS + 1 + RECOUNT_NS, 2) == [CONNECTED, READY]


def test_too_few_are_not_ready(readiness):
    """Guards against a group that is said to be complete while a rank is missing."""
    join(readiness, 1, rows=held)
    assert readiness.on_time(LATER_NS, 2) == []
    assert not readiness.ready


def test_rows_are_asked_for_only_where_they_matter():
    """Guards against a system call for each rank at each of a thousand joins."""
    readiness = Readiness(NOW_NS, 0, ready=False)

    def forbidden():
        raise AssertionError

    assert readiness.on_join(NOW_NS, 2, forbidden) == []
    ready = Readiness(NOW_NS, 0, ready=True)
    assert ready.on_join(NOW_NS, 1, forbidden) == [RETURNED]


def test_a_ready_group_stays_ready(readiness):
    """Guards against a restarted engine that waits for a READY which was sent before it came."""
    join(readiness, 2, rows=held)
    readiness.on_leave(NOW_NS)
    readiness.on_leave(NOW_NS)
    assert join(readiness, 1) == [RETURNED]
    assert readiness.on_time(LATER_NS, 2) == []
    join(readiness, 1, LATER_NS)
    assert readiness.on_time(2 * LATER_NS, 2) == [CONNECTED]  # a stock engine may have come for one with a row


def test_a_deadline_is_told_once(readiness):
    """Guards against a start that waits for ever, and one that cannot succeed any more once it is late."""
    assert readiness.on_time(NOW_NS + 10 * RECOUNT_NS - 1, 2) == []
    assert readiness.on_time(NOW_NS + 10 * RECOUNT_NS, 2) == [LATE]
    assert readiness.on_time(NOW_NS + 20 * RECOUNT_NS, 2) == []
    assert join(readiness, 2, rows=held) == [CONNECTED, READY]


@pytest.mark.parametrize(("timeout_ns", "ready"), [(0, False), (1, True)])
def test_without_a_deadline(timeout_ns, ready):
    """Guards against a timeout of 0 that is one of no time, and a group that is ready and late."""
    readiness = Readiness(NOW_NS, timeout_ns, ready=ready)
    assert readiness.on_time(NOW_NS + (1 << 60), 2) == []


def test_ready_at_the_deadline_is_not_late(readiness):
    """Guards against an error for a group that the same turn completes."""
    deadline_ns = NOW_NS + 10 * RECOUNT_NS
    join(readiness, 2, deadline_ns - RECOUNT_NS)
    assert readiness.on_time(deadline_ns, 2) == [CONNECTED, READY]


def test_a_smaller_group_may_be_complete(readiness):
    """Guards against a group that is scaled to the ranks that came, and waits for the others."""
    join(readiness, 1)
    assert readiness.on_time(LATER_NS, 2) == []
    readiness.on_resize(LATER_NS)
    assert readiness.on_time(LATER_NS + RECOUNT_NS, 1) == [CONNECTED, READY]


def test_leaves_never_outnumber_joins(readiness):
    """Guards against a count below zero, after which an engine too many is needed."""
    readiness.on_leave(NOW_NS)
    join(readiness, 1)
    assert readiness.subscribed == 1
    readiness.on_disconnect()
    assert readiness.subscribed == 0
