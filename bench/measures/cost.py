"""Cost: the time of one call of publish, decide and route, in a process of its own on a fixture board.

- *publish*: `Engine.publish` with one request received since the last; the broadcast's: encode and send.
- *decide*: read what there is, count every front-end's bookings, choose: `Frontend.choose`. The broadcast's:
  choose from the copy, raise the copy. With one request of each front-end in flight; beside it with none, and
  the worst case, where every front-end has one in flight to every rank.
- *route*: the whole `Frontend.route`, in a running group; beside it, *done*.

Times are of batches of calls, the loop around them included; the figure is the median batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.fixture_board import SITUATIONS, FixtureBoard, InFlight
from bench.processes import Line, Worker
from dpshm import Engine

BATCH = 20
"""Decisions in a batch: 800 requests/s over 4 front-ends, in the 100 ms between two broadcasts."""


def timed(
    call: Callable[[], Any], batches: int, calls: int = BATCH, after: Callable[[], Any] | None = None
) -> float:
    """Microseconds a call: the median over the batches.

    Args:
        call: what to time.
        batches: the number of batches.
        calls: calls in each.
        after: done after each batch, outside of the time.
    """
    us = np.empty(batches)
    counter, repeat = time.perf_counter_ns, range(calls)
    for i in range(batches):
        began = counter()
        for _ in repeat:
            call()
        us[i] = (counter() - began) / calls / 1e3
        if after is not None:
            after()
    return float(np.median(us))


def board_decide(_: Line, engines: int, frontends: int, batches: int) -> dict[str, float]:
    """Ours: `Frontend.choose`, which is `Frontend.route` less its stores."""
    result = {}
    names = {"one each": "us", "none": "us_none", "all": "us_all"}
    for in_flight in SITUATIONS:
        name = names[in_flight]
        with FixtureBoard(engines, frontends, in_flight) as fixture:
            result[name] = timed(partial(fixture.frontend.choose, 512), batches, after=fixture.beat)
    return result


def board_route(_: Line, engines: int, frontends: int, batches: int) -> dict[str, float]:
    """Ours: the whole of `Frontend.route`, and of `Route.done`."""
    us, done_us = _route_and_done(engines, frontends, "one each", batches)
    us_all, done_us_all = _route_and_done(engines, frontends, "all", batches)
    return {"us": us, "us_all": us_all, "done_us": done_us, "done_us_all": done_us_all}


def _route_and_done(engines: int, frontends: int, in_flight: InFlight, batches: int) -> tuple[float, float]:
    counter = time.perf_counter_ns
    route_us, done_us = np.empty(batches), np.empty(batches)
    with FixtureBoard(engines, frontends, in_flight) as fixture:
        choose = fixture.frontend.route
        for i in range(batches):
            began = counter()
            routes = [choose(512) for _ in range(BATCH)]
            chosen = counter()
            for route in routes:
                route.done()
            ended = counter()
            fixture.beat()
            route_us[i], done_us[i] = (chosen - began) / BATCH / 1e3, (ended - chosen) / BATCH / 1e3
    return float(np.median(route_us)), float(np.median(done_us))


def peer_decide(_: Line, spec: Spec, batches: int) -> dict[str, float]:
    """A peer's: the choice, as its front-end's end makes it."""
    with closing(frontend_end(spec, 0)) as end:
        chosen: list[int] = []

        def finish() -> None:
            for rank in chosen:
                end.finished(rank)
            chosen.clear()

        return {"us": timed(lambda: chosen.append(end.choose()), batches, after=finish)}


def peer_publish(_: Line, spec: Spec, batches: int) -> dict[str, float]:
    """Any peer's: a report, from the call to its return."""
    with closing(engine_end(spec, 0)) as end:
        return {"us": timed(lambda: end.publish(3, 16), batches, 50, after=lambda: time.sleep(0.001))}


def board_publish(_: Line, spec: Spec, batches: int) -> dict[str, float]:
    """Ours, with one request received before each; the receive is timed apart."""
    counter = time.perf_counter_ns
    with closing(Engine.attach(spec.where, 0)) as engine:
        us, receive_us = np.empty(batches), np.empty(batches)
        for i in range(batches):
            spent = receiving = 0
            for step in range(50):
                came = counter()
                engine.receive(0, 512, 0)
                began = counter()
                receiving += began - came
                engine.publish(waiting=3, running=16, kv_cache_usage=0.4, prefill_backlog=900, step=step)
                spent += counter() - began
            us[i], receive_us[i] = spent / 50 / 1e3, receiving / 50 / 1e3
        bare = timed(lambda: engine.publish(waiting=3, running=16, kv_cache_usage=0.4, step=1), batches, 50)
        received = {"receive_us": float(np.median(receive_us)), "us_nothing_received": bare}
        return {"us": float(np.median(us)), **received}


def in_worker(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Runs one of these in a process of its own."""
    with Worker(function, *arguments) as worker:
        result: dict[str, float] = worker.result()
    return result


def with_peer(
    function: Callable[..., dict[str, float]], start: Start, engines: int, frontends: int, batches: int
) -> dict[str, float]:
    """Runs one of these that needs a running peer."""
    with closing(start(engines, frontends)) as middle:
        return in_worker(function, middle.spec, batches)
