"""The built-in workload of long contexts and long answers."""

from __future__ import annotations

from statistics import fmean, median

from dpshm.sim.workloads.long_context import OUTPUT_MEDIAN, PROMPT_MEDIAN, PROMPT_MOST, long_context_arrivals


def test_lengths_are_those_that_the_page_names():
    """Guards against contexts too short to show decode load, and against a workload that is not repeatable."""
    found = long_context_arrivals(4000, 1)
    assert found == long_context_arrivals(4000, 1) != long_context_arrivals(4000, 2)
    assert found[0].time_s == 0
    prompts, outputs = [a.prompt_tokens for a in found], [a.output_tokens for a in found]
    assert 0.9 < median(prompts) / PROMPT_MEDIAN < 1.1
    assert 0.9 < median(outputs) / OUTPUT_MEDIAN < 1.1
    assert 3500 < fmean(prompts) < 4500
    assert 10 * PROMPT_MEDIAN < max(prompts) <= PROMPT_MOST
    assert min(prompts) > 0
