"""Built-in workloads whose prompts share prefixes."""

from __future__ import annotations

from collections import Counter

import pytest

from dpshm.sim.workloads.agents import BLOCK_TOKENS, BURST, SYSTEM_BLOCKS, agents_arrivals, fan_out_arrivals


@pytest.mark.parametrize("make", [agents_arrivals, fan_out_arrivals])
def test_arrivals_are_a_workload(make):
    """Guards against fewer requests than asked for, blocks beyond a prompt, and seeds that are all alike."""
    found = make(1500, 3)
    assert len(found) == 1500
    assert found == make(1500, 3)
    assert found != make(1500, 4)
    assert found[0].time_s == 0.0
    assert [a.time_s for a in found] == sorted(a.time_s for a in found)
    assert all(len(a.block_hashes) == a.prompt_tokens // BLOCK_TOKENS for a in found)
    assert 3.0 < 1499 / found[-1].time_s < 7.0


def test_agents_share_their_beginning():
    """Guards against system prompts that differ, and against turns that do not continue the one before."""
    found = agents_arrivals(600, 1)
    assert len({a.block_hashes[:SYSTEM_BLOCKS] for a in found}) == 1
    longest: dict[tuple[int, ...], int] = {}
    for arrival in found:
        own = arrival.block_hashes[SYSTEM_BLOCKS : SYSTEM_BLOCKS + 1]
        assert len(arrival.block_hashes) >= longest.get(own, 0)
        if own:
            longest[own] = len(arrival.block_hashes)
    assert max(Counter(a.block_hashes[SYSTEM_BLOCKS : SYSTEM_BLOCKS + 1] for a in found).values()) > 5


def test_a_fan_out_is_a_burst_on_one_context():
    """Guards against bursts whose context was there before, and against bursts that are spread out."""
    found = fan_out_arrivals(2000, 1)
    uses: dict[tuple[int, ...], list[float]] = {}
    for arrival in found:
        uses.setdefault(arrival.block_hashes, []).append(arrival.time_s)
    bursts = [times for blocks, times in uses.items() if blocks and len(times) > 1]
    assert sum(map(len, bursts)) == pytest.approx(1000, abs=150)
    assert all(len(times) <= BURST and times[-1] - times[0] <= 0.05 for times in bursts)
