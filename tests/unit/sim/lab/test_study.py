"""Comparisons: the same arrivals for all, intervals, and figures that mean what they say."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from dpshm.errors import SettingError
from dpshm.sim.lab.figures import estimate, figures_of
from dpshm.sim.lab.plant import Plant
from dpshm.sim.lab.run import run
from dpshm.sim.lab.study import SimulationSettings, compare, make_jobs
from dpshm.sim.workloads.traces import TraceError

SMALL = {"requests": 250, "rate": 9.0, "seeds": 2, "policies": ("vllm", "least_work")}


@pytest.fixture
def trace(tmp_path):
    """A short trace with blocks."""
    rng, lines = random.Random(1), []
    for i in range(60):
        blocks = [0, rng.randrange(5), 100 + i]
        line = {"timestamp": 500 * i, "input_length": 1400, "output_length": 4, "hash_ids": blocks}
        lines.append(json.dumps(line))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_comparison():
    """Guards against ratios to another run, regrets of the wrong sign, and another baseline."""
    found = compare(SimulationSettings(**SMALL))
    by = {(r.policy, r.information): r for r in found.results}
    assert list(by) == [("vllm", "broadcast"), ("least_work", "live"), ("oracle", "live")]
    assert found.baseline == ("vllm", "broadcast")
    assert (found.requests, found.seeds) == (250, 2)
    assert found.requests_per_s == pytest.approx(45, rel=0.2)
    base, work, oracle = by.values()
    assert base.ratio.mean.value == base.ratio.p99.value == 1.0
    assert base.ratio.mean.plus_minus == 0.0
    assert work.ratio.mean.value == pytest.approx(work.ttft_ms.mean / base.ttft_ms.mean, rel=0.05)
    assert oracle.regret == 0.0
    assert base.regret > work.regret >= -0.01
    assert work.ttft_ms.p50 < work.ttft_ms.mean < work.ttft_ms.p99 < work.e2e_ms.p99
    assert work.prefix_hit_rate is None


def test_figures_are_those_of_the_run():
    """Guards against seconds that pass for milliseconds, and percentiles of something else."""
    settings = SimulationSettings(**SMALL)
    jobs = make_jobs(settings, 1)
    figures = figures_of(run(settings.plant, jobs, "vllm", "broadcast"))
    ttft = sorted((job.first_s - job.due_s) * 1e3 for job in jobs)
    assert figures.ttft[0] == pytest.approx(sum(ttft) / len(ttft))
    assert ttft[124] <= figures.ttft[1] <= ttft[125]
    assert ttft[246] <= figures.ttft[2] <= ttft[248]
    assert figures.tokens_per_s == pytest.approx(sum(job.output_tokens for job in jobs) / figures.seconds)


def test_the_same_whatever_runs_it():
    """Guards against results that depend on how many processes share the work."""
    settings = SimulationSettings(**SMALL | {"oracle": False, "requests": 60})
    assert compare(settings, processes=1) == compare(settings, processes=2)


def test_all_combinations():
    """Guards against combinations that are left out or run twice."""
    both = SimulationSettings(policies=("vllm", "affinity"), information=("live", "scrape", "live"))
    assert both.combinations == [
        *(("vllm", "live"), ("vllm", "scrape"), ("affinity", "live"), ("affinity", "scrape")),
        ("oracle", "live"),
    ]
    named = SimulationSettings(policies=("vllm@scrape", "affinity:epsilon=2@live-index:10", "vllm"), oracle=False)
    assert named.combinations == [
        *(("vllm", "scrape"), ("affinity:epsilon=2", "live-index:10"), ("vllm", "broadcast")),
    ]
    plain = SimulationSettings(policies=("round_robin", "least_loaded"), oracle=False)
    assert plain.combinations == [("round_robin", "broadcast"), ("least_loaded", "live")]
    assert ("oracle", "live") not in SimulationSettings(plant=Plant(lockstep=True)).combinations


def test_shares_of_the_front_ends():
    """Guards against traffic that is even where it should not be."""
    settings = SimulationSettings(plant=Plant(frontends=4), requests=8000, skew=1.0)
    shares = Counter(job.frontend for job in make_jobs(settings, 0))
    whole = sum(1 / (f + 1) for f in range(4))
    assert [shares[f] / 8000 for f in range(4)] == pytest.approx([1 / (f + 1) / whole for f in range(4)], abs=0.02)


def test_a_trace_is_replayed(trace):
    """Guards against a trace whose seeds are all alike, or that loses requests where it goes round."""
    settings = SimulationSettings(trace=trace, rate=2.0)
    recorded, turned = make_jobs(settings, 0), make_jobs(settings, 1)
    assert [job.due_s for job in recorded] == pytest.approx([0.25 * i for i in range(60)])
    assert [job.due_s for job in turned] == pytest.approx([0.25 * i for i in range(60)], abs=0.01)
    assert [job.blocks for job in turned] != [job.blocks for job in recorded]
    assert Counter(job.blocks for job in turned) == Counter(job.blocks for job in recorded)
    by_blocks = {job.blocks[:2]: job.key for job in recorded}
    assert len(by_blocks) == len(set(by_blocks.values())) == 5
    assert all(by_blocks[job.blocks[:2]] == job.key for job in turned)


def test_affinity_meets_the_cache(trace):
    """Guards against keys that do not reach the policy: requests with one prefix must find it."""
    settings = SimulationSettings(trace=trace, policies=("least_work", "affinity"), seeds=1, oracle=False)
    least_work, affinity = compare(settings).results
    assert affinity.prefix_hit_rate > 1.2 * least_work.prefix_hit_rate


def test_intervals():
    """Guards against intervals that are too narrow to be of 95 %: half of t * s / sqrt(n) would pass unnoticed."""
    assert estimate([2.0]).plus_minus is None
    assert estimate([1.0, 3.0]).value == 2.0
    assert estimate([1.0, 3.0]).plus_minus == pytest.approx(12.706, rel=1e-3)
    rng = random.Random(5)
    covered = 0
    for _ in range(2000):
        e = estimate([rng.gauss(0, 1) for _ in range(4)])
        covered += abs(e.value) <= e.plus_minus
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plant": Plant(engines=0)}, "engines is 0"),
        ({"plant": Plant(frontends=0)}, "frontends is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"requests": 0}, "requests is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"skew": -1.0}, "skew is -1"),
        ({"policies": ()}, "there is nothing to compare"),
        ({"policies": ("best",)}, "no policy 'best'"),
        ({"policies": ("vllm@none",)}, "no information model 'none'"),
        ({"policies": ("best@live",)}, "no policy 'best'"),
        ({"workload": "novel"}, "no workload 'novel': choose one of chat, agents, fan-out, long-context"),
        ({"information": ("none",)}, "no information model 'none'"),
        ({"key_tokens": 0}, "key_tokens is 0"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    """Guards against an error after minutes of simulation instead of at the start."""
    with pytest.raises(SettingError, match=message):
        SimulationSettings(**wrong)


def test_a_trace_that_is_not_there(tmp_path):
    """Guards against an error in a worker that hangs the comparison."""
    with pytest.raises(TraceError, match="cannot read the trace"):
        compare(SimulationSettings(trace=tmp_path / "none"), processes=2)


def test_an_error_in_a_run_ends_all():
    """Guards against a pool that waits for ever for a run that failed."""
    from dpshm.sim.step_cost import StepCost

    settings = SimulationSettings(plant=Plant(cost=StepCost(kv_tokens=1)), requests=5, seeds=2)
    with pytest.raises(SettingError, match="no request fits"):
        compare(settings, processes=2)
