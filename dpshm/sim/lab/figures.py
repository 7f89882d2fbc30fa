"""The figures of a comparison: of one run, of a combination over its seeds, and of all together.

Ratios are taken seed by seed, on the same arrivals, and only then averaged. Intervals are Student's, 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import msgspec
import numpy as np

from dpshm.errors import SettingError
from dpshm.sim.lab.run import Outcome

Combination = tuple[str, str]
"""A policy's name and an information model's."""
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""Of 1, 2, ... degrees of freedom; beyond, 2.14 is close enough (1.96 in the end) and never too narrow."""


class Estimate(msgspec.Struct):
    """A mean over seeds, and the half width of its 95 % interval (null for one seed)."""

    value: float
    plus_minus: float | None


class Times(msgspec.Struct):
    """Means over seeds, in milliseconds. Fields in `_ci` are half widths of 95 % intervals."""

    mean: float
    p50: float
    p99: float
    mean_ci: float | None
    p99_ci: float | None


class Ratio(msgspec.Struct):
    """Ratios to the baseline, on the same arrivals."""

    mean: Estimate
    p99: Estimate


class Result(msgspec.Struct):
    """One combination.

    Attributes:
        ttft_ms: time to first token.
        e2e_ms: time to last token.
        tpot_ms: mean time per output token after the first.
        tokens_per_s: output tokens of the whole run, to the last token.
        imbalance: most less fewest requests on a rank, mean over the arrivals.
        prefix_hit_rate: share of prompt tokens found in a prefix cache; null if the workload has no blocks.
        regret: mean time to first token over the oracle's, less 1; null if the oracle did not run.
        ratio: of time to first token to the baseline's; null if there is none.
    """

    policy: str
    information: str
    ttft_ms: Times
    e2e_ms: Times
    tpot_ms: float
    tokens_per_s: float
    imbalance: float
    prefix_hit_rate: float | None
    regret: float | None
    ratio: Ratio | None
    preemptions: float
    refused: int


class Comparison(msgspec.Struct):
    """The comparison, as ``dpshm simulate --json`` prints it.

    Attributes:
        requests: requests in each run.
        requests_per_s: mean rate of arrivals; in a closed loop, of completions. 0 if all came at once.
        baseline: the combination that ratios refer to.
    """

    workload: str
    engines: int
    frontends: int
    rate: float
    seeds: int
    requests: int
    requests_per_s: float
    baseline: Combination | None
    results: list[Result]


class Figures(msgspec.Struct):
    """The figures of one run. Times are in ms: mean, p50, p99."""

    ttft: tuple[float, float, float]
    e2e: tuple[float, float, float]
    tpot: float
    seconds: float
    tokens_per_s: float
    imbalance: float
    prefix_hit_rate: float | None
    preemptions: int
    refused: int
    requests: int
    requests_per_s: float


def figures_of(outcome: Outcome) -> Figures:
    """The figures of one run.

    Raises:
        SettingError: no request fits an engine.
    """
    if not len(outcome.ttft_s):
        raise SettingError("no request fits the KV cache of an engine: raise --kv-tokens")

    def three(values: Any) -> tuple[float, float, float]:
        ms = values * 1e3
        p50, p99 = np.percentile(ms, (50, 99))
        return float(ms.mean()), float(p50), float(p99)

    return Figures(
        ttft=three(outcome.ttft_s),
        e2e=three(outcome.e2e_s),
        tpot=float(outcome.tpot_s.mean() * 1e3) if len(outcome.tpot_s) else 0.0,
        seconds=outcome.seconds,
        tokens_per_s=outcome.output_tokens / max(outcome.seconds, 1e-9),
        imbalance=outcome.imbalance,
        prefix_hit_rate=outcome.prefix_hit_rate,
        preemptions=outcome.preemptions,
        refused=outcome.refused,
        requests=len(outcome.ttft_s),
        requests_per_s=outcome.requests_per_s,
    )


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and Student's 95 % interval around it."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, None)
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Estimate(mean, _STUDENT_95[min(n - 1, len(_STUDENT_95)) - 1] * deviation / sqrt(n))


def result_of(
    combination: Combination, runs: list[Figures], base: list[Figures] | None, oracle: list[Figures] | None
) -> Result:
    """The figures of one combination from one run a seed, compared with the baseline and the oracle."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def times(of: list[tuple[float, float, float]]) -> Times:
        means, p99s = estimate([t[0] for t in of]), estimate([t[2] for t in of])
        return Times(means.value, mean([t[1] for t in of]), p99s.value, means.plus_minus, p99s.plus_minus)

    def ratios(i: int) -> Estimate:
        assert base is not None
        return estimate([r.ttft[i] / b.ttft[i] for r, b in zip(runs, base, strict=True)])

    hits = [r.prefix_hit_rate for r in runs if r.prefix_hit_rate is not None]
    return Result(
        policy=combination[0],
        information=combination[1],
        ttft_ms=times([r.ttft for r in runs]),
        e2e_ms=times([r.e2e for r in runs]),
        tpot_ms=mean([r.tpot for r in runs]),
        tokens_per_s=mean([r.tokens_per_s for r in runs]),
        imbalance=mean([r.imbalance for r in runs]),
        prefix_hit_rate=mean(hits) if hits else None,
        regret=mean([r.ttft[0] / o.ttft[0] for r, o in zip(runs, oracle, strict=True)]) - 1 if oracle else None,
        ratio=Ratio(ratios(0), ratios(2)) if base else None,
        preemptions=mean([float(r.preemptions) for r in runs]),
        refused=runs[0].refused,
    )
