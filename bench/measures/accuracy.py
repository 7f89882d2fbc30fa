"""Accuracy: the error of a front-end's belief about each rank at the moment of its decision.

Engines are processes with a step loop around the demo's scheduler (`dpshm.sim.batching`), requests reach
them through sockets, arrivals are a Poisson process over the front-ends. Each decision notes what the
front-end believed of every rank. Each front-end notes when it sent each request, each engine when it finished
each. All times come from one CLOCK_MONOTONIC, so the true count is known exactly afterwards:

    requests at a rank = sent to it by all front-ends so far - finished there so far

that is, the scheduler's queues and its input queue. Two errors of a belief about one rank at one decision:

- *requests*: the absolute difference between the two;
- *ms*: the time since the true count last equalled the belief; at most `HORIZON_MS`.

The peers: the board; the board read without bookings (reported load alone); the broadcast at 100 and at 10 ms
with its front-end's own raises of the copy.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.processes import Line, Worker
from dpshm.sim.batching import Batcher, SimRequest
from dpshm.sim.step_cost import StepCost

HORIZON_MS = 1000.0
PROMPT_TOKENS = 512
MEAN_OUTPUT_TOKENS = 60
IDLE_POLL_MS = 5
DRAIN_S = 1.0
COST = StepCost(max_running=16)
Times = NDArray[np.float64]


class Belief(NamedTuple):
    """What a front-end believed when it decided, and what it then did; times in seconds."""

    at: float
    reported: list[int]
    booked: list[int]
    chosen: int
    sent_at: float


def accuracy(
    start: Start, *, bookings: bool = True, engines: int = 8, frontends: int = 4, rate: float, seconds: float
) -> dict[str, float]:
    """Measures one peer once.

    Args:
        start: the peer.
        bookings: believe the peer's count with what front-ends booked; or the reported load alone.
        engines: ranks.
        frontends: front-ends.
        rate: requests a second, in all.
        seconds: how long they are sent.

    Returns:
        requests_mean, requests_p99: of the error in requests; ms_p50, ms_p99: of the error in time; decisions.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="bench-accuracy-"))
        middle = start(engines, frontends)
        stack.callback(middle.close)
        ranks = [stack.enter_context(Worker(step_on, middle.spec, e, folder)) for e in range(engines)]
        servers = [
            stack.enter_context(Worker(decide_and_send, middle.spec, f, folder, (rate / frontends, seconds)))
            for f in range(frontends)
        ]
        for worker in (*ranks, *servers):
            worker.wait_ready()
        for worker in (*ranks, *servers):
            worker.tell()
        beliefs = [Belief(*b) for server in servers for b in server.result()]
        for worker in servers:
            worker.open_doorbell()
        for rank in ranks:
            rank.tell()
        finished = [np.sort(np.array(rank.result())) for rank in ranks]
    return judge(beliefs, finished, bookings=bookings)


def judge(beliefs: list[Belief], finished: list[Times], *, bookings: bool) -> dict[str, float]:
    """Compares beliefs with the true counts; pure.

    Args:
        beliefs: of all front-ends.
        finished: by rank, when requests finished, ascending.
        bookings: whether the believed count is the booked one.
    """
    requests, ms = [], []
    for e, ends in enumerate(finished):
        sends = np.sort([b.sent_at for b in beliefs if b.chosen == e])
        times = np.concatenate([sends, ends])
        order = np.argsort(times, kind="stable")
        times = times[order]
        level = np.cumsum(np.concatenate([np.ones(len(sends)), -np.ones(len(ends))])[order])
        for b in beliefs:
            believed = (b.booked if bookings else b.reported)[e]
            now = int(np.searchsorted(times, b.at, side="right"))
            # level[i] holds from times[i] on; before the first event there were none.
            actual = level[now - 1] if now else 0.0
            requests.append(abs(believed - actual))
            ms.append(_last_true_ms(times, level, now, b.at, believed))
    error, age = np.array(requests), np.array(ms)
    return {
        "requests_mean": float(error.mean()),
        "requests_p99": float(np.quantile(error, 0.99)),
        "ms_p50": float(np.quantile(age, 0.5)),
        "ms_mean": float(age.mean()),
        "ms_p99": float(np.quantile(age, 0.99)),
        "decisions": len(beliefs),
    }


