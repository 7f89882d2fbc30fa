"""The requests of the scenarios: the same in all arms, others in other rounds, with the sizes that are stated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.vllm.lane import Sizes
from bench.vllm.predict import predicted
from bench.vllm.prompts import Prompts, trace_lines
from bench.vllm.rounds import Plan, load_of
from bench.vllm.scenarios import BURST, BURST_S, BURSTS_PER_S, MAX_CONTEXT, SCENARIOS, bursts, thinned
from dpshm.sim.workloads.agents import BLOCK_TOKENS
from dpshm.sim.workloads.traces import Arrival, read_trace


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_seed_makes_the_same_requests(name: str) -> None:
    """Guards against arms of a round that play different requests, and against rounds that repeat one."""
    make = SCENARIOS[name].make
    assert make(20.0, 1) == make(20.0, 1)
    assert make(20.0, 1) != make(20.0, 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_requests_come_in_order_and_in_time(name: str) -> None:
    """Guards against a load that stops early, goes on too long, or has a request that no rank can hold."""
    scenario = SCENARIOS[name]
    arrivals = scenario.make(scenario.seconds, 3)
    times = [a.time_s for a in arrivals]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert 0.9 * scenario.seconds < times[-1] < scenario.seconds
    assert all(0 < a.prompt_tokens + a.output_tokens <= MAX_CONTEXT for a in arrivals)


def test_half_of_the_bursts_come_together() -> None:
    """Guards against bursts that are spread over time: then no queue builds up."""
    times = np.array([a.time_s for a in bursts(200.0, 1)])
    assert len(times) / 200.0 == pytest.approx(BURSTS_PER_S, rel=0.1)
    near = np.searchsorted(times, times + BURST_S) - np.searchsorted(times, times - BURST_S)
    assert (near > BURST / 2).mean() == pytest.approx(0.5, abs=0.07)


def test_conversations_share_their_past() -> None:
    """Guards against prompts of which nothing can be cached."""
    arrivals = SCENARIOS["conversation"].make(60.0, 1)
    seen: set[int] = set()
    cached = total = 0
    for arrival in arrivals:
        cached += sum(block in seen for block in arrival.block_hashes) * BLOCK_TOKENS
        total += arrival.prompt_tokens
        seen.update(arrival.block_hashes)
    assert 0.3 < cached / total < 0.8
    assert 8_000 < total / len(arrivals) < 16_000


def test_fewer_ranks_get_their_share() -> None:
    """Guards against two ranks under the load of eight."""
    arrivals = SCENARIOS["chat"].make(35.0, 1)
    assert thinned(arrivals, 8, 1) == arrivals
    assert len(thinned(arrivals, 2, 1)) == pytest.approx(len(arrivals) / 4, rel=0.15)


def test_no_play_begins_with_the_tokens_of_another() -> None:
    """Guards against prompts that an earlier play on the same server has left in the prefix caches."""
    plan = Plan(list(SCENARIOS), ["stock"], 2, 1, Sizes(8, 8, 1, 50), 5.0, {}, False, 1e9, Path())
    begun = set()
    for name in SCENARIOS:
        for number in (1, 2):
            prompts = Prompts(load_of(plan, SCENARIOS[name], number).seed, BLOCK_TOKENS)
            for arrival in (Arrival(0.0, 600, 1), Arrival(0.0, 600, 1, (0,))):  # a request, and a block of a trace
                begun.add(tuple(json.loads(prompts.body(0, arrival))["token_ids"][:16]))
    assert len(begun) == 2 * 2 * len(SCENARIOS)


def test_bodies_have_the_tokens_of_their_blocks() -> None:
    """Guards against prompts that share nothing, or all, and against lengths that differ from the trace's."""
    prompts = Prompts("chat 1", 4)
    first = json.loads(prompts.body(0, Arrival(0.0, 10, 3, (7, 8))))
    second = json.loads(prompts.body(1, Arrival(0.0, 9, 3, (7, 9))))
    assert [len(first["token_ids"]), len(second["token_ids"])] == [10, 9]
    assert first["token_ids"][:4] == second["token_ids"][:4]
    assert first["token_ids"][4:8] != second["token_ids"][4:8]
    assert first["sampling_params"]["max_tokens"] == 3
    assert first["stream"] is True
    other = json.loads(Prompts("chat 2", 4).body(0, Arrival(0.0, 10, 3, (7, 8))))
    assert other["token_ids"][:4] != first["token_ids"][:4]
    short = json.loads(prompts.body(2, Arrival(0.0, 3, 1, (7,))))
    assert len(short["token_ids"]) == 3


def test_the_laboratory_reads_what_is_written(tmp_path: Path) -> None:
    """Guards against a prediction of other requests than those that were played."""
    arrivals = SCENARIOS["agents"].make(20.0, 1)
    path = tmp_path / "agents.jsonl"
    path.write_text("\n".join(trace_lines(arrivals, BLOCK_TOKENS)))
    read = read_trace(path)
    assert read.block_tokens == BLOCK_TOKENS
    for ours, theirs in zip(arrivals, read.arrivals, strict=True):
        assert theirs.time_s == pytest.approx(ours.time_s - arrivals[0].time_s, abs=1.1e-3)
        assert theirs[1:3] == ours[1:3]
        assert theirs.block_hashes[: len(ours.block_hashes)] == ours.block_hashes


def test_the_laboratory_plays_what_the_servers_do() -> None:
    """Guards against a prediction for other steps: those of a lockstep scenario are longer."""
    plan = Plan(["chat"], ["stock"], 1, 1, Sizes(8, 8, 1, 50), 5.0, {}, False, 1e9, Path())
    chat = predicted(plan, "chat", 1, "stock")
    lockstep = predicted(plan, "lockstep-chat", 1, "stock")
    assert 5.0 < chat["per_token"] < lockstep["per_token"]
    assert predicted(plan, "chat", 1, "default")["ttft_mean"] < chat["ttft_mean"]
