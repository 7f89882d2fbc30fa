"""A simulated front-end as a process, with the test in the place of the engines."""

from __future__ import annotations

import os
import time

import msgspec
import pytest
import zmq

from dpshm import Engine
from dpshm.sim.demo.children import Children
from dpshm.sim.demo.messages import (
    FrontendReport,
    FrontendSettings,
    Go,
    Progress,
    Ready,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
    new_prefix,
)

TIMEOUT_MS = 60_000


@pytest.mark.slow
def test_replay_replies_and_losses(pair, using):
    """Guards against requests sent to the wrong rank or at the wrong time, replies counted twice, and a
    request without a reply that counts as anything but lost.
    """
    prefix = new_prefix()
    context = zmq.Context()
    inboxes = [context.socket(zmq.PULL) for _ in range(2)]
    for rank, socket in enumerate(inboxes):
        socket.bind(engine_address(prefix, rank))
    engines = [using(Engine.attach(pair, dp_rank=rank)) for rank in range(2)]
    engines[0].publish(waiting=50, running=0)
    engines[1].publish(waiting=0, running=0)
    arrivals = [(0.0, 10, 1, ()), (0.05, 20, 2, ()), (0.1, 30, 3, ()), (0.15, 40, 4, ())]
    with Children() as children:
        child = children.start("front-end", "dpshm.sim.demo.frontend")
        child.tell(FrontendSettings(os.getpid(), pair, prefix, "board", "least_loaded", 0, 2, 1, arrivals))
        while [answer for _, answer in children.read(1.0)] != [Ready()]:
            assert not child.ended, child.obituary()
        start_ns = time.monotonic_ns()
        child.tell(Go(start_ns))
        replies = context.socket(zmq.PUSH)
        replies.connect(frontend_address(prefix, 0))

        requests = []
        for due_s, prompt_tokens, output_tokens, _ in arrivals:
            assert inboxes[1].poll(TIMEOUT_MS)
            requests.append(msgspec.msgpack.decode(inboxes[1].recv(), type=RequestMessage))
            assert time.monotonic_ns() >= start_ns + due_s * 1e9
            assert (requests[-1].prompt_tokens, requests[-1].output_tokens) == (prompt_tokens, output_tokens)
        assert not inboxes[0].poll(0)

        ids = [request.request_id for request in requests]
        replies.send(b"\xc1")
        replies.send(
            msgspec.msgpack.encode(ReplyMessage([999, ids[0], ids[1]], [ids[0], 999], [], [0.1, 0.2, 0.3]))
        )
        replies.send(msgspec.msgpack.encode(ReplyMessage([], [ids[0], ids[1]], [ids[2]], [])))
        answers = []
        while Progress(4, 3) not in answers:
            answers += [answer for _, answer in children.read(1.0)]
        child.terminate()  # the fourth is never answered
        while not isinstance(answers[-1], FrontendReport):
            answers += [answer for _, answer in children.read(1.0)]
    report = answers[-1]
    assert (report.sent, report.completed, report.refused) == (4, 2, 1)
    assert len(report.ttft_ms) == 2
    assert report.ttft_ms[0] > 150  # from when it was due, not from when the reply was sent
    assert report.staleness_us == [0, 0, 0, 0]
    context.destroy(linger=0)


def test_a_front_end_that_fails_reports_nothing(pair):
    """An error ends a front-end without the report of one that is done, so that the demo tells the error."""
    with Children() as children:
        child = children.start("front-end 0", "dpshm.sim.demo.frontend")
        child.tell(FrontendSettings(os.getpid(), pair, new_prefix(), "board", "least_loaded", 0, 2, 1, []))
        child.tell(Ready())  # is not the order that it waits for
        answers = []
        while not child.ended:
            answers += [answer for _, answer in children.read(1.0)]
        assert answers == [Ready()]
        assert "front-end 0 ended with exit status 1; it said: msgspec.ValidationError" in child.obituary()
