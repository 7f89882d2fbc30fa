"""A built-in workload of ``dpshm simulate``: long contexts and long answers, so that decoding is most of the work.

Drawn from distributions that we chose; no trace is in it. Log-normal lengths: the median prompt has 2,000 tokens
and the mean 4,000 (of at most 60,000), the median output 800 and the mean 1,000 (of at most 4,000). That is near
what is published for the conversations of the Azure trace of 2024 whose outputs are long (mean 4,652 and 1,052;
arXiv 2605.06113). Arrivals are those of the chat workload. The same seed gives the same arrivals.
"""

from __future__ import annotations

from math import exp, log
from random import Random

from dpshm.sim.workloads.chat import chat_arrivals
from dpshm.sim.workloads.traces import Arrival

PROMPT_MEDIAN, PROMPT_LOG_DEVIATION, PROMPT_MOST = 2000, 1.2, 60_000
OUTPUT_MEDIAN, OUTPUT_LOG_DEVIATION, OUTPUT_MOST = 800, 0.7, 4000


def long_context_arrivals(count: int, seed: int) -> list[Arrival]:
    """So many arrivals, the first at 0 s."""
    random = Random(seed)
    return [
        Arrival(
            arrival.time_s,
            _tokens(random, PROMPT_MEDIAN, PROMPT_LOG_DEVIATION, PROMPT_MOST),
            _tokens(random, OUTPUT_MEDIAN, OUTPUT_LOG_DEVIATION, OUTPUT_MOST),
        )
        for arrival in chat_arrivals(count, seed)
    ]


def _tokens(random: Random, median: int, log_deviation: float, most: int) -> int:
    return max(1, min(most, round(exp(random.gauss(log(median), log_deviation)))))
