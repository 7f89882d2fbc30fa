"""What reporting adds to steps, what `publish()` takes in a busy engine, and how fresh the board is.

Under a steady load the ranks alternate between no reports, the board and the broadcast's reports
(`bench.gpu.rank`). Of each way: the time of a turn of the engine's loop, of pure decode steps alone; and, over the
rounds of alternation, what a way adds to the median turn without reports of the same round. Meanwhile a reader
reads the board as fast as it can.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.distribution import quantiles
from bench.gpu.driver import LOAD_PER_RANK, LOAD_PROMPT_TOKENS, TIMEOUT_S, Driver, Stuck
from bench.gpu.rank import BLOCK, WAYS
from bench.gpu.ranks import notes_of
from bench.processes import Worker

SPARE_OUTPUT_TOKENS = 64
SETTLE_STEPS = 2
"""Steps at the start of a block that the comparison leaves out."""
RESAMPLES = 2000


def measure_steps(driver: Driver, ranks: Sequence[Worker], reader: Worker, steps: int) -> dict[str, Any]:
    """Measures steps, publish and freshness, under a load that outlasts the steps."""
    notes_of(ranks)
    reader.tell()
    for _ in range(LOAD_PER_RANK):
        for rank in range(driver.dp_size):
            driver.send(rank, LOAD_PROMPT_TOKENS, steps + SPARE_OUTPUT_TOKENS)
    began = time.monotonic()
    driver.wait(lambda: not driver.out, "the end of the steady load", patience_s=TIMEOUT_S + steps * 0.5)
    took_s = time.monotonic() - began
    driver.wait(driver.paused, "the pause after the load")
    reader.tell()
    seen = reader.result()
    notes = notes_of(ranks)
    result: dict[str, Any] = {"requests_per_rank": LOAD_PER_RANK, "seconds": took_s, "turn_ms": {}}
    steps_of_all = np.concatenate([n["steps"] for n in notes])
    full_decode = (steps_of_all[:, 4] == 0) & (steps_of_all[:, 3] == LOAD_PER_RANK)
    alternating = np.concatenate([np.arange(len(n["steps"])) < steps for n in notes])
    for way, name in enumerate(WAYS):
        of_way = full_decode & alternating & (steps_of_all[:, 0] == way)
        result["turn_ms"][name] = quantiles((steps_of_all[of_way, 2] - steps_of_all[of_way, 1]) / 1e6)
    result["adds_ms"] = {
        name: added([n["steps"][:steps] for n in notes], way) for way, name in enumerate(WAYS) if way
    }
    begun, ended = steps_of_all[full_decode, 1].min(), steps_of_all[full_decode, 2].max()
    publishes = [n["publishes"] for n in notes]
    publishes = [p[(p[:, 0] > begun) & (p[:, 1] < ended)] for p in publishes]  # under load alone
    result["publish_us"] = quantiles(np.concatenate([p[:, 1] - p[:, 0] for p in publishes]) / 1e3)
    result["pub_queue_us"] = quantiles(np.concatenate([n["puts"] for n in notes]) / 1e3)
    result["pub_send_us"] = quantiles(np.concatenate([n["sends"] for n in notes]) / 1e3)
    ages = []
    for rank, p in enumerate(publishes):
        _, beats, seen_ns = seen[seen[:, 0] == rank].T  # beats grow; the load outlasts the last of `p`
        ages.append(seen_ns[np.searchsorted(beats, p[:, 2])][:, None] - p[:, [0, 2]])
    called, stored = np.concatenate(ages).T / 1e3
    result["freshness_us"] = quantiles(called)
    result["freshness_since_stored_us"] = quantiles(stored)
    return result


def added(steps_of_ranks: Sequence[Any], way: int) -> dict[str, float]:
    """Milliseconds that a way adds to the median turn without reports, over the rounds of the alternation.

    Returns:
        The median over the rounds of all ranks, and a 95 % interval of it from resampled rounds.
    """
    differences = []
    for steps in steps_of_ranks:
        for start in range(0, len(steps) - BLOCK * len(WAYS) + 1, BLOCK * len(WAYS)):
            turns: dict[int, Any] = {}
            for block in range(start, start + BLOCK * len(WAYS), BLOCK):
                settled = steps[block + SETTLE_STEPS : block + BLOCK]
                settled = settled[(settled[:, 4] == 0) & (settled[:, 3] == LOAD_PER_RANK)]
                if len(settled) == BLOCK - SETTLE_STEPS:
                    turns[int(settled[0, 0])] = np.median(settled[:, 2] - settled[:, 1]) / 1e6
            if len(turns) == len(WAYS):
                differences.append(turns[way] - turns[0])
    if not differences:
        raise Stuck("no round of alternation was under load from start to end: more --steps are needed")
    sample = np.array(differences)
    picks = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.quantile(np.median(sample[picks], axis=1), (0.025, 0.975))
    return {"median": float(np.median(sample)), "low": float(low), "high": float(high), "rounds": len(sample)}
