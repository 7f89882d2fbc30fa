"""Tests of `dpshm.vllm.shadow`."""

from __future__ import annotations

from dpshm.vllm.shadow import ShadowTally


def test_the_summary_tells_both_sides():
    """Guards against a comparison that hides which side chose better."""
    tally = ShadowTally()
    assert tally.summary() == "no decisions yet"
    tally.count(0, 0, [3, 9])
    tally.count(1, 0, [3, 9])
    assert (tally.decisions, tally.agreed) == (2, 1)
    assert tally.summary() == (
        "2 decisions, 1 the same (50 %). Requests already at the chosen engine: "
        "vLLM 6.00, dpshm 3.00 on average; vLLM's engine had up to 6 more"
    )
