"""Tests of `dpshm.coordinator.readiness`: each row of the table, at times of the test's choosing."""

from __future__ import annotations

import pytest

from dpshm.coordinator.connections import Connections
from dpshm.coordinator.readiness import RECOUNT_NS, Readiness, ReadinessEvent

RETURNED, READY, LATE = ReadinessEvent.ENGINE_RETURNED, ReadinessEvent.BECAME_READY, ReadinessEvent.TIMED_OUT
NOW_NS = 1_000_000_000_000
LATER_NS = NOW_NS + RECOUNT_NS


class Group:
    """Two ranks that may take ten recounts to come up."""

    def __init__(self, *, timeout_ns=10 * RECOUNT_NS, ready=False):
        self.held = [False, False]
        self.connections = Connections()
        self.asked = 0
        self.readiness = Readiness(NOW_NS, timeout_ns, self.connections, self.rows, ready=ready)

    def rows(self):
        """By rank, whether its row is held."""
        self.asked += 1
        return self.held

    def join(self, *names, at_ns=NOW_NS):
        """Engines join, each with its name or None; what follows from the last."""
        events = []
        for name in names:
            if name is not None:
                self.connections.on_join(name)
            self.connections.on_join(None)
            events = self.readiness.on_join(at_ns, 2)
        return events

    def leave(self, at_ns):
        """An engine without a name leaves."""
        self.connections.on_leave(None)
        self.readiness.on_change(at_ns)


@pytest.fixture
def new():
    """A new group."""
    return Group()


def test_at_once_if_every_row_is_held(new):
    """Guards against a start of dpshm's own engines that waits for a recount."""
    new.held = [True, True]
    assert new.join(0) == []
    assert new.join(1) == [READY]
    assert new.readiness.ready
    assert new.readiness.settled


def test_stock_engines_are_ready_after_a_recount(new):
    """Guards against READY while one engine counts twice, because it is back before its old connection is gone."""
    assert new.join(None, None) == []
    assert not new.readiness.settled
    assert new.readiness.on_time(LATER_NS - 1, 2) == []
    assert new.readiness.on_time(LATER_NS, 2) == [READY]
    assert new.readiness.settled
    assert new.readiness.on_time(2 * LATER_NS, 2) == []


def test_each_join_and_leave_starts_the_recount_anew(new):
    """Guards against a recount in the middle of a restart."""
    new.join(None, None)
    new.leave(LATER_NS - 1)
    assert new.readiness.on_time(LATER_NS, 2) == []
    new.join(None, at_ns=LATER_NS + 1)
    assert new.readiness.on_time(LATER_NS + RECOUNT_NS, 2) == []
    assert new.readiness.on_time(LATER_NS + 1 + RECOUNT_NS, 2) == [READY]


@pytest.mark.parametrize("names", [[0], [0, 0], [0, 0, 0]])
def test_too_few_are_not_ready(new, names):
    """Guards against a group that is said to be complete while a rank is missing: a worker keeps a connection."""
    new.held = [True, False]
    new.join(*names)
    assert new.readiness.on_time(LATER_NS, 2) == []
    assert not new.readiness.ready


def test_a_rank_with_a_row_and_the_sockets_of_vllm_counts_once(new):
    """Guards against a rank of the plugin whose row and connection count as two ranks."""
    new.held = [True, False]
    new.join(None)
    assert new.readiness.on_time(LATER_NS, 2) == []
    new.join(None, at_ns=LATER_NS)
    assert new.readiness.on_time(LATER_NS + RECOUNT_NS, 2) == [READY]


def test_rows_may_come_after_the_recount(new):
    """Guards against a group that is never ready, since the row of an engine on another node came late."""
    new.join(0, 1)
    assert new.readiness.on_time(LATER_NS, 2) == []
    new.held = [True, False]
    assert new.readiness.on_time(LATER_NS + RECOUNT_NS, 2) == []
    assert not new.readiness.settled
    new.held = [True, True]
    assert new.readiness.on_time(LATER_NS + 2 * RECOUNT_NS - 1, 2) == []
    assert new.readiness.on_time(LATER_NS + 2 * RECOUNT_NS, 2) == [READY]
    assert new.readiness.settled


def test_rows_are_asked_for_only_where_they_matter():
    """Guards against a system call for each rank at each of a thousand joins."""
    new, ready = Group(), Group(ready=True)
    assert new.join(0) == []
    assert ready.join(0) == [RETURNED]
    assert (new.asked, ready.asked) == (0, 0)


def test_a_ready_group_stays_ready(new):
    """Guards against a restarted engine that waits for a READY which was sent before it came."""
    new.held = [True, True]
    new.join(0, 1)
    new.leave(NOW_NS)
    assert new.join(1) == [RETURNED]
    assert new.readiness.on_time(LATER_NS, 2) == []


def test_a_deadline_is_told_once(new):
    """Guards against a start that waits for ever, and one that cannot succeed any more once it is late."""
    new.held = [True, True]
    assert new.readiness.on_time(NOW_NS + 10 * RECOUNT_NS - 1, 2) == []
    assert new.readiness.on_time(NOW_NS + 10 * RECOUNT_NS, 2) == [LATE]
    assert new.readiness.on_time(NOW_NS + 20 * RECOUNT_NS, 2) == []
    assert new.join(0, 1) == [READY]


@pytest.mark.parametrize(("timeout_ns", "ready"), [(0, False), (1, True)])
def test_without_a_deadline(timeout_ns, ready):
    """Guards against a timeout of 0 that is one of no time, and a group that is ready and late."""
    assert Group(timeout_ns=timeout_ns, ready=ready).readiness.on_time(NOW_NS + (1 << 60), 2) == []


def test_ready_at_the_deadline_is_not_late(new):
    """Guards against an error for a group that the same turn completes."""
    deadline_ns = NOW_NS + 10 * RECOUNT_NS
    new.join(None, None, at_ns=deadline_ns - RECOUNT_NS)
    assert new.readiness.on_time(deadline_ns, 2) == [READY]


def test_a_smaller_group_may_be_complete(new):
    """Guards against a group that is scaled to the ranks that came, and waits for the others."""
    new.held = [True, False]
    new.join(0)
    assert new.readiness.on_time(LATER_NS, 2) == []
    new.held = [True]
    new.readiness.on_change(LATER_NS)
    assert new.readiness.on_time(LATER_NS + RECOUNT_NS, 1) == [READY]