def _last_true_ms(times: Times, level: Times, now: int, at: float, believed: int) -> float:
    """How long before `at` the level last was `believed`."""
    until = at
    for i in range(now - 1, -1, -1):
        age_ms = (at - until) * 1e3
        if level[i] == believed or age_ms >= HORIZON_MS:
            return min(age_ms, HORIZON_MS)
        until = times[i]
    return min((at - until) * 1e3, HORIZON_MS) if believed == 0 else HORIZON_MS


class Request(msgspec.Struct, array_like=True):
    """A request in flight to an engine."""

    frontend: int
    reply_to: int
    output_tokens: int


def step_on(line: Line, spec: Spec, dp_rank: int, folder: str) -> list[float]:
    """An engine: takes in, publishes, steps, publishes, replies; gives when each request finished."""
    context: zmq.Context[Any] = zmq.Context()
    finished_at: list[float] = []
    decoder = msgspec.msgpack.Decoder(Request)
    batcher = Batcher(COST)
    with closing(engine_end(spec, dp_rank)) as end:
        requests = context.socket(zmq.PULL)
        requests.bind(_address(folder, "engine", dp_rank))
        replies = [context.socket(zmq.PUSH) for _ in range(spec.num_frontends)]
        for f, socket in enumerate(replies):
            socket.connect(_address(folder, "frontend", f))
        receive = getattr(end, "receive", None)

        def receive_requests() -> None:
            while requests.poll(0):
                request = decoder.decode(requests.recv())
                batcher.add(SimRequest(request, PROMPT_TOKENS, request.output_tokens))
                if receive is not None:
                    receive(request.frontend)

        reported: tuple[int, int] | None = None

        def publish() -> None:
            nonlocal reported
            counts = (batcher.waiting, batcher.running)
            if counts != reported or receive is not None:  # stock engines report changes alone
                reported = counts
                end.publish(*counts)

        publish()
        line.ready()
        while not line.told():
            receive_requests()
            if not batcher.unfinished:
                requests.poll(IDLE_POLL_MS)
                continue
            step = batcher.plan()
            publish()
            time.sleep(step.seconds)
            done = batcher.finish(step).completed
            now = time.monotonic()
            finished_at += [now] * len(done)
            publish()
            for request in done:
                replies[request.key.reply_to].send(msgspec.msgpack.encode(dp_rank))
    context.destroy(linger=0)
    return finished_at


def decide_and_send(line: Line, spec: Spec, index: int, folder: str, load: tuple[float, float]) -> list[Belief]:
    """A front-end under a load of requests/s for seconds: gives what it believed at each of its decisions."""
    rate, seconds = load
    context: zmq.Context[Any] = zmq.Context()
    beliefs: list[Belief] = []
    random = Random(index)
    with closing(frontend_end(spec, index)) as end:
        replies = context.socket(zmq.PULL)
        replies.bind(_address(folder, "frontend", index))
        engines = [context.socket(zmq.PUSH) for _ in range(spec.dp_size)]
        for e, socket in enumerate(engines):
            socket.connect(_address(folder, "engine", e))
        line.ready()
        began = time.monotonic()
        at = began + random.expovariate(rate)
        while at < began + seconds:
            _until(at, end, replies)
            believed_at = time.monotonic()
            reported, booked = end.beliefs()
            chosen = end.choose()
            output_tokens = 1 + int(random.expovariate(1 / MEAN_OUTPUT_TOKENS))
            sent_at = time.monotonic()
            engines[chosen].send(msgspec.msgpack.encode(Request(end.index, index, output_tokens)))
            beliefs.append(Belief(believed_at, reported, booked, chosen, sent_at))
            at += random.expovariate(rate)
        line.answer(beliefs)
        _until(time.monotonic() + DRAIN_S, end, replies)
        line.expect()
    context.destroy(linger=0)
    return beliefs


def _until(deadline: float, end: Any, replies: Any) -> None:
    """Sleeps until then, taking in replies and what the peer sends, as it comes."""
    poller = zmq.Poller()
    for socket in (replies, *end.sockets()):
        poller.register(socket, zmq.POLLIN)
    while True:
        while replies.poll(0):
            end.finished(msgspec.msgpack.decode(replies.recv()))
        end.wait(0)
        left_ms = (deadline - time.monotonic()) * 1e3
        if left_ms <= 0:
            return
        poller.poll(max(1, round(left_ms)) if left_ms > 1 else 0)


def _address(folder: str, kind: str, index: int) -> str:
    return f"ipc://{Path(folder) / f'{kind}-{index}'}"
