"""Freshness: the time from an engine's publish until a front-end knows of it.

Engines, each a process, publish at a steady rate with jitter. One front-end process reads as fast as it
can and notes when it first sees each change. Both clocks are CLOCK_MONOTONIC of one machine.

- *per update*: from the call of `publish` in the engine until the front-end first knows of that update or of a
  newer one of the same engine.
- *sampled age*: at instants spread evenly over the run, the age of the oldest update that the front-end does not
  know of; 0 if it knows of all. A decision at that instant uses data of that age.

The other front-ends decide 20 times a second each, and receive their messages.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.distribution import quantiles
from bench.processes import Line, Worker, cpu_ns, use_reader_core

SETTLE_S = 0.3
DECISION_INTERVAL_MS = 50
LOOKS_BETWEEN_CHECKS = 2000
SAMPLES = 4000
Times = NDArray[np.float64]


def freshness(
    start: Start, *, engines: int = 8, updates_per_s: float = 800, frontends: int = 1, seconds: float = 4
) -> dict[str, float]:
    """Measures one peer once; microseconds.

    Returns:
        p50, p99, p99.9 per update; age_p50, age_p99 sampled; count of updates; lost: those that the front-end
        never knew of; middle_cpu_us: CPU time of the peer's own processes per update.
    """
    with ExitStack() as stack:
        middle = start(engines, frontends)
        stack.callback(middle.close)
        rate = updates_per_s / engines
        writers = [stack.enter_context(Worker(publish_at, middle.spec, e, rate, seconds)) for e in range(engines)]
        others = [stack.enter_context(Worker(decide_on, middle.spec, f)) for f in range(1, frontends)]
        reader = stack.enter_context(Worker(watch, middle.spec))
        for worker in (*writers, *others, reader):
            worker.wait_ready()
        for worker in (reader, *others):
            worker.tell()
        time.sleep(SETTLE_S)
        cpu_before = sum(map(cpu_ns, middle.pids))
        began = time.monotonic() + 0.05
        for writer in writers:
            writer.tell(began)
        published = [np.array(writer.result(), float) / 1e3 for writer in writers]
        time.sleep(SETTLE_S)  # the last updates have 300 ms to arrive
        cpu = sum(map(cpu_ns, middle.pids)) - cpu_before
        for worker in (reader, *others, *writers):
            worker.tell()
        seen = reader.result()
        for worker in (*others, *writers):
            worker.open_doorbell()
    known = [first_known(p, *seen[e]) for e, p in enumerate(published)]
    sent, knew = np.concatenate(published), np.concatenate(known)
    arrived = np.isfinite(knew)
    ages = sampled_ages(sent[arrived], knew[arrived], SAMPLES)
    age = quantiles(ages)
    return {
        **quantiles((knew - sent)[arrived]),
        "age_p50": age["p50"],
        "age_p99": age["p99"],
        "lost": int((~arrived).sum()),
        "middle_cpu_us": cpu / 1e3 / len(sent),
    }


def first_known(published: Times, seen_at: Times, seen_number: Times) -> Times:
    """For updates 1, 2, 3..., when that number or a higher one was first seen; infinite if never.

    Args:
        published: when each was published.
        seen_at: when the front-end saw a change, ascending.
        seen_number: the update's number that it then saw.
    """
    number = np.maximum.accumulate(seen_number) if len(seen_number) else seen_number
    at = np.searchsorted(number, np.arange(1, len(published) + 1), side="left")
    return np.append(seen_at, np.inf)[at]


def sampled_ages(sent: Times, knew: Times, samples: int) -> Times:
    """At so many instants spread evenly, the age of the oldest update not yet known; 0 if there is none."""
    order = np.argsort(sent)
    sent, knew = sent[order], knew[order]
    instants = np.linspace(sent[0], sent[-1], samples)
    ages = np.zeros(samples)
    for i, t in enumerate(instants):
        before = np.searchsorted(sent, t, side="right")
        unknown = knew[:before] > t
        if unknown.any():
            ages[i] = t - sent[int(unknown.argmax())]
    return ages


def publish_at(line: Line, spec: Spec, dp_rank: int, rate: float, seconds: float) -> list[int]:
    """An engine: publishes its update's number as its waiting count; gives the times of its calls."""
    end = engine_end(spec, dp_rank)
    try:
        end.publish(0, 0)
        began = line.ready()
        random, times, at = Random(dp_rank), [], began + Random(dp_rank).random() / rate
        while at < began + seconds:
            time.sleep(max(0.0, at - time.monotonic()))
            times.append(time.monotonic_ns())
            end.publish(len(times), 0)
            at += (0.5 + random.random()) / rate
        line.answer(times)
        line.expect()
    finally:
        end.close()
    return times


def watch(line: Line, spec: Spec) -> list[tuple[Times, Times]]:
    """The front-end that looks: for each engine when it saw a change, and the number that it then saw."""
    end = frontend_end(spec, 0)
    use_reader_core()
    changes: list[tuple[int, Any]] = []
    known, monotonic_ns = end.known, time.monotonic_ns
    try:
        line.ready()
        last = known()
        while not line.told():
            for _ in range(LOOKS_BETWEEN_CHECKS):
                now = known()
                if now != last:
                    changes.append((monotonic_ns(), now))
                    last = now
        result = []
        for e in range(spec.dp_size):
            numbers = [(at, end.waiting(items[e])) for at, items in changes]
            seen = [(at, n) for i, (at, n) in enumerate(numbers) if i == 0 or n != numbers[i - 1][1]]
            array = np.array(seen, float).reshape(-1, 2)
            result.append((array[:, 0] / 1e3, array[:, 1]))
        return result
    finally:
        end.close()


def decide_on(line: Line, spec: Spec, index: int) -> None:
    """Another front-end: decides 20 times a second until told to stop."""
    end = frontend_end(spec, index)
    try:
        line.ready()
        while not line.told():
            end.finished(end.choose())
            end.wait(DECISION_INTERVAL_MS)
    finally:
        end.close()
