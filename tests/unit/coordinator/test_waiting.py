"""Tests of `dpshm.coordinator.waiting`, on real sockets."""

from __future__ import annotations

import os
import random

import pytest
import zmq

from dpshm.coordinator.waiting import Waiting
from dpshm.net.context import context
from tests.support import count_fds

LONG_MS = 30_000


class Ends:
    """A socket for reports, another one, and a descriptor; and who sends there."""

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.reports, self.others = (context().socket(kind) for kind in (zmq.PULL, zmq.XPUB))
        self.to_reports, self.to_others = (context().socket(kind) for kind in (zmq.PUSH, zmq.XSUB))
        for ours, theirs in ((self.reports, self.to_reports), (self.others, self.to_others)):
            ours.linger = theirs.linger = 0
            port = ours.bind_to_random_port("tcp://127.0.0.1")
            theirs.connect(f"tcp://127.0.0.1:{port}")
        self.others.setsockopt(zmq.XPUB_VERBOSER, 1)
        self.waiting = Waiting((self.fd, self.reports, self.others), self.reports)

    def close(self):
        """Ends all."""
        os.close(self.fd)
        for s in (self.reports, self.others, self.to_reports, self.to_others):
            s.close()

    def connect(self):
        """Waits until both peers are connected, and reads what tells so: nothing else comes by itself."""
        self.to_reports.send(b"connected")
        self.to_others.send(b"\x01connected")
        expected = {self.reports: b"connected", self.others: b"\x01connected"}
        while expected:
            for s in self.waiting.wait(LONG_MS):
                assert list(self.read(s)) == [expected.pop(s)]
        assert self.waiting.wait(0) == {}

    def wait(self, *, only_reports):
        """What is readable next. What a socket does by itself may end a wait with nothing."""
        while not (readable := self.waiting.wait(LONG_MS, only_reports=only_reports)):
            pass
        return readable

    def read(self, s):
        """All that is there."""
        while True:
            try:
                yield s.recv(zmq.NOBLOCK)
            except zmq.Again:
                return


@pytest.fixture
def ends(using):
    """Them, connected."""
    ends = using(Ends())
    ends.connect()
    return ends


def test_a_report_is_told_in_either_way(ends):
    """Guards against a report that waits for the next timer."""
    for only_reports in (False, True, True, False, True):
        ends.to_reports.send(b"x")
        assert set(ends.wait(only_reports=only_reports)) == {ends.reports}
        assert list(ends.read(ends.reports)) == [b"x"]


def test_others_are_told_while_only_reports_came(ends):
    """Guards against a subscription, or a call of another thread, that nobody sees between reports."""
    ends.to_reports.send(b"x")
    assert ends.waiting.wait(LONG_MS)
    assert list(ends.read(ends.reports)) == [b"x"]
    ends.to_others.send(b"\x01a")
    assert set(ends.wait(only_reports=True)) == {ends.others}
    assert list(ends.read(ends.others)) == [b"\x01a"]
    assert ends.waiting.wait(0) == {}
    os.eventfd_write(ends.fd, 1)
    assert set(ends.wait(only_reports=True)) == {ends.fd}


def test_nothing_is_told_when_the_time_is_up(ends):
    """Guards against a wait without an end, and one that says that something came."""
    assert ends.waiting.wait(1) == {}
    assert ends.waiting.wait(1, only_reports=True) == {}


def test_a_peer_that_connects_may_be_told_as_a_report(ends):
    """Guards against a loop that spins on it, and one that misses the report after it."""
    peer = context().socket(zmq.PUSH)
    try:
        peer.linger = 0
        peer.connect(ends.reports.last_endpoint)
        told = ends.waiting.wait(LONG_MS, only_reports=True)
        assert set(told) <= {ends.reports}
        assert list(ends.read(ends.reports)) == []
        peer.send(b"x")
        while not (got := list(ends.read(ends.reports))):
            assert set(ends.wait(only_reports=True)) == {ends.reports}
        assert got == [b"x"]
    finally:
        peer.close()


def test_no_message_is_missed_over_many_turns(ends):
    """Guards against a descriptor that was read away: all that is sent comes, from each sender, in any order."""
    rng, sent, got, only_reports = random.Random(3), 0, 0, False
    while got < 3000:
        if sent < 3000:
            for _ in range(rng.randrange(3)):
                if rng.random() < 0.1:
                    ends.to_others.send(b"\x01%d" % sent)
                else:
                    ends.to_reports.send(b"%d" % sent)
                sent += 1
            if sent == got:
                continue
        readable = ends.wait(only_reports=only_reports)
        for s in readable:
            got += len(list(ends.read(s)))
        only_reports = set(readable) == {ends.reports}


def test_it_opens_no_descriptor(ends):
    """Guards against a coordinator that cannot wait once peers took all descriptors."""
    before = count_fds()
    Waiting((ends.fd, ends.reports, ends.others), ends.reports)
    assert count_fds() <= before
