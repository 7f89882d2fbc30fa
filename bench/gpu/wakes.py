"""Requests at random times, most of them to paused ranks: every one must be answered, and every wave end.

Of a request to paused ranks, from just before `route()`: until the engine has it (*arrive*), until it enters its
step (*enter*), until the last of the others, woken by START, enters it too (*others*: what waking adds), until all
know that (*exchange*), until the first token is there (*compute*), until the reply (*reply*).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from bench.distribution import quantiles
from bench.gpu.driver import Driver
from bench.gpu.ranks import notes_of
from bench.processes import Worker

WAKE_PROMPT_TOKENS = 32
SPLIT = ("arrive", "enter", "others", "exchange", "compute", "reply", "wake", "all")
"""Parts of the time to first token of a request that wakes the ranks; the first six are consecutive."""


def measure_wakes(
    driver: Driver, ranks: Sequence[Worker], cycles: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Wakes the ranks until `cycles` waves are over."""
    board, random = driver.frontend.board, Random(2)
    notes_of(ranks)
    first_wave, asleep, sent_ns = board.wave, {}, {}
    requests = 0
    typical_cycle_s = 0.1
    while board.wave - first_wave < cycles:
        began = time.monotonic()
        if random.random() < 0.7:
            driver.wait(driver.paused, "a pause")
            wait_s = random.random() * 0.02
        else:
            wait_s = random.random() * 1.3 * typical_cycle_s  # into running, pausing and paused ranks alike
        time.sleep(wait_s)
        was_asleep = driver.paused()
        both = random.random() < 0.2
        order = random.sample(range(driver.dp_size), 2 if both and driver.dp_size > 1 else 1)
        for rank in order:
            now = time.monotonic_ns()
            number = driver.send(rank, WAKE_PROMPT_TOKENS, random.choice((1, 1, 1, 3)))
            sent_ns[number] = now
            requests += 1
            if was_asleep and len(order) == 1:
                asleep[number] = (rank, driver.out[number].wave)
            time.sleep(random.random() * 0.003 if len(order) > 1 else 0)
        driver.wait(lambda: not driver.out, "a reply")
        typical_cycle_s = 0.9 * typical_cycle_s + 0.1 * min(2.0, time.monotonic() - began)
        if requests % 50 == 0:
            tell(f"waking: {board.wave - first_wave} of {cycles} waves")
    driver.wait(driver.paused, "the last pause")
    notes = notes_of(ranks)
    first = {int(n): times for note in notes for n, *times in note["first"]}
    entered = [{int(wave): int(at) for wave, _, at in note["woken"]} for note in notes]
    split: dict[str, list[float]] = {name: [] for name in SPLIT}
    start_came_first = 0
    for number, (rank, wave) in asleep.items():
        sent, (taken, agreed, computed), replied = sent_ns[number], first[number], driver.replied_ns[number]
        own, last = entered[rank][wave], max(e[wave] for e in entered)
        if own < taken:  # its engine heard START before the request, which waited for the end of an empty step
            start_came_first += 1
            own = last = agreed
        times = (sent, taken, own, last, agreed, computed, replied)
        for name, begin, end in zip(SPLIT, times, times[1:], strict=False):
            split[name].append((end - begin) / 1e6)
        split["wake"].append((agreed - sent) / 1e6)
        split["all"].append((replied - sent) / 1e6)
    return {
        "waves": board.wave - first_wave,
        "requests": requests,
        "of_them_to_sleeping_ranks_alone": len(asleep),
        "start_came_first": start_came_first,
        "hangs": 0,  # else `Stuck` was raised, or a rank's watchdog ended it
        "to_first_token_ms": {name: quantiles(values) for name, values in split.items()},
    }
