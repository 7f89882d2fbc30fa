"""The PUB path: when it publishes, what a front-end makes of it, and the process over real sockets."""

from __future__ import annotations

import os

import msgspec
import pytest
import zmq

from dpshm.policies import Request, View, by_name
from dpshm.sim.demo.broadcast import (
    GATHER_S,
    INTERVAL_S,
    Broadcaster,
    RankReport,
    StatsCopy,
    StatsSender,
    broadcast_decoder,
)
from dpshm.sim.demo.children import Children
from dpshm.sim.demo.messages import BroadcastSettings, Ready, broadcast_address, new_prefix


def report(rank: int, waiting: int = 0, running: int = 0, published_ns: int = 1) -> RankReport:
    """A rank's report with an empty cache."""
    return RankReport(rank, waiting, running, 0.0, published_ns)


def test_publishes_at_most_every_interval_and_only_changes():
    """Guards against a broadcast that is faster, or slower, than the path that it stands for."""
    broadcaster = Broadcaster(2)
    assert broadcaster.due_in_s(0.0) is None
    broadcaster.update(report(1, waiting=3), 0.0)
    assert broadcaster.due_in_s(0.0) == GATHER_S
    broadcaster.update(report(1, waiting=4), 0.001)
    assert broadcaster.due_in_s(GATHER_S) == 0
    assert broadcaster.broadcast(GATHER_S) == [report(0, published_ns=0), report(1, waiting=4)]
    assert broadcaster.due_in_s(5.0) is None
    broadcaster.update(report(0), 0.03)
    assert broadcaster.due_in_s(0.03) == pytest.approx(GATHER_S + INTERVAL_S - 0.03)
    assert broadcaster.due_in_s(GATHER_S + INTERVAL_S) == 0


def test_report_of_an_unknown_rank_is_dropped():
    """Guards against an index from the wire."""
    broadcaster = Broadcaster(2)
    broadcaster.update(report(2), 0.0)
    assert broadcaster.due_in_s(0.0) is None


def test_choice_raises_the_copy_by_the_number_of_frontends():
    """Guards against a front-end that sends a whole burst to one rank, or forgets to be overwritten."""
    copy = StatsCopy(dp_size=3, num_frontends=4, index=0, policy=by_name("least_loaded"))
    reports = [report(0, waiting=6, published_ns=7), report(1, running=5, published_ns=8), report(2, running=9)]
    copy.update(reports)
    assert copy.published_ns == [7, 8, 1]
    assert [copy.choose(Request(), [0] * 3) for _ in range(4)] == [1, 0, 1, 2]
    copy.update(reports)
    assert copy.choose(Request(), [0] * 3) == 1


def test_ties_are_broken_in_turn_and_differently_by_each_frontend():
    """Guards against all front-ends sending their first request to rank 0."""
    seen: list[list[int]] = []

    def policy(view: View, request: Request) -> int:
        seen.append(list(view.ranks))
        assert (view.waiting, view.running, view.kv_cache_usage) == ([0] * 3, [0] * 3, [0.0] * 3)
        return int(view.ranks[0])

    copies = [StatsCopy(3, 2, index, policy) for index in range(3)]
    assert {copy.choose(Request(), [0] * 3) for copy in copies} == {0, 1, 2}
    assert all(sorted(ranks) == [0, 1, 2] for ranks in seen)


def test_broadcast_of_another_size_is_dropped():
    """Guards against a copy with too few ranks."""
    copy = StatsCopy(3, 1, 0, by_name("least_loaded"))
    copy.update([report(0, waiting=9)])
    assert copy.published_ns == [0, 0, 0]


def test_the_process():
    """Guards against a broadcaster that loses reports, dies of garbage, or outlives its parent's order to end."""
    prefix = new_prefix()
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    with Children() as children:
        child = children.start("the broadcaster", "dpshm.sim.demo.broadcast")
        child.tell(BroadcastSettings(os.getpid(), prefix, 2))
        answers = []
        while not answers:
            answers = children.read(1.0)
            assert not child.ended, child.obituary()
        assert answers == [(child, Ready())]
        sub.connect(broadcast_address(prefix))
        sender = StatsSender(context, prefix)
        hostile = context.socket(zmq.PUSH)
        hostile.connect(prefix + "-reports")
        newest = []
        for published_ns in range(1000, 5001, 1000):
            hostile.send(b"\xc1garbage")
            hostile.send(msgspec.msgpack.encode([99, 1, 1, 0.5, 1]))
            hostile.send(msgspec.msgpack.encode([-1, 1, 1, 0.5, 1]))
            # No faster than it reads: it looks for its end only between hundreds of messages.
            while [r.published_ns for r in newest] != [published_ns] * 2:
                for rank in (0, 1):
                    sender.send(report(rank, published_ns=published_ns))
                if sub.poll(100):
                    newest = broadcast_decoder.decode(sub.recv())
    assert child.ended
    context.destroy(linger=0)
