"""Workloads of ``dpshm simulate`` whose prompts share prefixes: agents, and fan-outs of one new context.

Both are drawn from distributions that we chose; no trace is in them. A block id stands for `BLOCK_TOKENS` tokens
and for all before them, as in the Mooncake traces. The same seed gives the same arrivals, `MEAN_RATE_PER_S` a
second.

*Agents.* All prompts begin with the same 2,048 tokens, a system prompt with its tools. An agent sends about six
requests, one after the other: each prompt is the last one, its answer and the result of a tool. Agents begin as a
Poisson process.

*Fan-out.* An orchestrator reads a new context of 4,000 to 16,000 tokens and sends 16 requests within 50 ms, each
the context and a task of its own. Every second request of the workload belongs to such a burst; the others have
prompts of their own. Nothing of a context is cached anywhere when its burst begins.
"""

from __future__ import annotations

from itertools import count
from math import exp, log
from random import Random

from dpshm.sim.workloads.traces import Arrival

BLOCK_TOKENS = 512
MEAN_RATE_PER_S = 5.0
SYSTEM_BLOCKS = 4
MEAN_TURNS = 6
TURN_GAP_S = 4.0
BURST, BURST_S = 16, 0.05


def agents_arrivals(requests: int, seed: int) -> list[Arrival]:
    """So many requests of agents that share a system prompt, in order of time, the first at 0 s."""
    random, ids = Random(seed), count(SYSTEM_BLOCKS)
    found: list[Arrival] = []
    began_s = 0.0
    # Those that began last are cut off, so some more are drawn than are wanted.
    for _ in range(requests // MEAN_TURNS * 2 + 20):
        began_s += random.expovariate(MEAN_RATE_PER_S / MEAN_TURNS)
        time_s, blocks = began_s, list(range(SYSTEM_BLOCKS))
        tokens = SYSTEM_BLOCKS * BLOCK_TOKENS + _tokens(random, 400, 0.8)
        while True:
            output = _tokens(random, 100, 0.8)
            blocks += [next(ids) for _ in range(len(blocks), tokens // BLOCK_TOKENS)]
            found.append(Arrival(time_s, tokens, output, tuple(blocks)))
            if random.random() < 1 / MEAN_TURNS:
                break
            tokens += output + _tokens(random, 500, 1.0)
            time_s += random.expovariate(1 / TURN_GAP_S)
    return _in_order(found, requests)


def fan_out_arrivals(requests: int, seed: int) -> list[Arrival]:
    """So many requests, half of them in bursts on one new context each, in order of time, the first at 0 s."""
    random, ids = Random(seed), count()
    found: list[Arrival] = []
    time_s = 0.0
    for _ in range(requests // BURST + 20):
        time_s += random.expovariate(MEAN_RATE_PER_S / (2 * BURST))
        context = tuple(next(ids) for _ in range(random.randint(8, 31)))
        for _ in range(BURST):
            prompt = len(context) * BLOCK_TOKENS + _tokens(random, 150, 0.5, most=BLOCK_TOKENS - 1)
            found.append(Arrival(time_s + BURST_S * random.random(), prompt, _tokens(random, 100, 0.8), context))
    until_s, time_s = time_s, 0.0
    while (time_s := time_s + random.expovariate(MEAN_RATE_PER_S / 2)) < until_s:
        prompt = _tokens(random, 1000, 0.6)
        own = tuple(next(ids) for _ in range(prompt // BLOCK_TOKENS))
        found.append(Arrival(time_s, prompt, _tokens(random, 130, 1.0), own))
    return _in_order(found, requests)


def _in_order(arrivals: list[Arrival], requests: int) -> list[Arrival]:
    arrivals.sort(key=lambda a: a.time_s)
    return [a._replace(time_s=a.time_s - arrivals[0].time_s) for a in arrivals[:requests]]


def _tokens(random: Random, median: int, log_deviation: float, most: int = 14_000) -> int:
    return max(1, min(most, round(exp(random.gauss(log(median), log_deviation)))))
