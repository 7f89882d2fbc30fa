"""Wake: from a first request to paused ranks until every engine is awake: it has START, or the request.

A front-end process chooses a rank, sends it the request (a datagram, the same for all peers) and has the others
woken; each engine is a process that sleeps in its sockets. Rank 0 then confirms the wave and ends it, as vLLM's
engines do, and the next trial begins. All processes use all cores.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from socket import AF_UNIX, SOCK_DGRAM, SOCK_NONBLOCK, socket
from typing import Any
from zlib import crc32

import zmq

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.distribution import quantiles
from bench.processes import Line, Worker

QUIET_S = 0.002  # an engine that is awake leaves the cores to those that are not, before it reports
POLL_MS = 200


def wake(start: Start, *, engines: int = 8, trials: int = 500) -> dict[str, float]:
    """Measures one peer once; microseconds."""
    with ExitStack() as stack:
        middle = start(engines, 1)
        stack.callback(middle.close)
        ranks = [stack.enter_context(Worker(sleep_and_wake, middle.spec, e)) for e in range(engines)]
        frontend = stack.enter_context(Worker(send_first_requests, middle.spec))
        for worker in (*ranks, frontend):
            worker.wait_ready()
            worker.tell()
        times = []
        for _ in range(trials):
            frontend.tell(True)
            sent_ns = frontend.result()
            times.append((max(rank.result() for rank in ranks) - sent_ns) / 1e3)
            for rank in ranks:
                rank.tell()
        for worker in (frontend, *ranks):
            worker.open_doorbell()
        return quantiles(times)


def inbox_of(spec: Spec, dp_rank: int) -> str:
    """Where an engine takes requests in: an abstract address, which leaves no file."""
    return f"\0dpshm-bench-{crc32(repr(spec.where).encode())}-{dp_rank}"


def sleep_and_wake(line: Line, spec: Spec, dp_rank: int) -> None:
    """An engine."""
    end: Any = engine_end(spec, dp_rank)
    with socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK) as inbox:
        inbox.bind(inbox_of(spec, dp_rank))
        poller = zmq.Poller()
        poller.register(inbox, zmq.POLLIN)
        end.register(poller)
        try:
            end.wait_ready()
            line.ready()
            while True:
                awake = False
                while not awake:
                    events = dict(poller.poll(POLL_MS))
                    if inbox.fileno() in events:
                        end.accept_request(int(inbox.recv(32)))
                        awake = True
                    elif events:
                        awake = end.receive_start()
                    elif line.told():
                        return
                awake_ns = time.monotonic_ns()
                time.sleep(QUIET_S)
                # The rank that the request woke may get START too, and the other way round.
                end.receive_start()
                with suppress(BlockingIOError):
                    end.accept_request(int(inbox.recv(32)))
                line.answer(awake_ns)
                line.expect()
                end.wave_complete()
        finally:
            end.close()


def send_first_requests(line: Line, spec: Spec) -> None:
    """The front-end."""
    end: Any = frontend_end(spec, 0)
    with socket(AF_UNIX, SOCK_DGRAM) as requests:

        def send(dp_rank: int, wave: int) -> None:
            requests.sendto(b"%d" % wave, inbox_of(spec, dp_rank))

        try:
            line.ready()
            while True:
                line.expect()
                while not end.paused():
                    time.sleep(0.0005)
                time.sleep(QUIET_S)
                sent_ns = time.monotonic_ns()
                end.first_request(send)
                line.answer(sent_ns)
        finally:
            end.close()
