"""The report of a demo: the figures of all processes put together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from dpshm.sim.demo.messages import Stats


class Staleness(msgspec.Struct):
    """Staleness of decisions in microseconds; see `dpshm.sim.demo.router`. Null without a decision.

    Attributes:
        share: share of the decisions that did not have the newest report of every rank.
    """

    p50: float | None
    p99: float | None
    share: float | None


class Ttft(msgspec.Struct):
    """Time to first token in milliseconds, from when the request was due. Null without a reply."""

    mean: float | None
    p50: float | None
    p99: float | None


class Imbalance(msgspec.Struct):
    """The most less the fewest requests on a rank, sampled while requests were being sent."""

    mean: float | None
    max: int | None


class Report(msgspec.Struct):
    """The report of one run, as ``dpshm demo --json`` prints it.

    Attributes:
        workload: the built-in one, if there is no trace.
        sent: requests due and handed to a router. Each one is then completed, refused or lost.
        completed: requests whose last token came back.
        refused: requests that can never fit an engine's KV cache.
        cut_off: requests that went with a front-end which chaos killed.
        lost: all other requests.
        waves: waves completed.
        prefix_hit_rate: prompt tokens that engines found in their prefix caches, of all; null without blocks.
        seconds: from time 0 to the end of sending or the last reply, the later of the two.
        problems: the failures, in sentences.
    """

    stats: Stats
    policy: str
    trace: str | None
    rate: float
    seed: int
    engines: int
    frontends: int
    seconds: float
    sent: int
    completed: int
    refused: int
    lost: int
    cut_off: int
    waves: int
    staleness_us: Staleness
    ttft_ms: Ttft
    imbalance: Imbalance
    prefix_hit_rate: float | None
    steps: int
    dummy_steps: int
    preemptions: int
    sent_by_frontend: list[int]
    finished_by_engine: list[int]
    problems: list[str]
    workload: str = "code"


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile, interpolated and rounded to a thousandth; None without values."""
    return round(float(np.percentile(values, percent)), 3) if len(values) else None


def mean(values: Sequence[float]) -> float | None:
    """The mean, rounded to four places; None without values."""
    return round(float(np.mean(values)), 4) if len(values) else None


def staleness_of(values_us: Sequence[float]) -> Staleness:
    """Summarises the staleness of decisions (p50, p99, mean)."""
    share = [float(value > 0) for value in values_us]
    return Staleness(percentile(values_us, 50), percentile(values_us, 99), mean(share))


def ttft_of(values_ms: Sequence[float]) -> Ttft:
    """Summarises the times to first token of requests."""
    return Ttft(mean(values_ms), percentile(values_ms, 50), percentile(values_ms, 99))


def imbalance_of(samples: Sequence[int]) -> Imbalance:
    """Summarises the imbalance of samples."""
    return Imbalance(mean(samples), max(samples, default=None))
