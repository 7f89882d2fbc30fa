"""The workload: what is cut, sped up, dealt out and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpshm.errors import SettingError
from dpshm.sim.demo import workload
from dpshm.sim.demo.workload import DemoSettings, make_workload
from dpshm.sim.workloads.chat import chat_arrivals
from dpshm.sim.workloads.synthetic import synthetic_arrivals
from dpshm.sim.workloads.traces import TraceError


@pytest.fixture
def trace(tmp_path) -> Path:
    """Ten requests, one a second."""
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:17:0{i},{100 + i},{10 + i}" for i in range(10)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    return path


def test_rate_compresses_time_and_seconds_cut(trace):
    """Guards against a rate that cuts too much or too little, and against requests dealt twice or never."""
    shares, seconds, _ = make_workload(DemoSettings(trace=trace, rate=2, seconds=3, frontends=3))
    assert seconds == 3
    assert sorted(arrival for share in shares for arrival in share) == [
        (i / 2, 100 + i, 10 + i, ()) for i in range(6)
    ]
    assert all(share == sorted(share) for share in shares)


def test_a_trace_that_ends_early_ends_the_demo(trace):
    """Guards against waiting for requests that will not come."""
    assert make_workload(DemoSettings(trace=trace, rate=3, seconds=20)).seconds == 3


def test_built_in_workload(trace):
    """Guards against a built-in workload that ignores rate, seed or length."""
    settings = DemoSettings(rate=2, seconds=5, seed=7, frontends=1)
    (share,), seconds, _ = make_workload(settings)
    assert seconds == 5
    assert share == [(a.time_s / 2, a.prompt_tokens, a.output_tokens, ()) for a in synthetic_arrivals(10, 7)]


def test_built_in_chat():
    """Guards against chat arrivals that end before the demo, or are those of code completion."""
    settings = DemoSettings(workload="chat", rate=9, seconds=5, seed=7, frontends=1)
    (share,), seconds, _ = make_workload(settings)
    assert seconds == 5
    arrivals = [a for a in chat_arrivals(5_000, 7) if a.time_s < 45]
    assert [time_s for time_s, *_ in share] == [a.time_s / 9 for a in arrivals]


def test_same_seed_deals_alike(trace):
    """Guards against a comparison of two stats paths on different workloads."""
    settings = DemoSettings(trace=trace, seed=1)
    assert make_workload(settings) == make_workload(settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engines": 0}, "engines is 0"),
        ({"engines": 65}, "engines is 65"),
        ({"frontends": -1}, "frontends is -1"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": -2.0}, "rate is -2"),
        ({"policy": "best"}, "no policy 'best'"),
    ],
)
def test_options_out_of_range(options, says):
    """Guards against a bad option that shows only after a dozen processes were started."""
    with pytest.raises(SettingError, match=says):
        DemoSettings(**options)


def test_too_many_requests(monkeypatch):
    """Guards against filling the memory with arrivals that nothing can play."""
    with pytest.raises(SettingError, match="lower --rate"):
        make_workload(DemoSettings(rate=1e9))
    monkeypatch.setattr(workload, "MAX_REQUESTS", 1500)
    with pytest.raises(SettingError, match="lower --rate"):
        make_workload(DemoSettings(rate=4))


def test_missing_trace(tmp_path):
    """Guards against a typo in a file name that runs the built-in workload instead."""
    with pytest.raises(TraceError, match="cannot read"):
        make_workload(DemoSettings(trace=tmp_path / "none.csv"))
