"""The built-in workload: arrivals drawn from distributions, for a demo with no trace at hand.

It has the shape of a real service in fast motion. Every parameter was measured on the Azure code-completion
trace (``AzureLLMInferenceTrace_code.csv``, 8,819 requests; Azure Public Dataset 2023, CC-BY 4.0, Patel et al.,
"Splitwise", ISCA 2024), played twelve times as fast:

- bursts: the number of requests in windows of 12 s has mean 30.8 and a squared coefficient of variation
  that exceeds a Poisson process's by 2.62. So each second here draws its rate from a Gamma distribution of
  mean 30 and shape 1 / 2.62 = 0.38, and arrivals within it are a Poisson process. More than half of the
  trace's windows are empty; the correlation of neighbouring windows (0.39) is left out;
- prompt tokens: the logarithm has mean 7.00 and deviation 1.36; the longest prompt is 7,437;
- output tokens: the logarithm has mean 2.79 and deviation 0.85; from 6 to 1,899 tokens; not correlated
  with the prompt's (-0.004 between the logarithms).

The same seed gives the same arrivals, whatever the length asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from random import Random

from dpshm.sim.workloads.traces import Arrival

MEAN_RATE_PER_S = 30.0
RATE_SHAPE = 0.38
WINDOW_S = 1.0
PROMPT_LOG_MEAN, PROMPT_LOG_DEVIATION = 7.00, 1.36
PROMPT_LEAST, PROMPT_MOST = 3, 7_437
OUTPUT_LOG_MEAN, OUTPUT_LOG_DEVIATION = 2.79, 0.85
OUTPUT_LEAST, OUTPUT_MOST = 6, 1_899


def synthetic_arrivals(seconds: float, seed: int) -> list[Arrival]:
    """Arrivals of the first so many seconds; the first request comes at 0 s, as in a trace."""
    arrivals = []
    began = None
    for arrival in _endless(Random(seed)):
        began = arrival.time_s if began is None else began
        if arrival.time_s - began >= seconds:
            break
        arrivals.append(arrival._replace(time_s=arrival.time_s - began))
    return arrivals


def _endless(random: Random) -> Iterator[Arrival]:
    window_start = 0.0
    while True:
        rate = random.gammavariate(RATE_SHAPE, MEAN_RATE_PER_S / RATE_SHAPE)
        time_s = window_start
        # A rate that underflowed to 0 is a window without arrivals; so is one that the first gap leaves.
        while rate > 0.0 and (time_s := time_s + random.expovariate(rate)) < window_start + WINDOW_S:
            yield Arrival(
                time_s,
                _tokens(random, PROMPT_LOG_MEAN, PROMPT_LOG_DEVIATION, PROMPT_LEAST, PROMPT_MOST),
                _tokens(random, OUTPUT_LOG_MEAN, OUTPUT_LOG_DEVIATION, OUTPUT_LEAST, OUTPUT_MOST),
            )
        window_start += WINDOW_S


def _tokens(random: Random, log_mean: float, log_deviation: float, least: int, most: int) -> int:
    return round(min(max(exp(random.gauss(log_mean, log_deviation)), least), most))
