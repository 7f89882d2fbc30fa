"""The built-in chat workload of ``dpshm simulate``: arrivals drawn from distributions.

It has the shape of the Azure conversation trace of 2023 as far as that is published (Patel et al., "Splitwise",
ISCA 2024): the median prompt has 1,020 tokens and the median output 129. The rest is ours, and chosen so that
vLLM's policy and round robin come out about as they are reported to do on that trace: log-normal lengths with
deviations 0.6 and 1.0 of the logarithm, prompts of at most 14,000 and outputs of at most 1,000 tokens; arrivals
that are a Poisson process whose rate is drawn anew every `WINDOW_S` from a Gamma distribution of shape
`RATE_SHAPE`.

No trace is in it, and nothing about a policy was fitted to it. The same seed gives the same arrivals.
"""

from __future__ import annotations

from math import exp, log
from random import Random

from dpshm.sim.workloads.traces import Arrival

MEAN_RATE_PER_S = 5.0
"""At recorded speed."""
WINDOW_S = 5.0
RATE_SHAPE = 4.0
PROMPT_MEDIAN, PROMPT_LOG_DEVIATION, PROMPT_MOST = 1020, 0.6, 14_000
OUTPUT_MEDIAN, OUTPUT_LOG_DEVIATION, OUTPUT_MOST = 129, 1.0, 1000


def chat_arrivals(count: int, seed: int) -> list[Arrival]:
    """So many arrivals, the first at 0 s."""
    random = Random(seed)
    times: list[float] = []
    window_start = 0.0
    while len(times) < count:
        rate = random.gammavariate(RATE_SHAPE, MEAN_RATE_PER_S / RATE_SHAPE)
        time_s = window_start
        while rate > 0.0 and (time_s := time_s + random.expovariate(rate)) < window_start + WINDOW_S:
            times.append(time_s)
        window_start += WINDOW_S
    return [
        Arrival(
            time_s - times[0],
            _tokens(random, PROMPT_MEDIAN, PROMPT_LOG_DEVIATION, PROMPT_MOST),
            _tokens(random, OUTPUT_MEDIAN, OUTPUT_LOG_DEVIATION, OUTPUT_MOST),
        )
        for time_s in times[:count]
    ]


def _tokens(random: Random, median: int, log_deviation: float, most: int) -> int:
    return max(1, min(most, round(exp(random.gauss(log(median), log_deviation)))))
