"""How long a simulated step takes."""

from __future__ import annotations

import pytest

from dpshm.errors import SettingError
from dpshm.sim.step_cost import FLAT_COST, StepCost


def test_a_step_takes_the_sum_of_its_parts():
    """Guards against a part of a step that costs nothing, such as the context that running requests hold."""
    cost = StepCost(base_s=1.0, per_request_s=0.1, per_prompt_token_s=0.01, per_held_token_s=0.001)
    assert cost.seconds(0, 0) == 1.0
    assert cost.seconds(7, 2, 5) == pytest.approx(1.0 + 0.07 + 0.2 + 0.005)
    assert cost.slower(3.0).seconds(7, 2, 5) == pytest.approx(3 * 1.275)


def test_the_default_is_what_its_source_says():
    """Guards against a default that no longer follows from the bandwidth and the model that the page names."""
    bytes_a_token = 32 * 8 * 128 * 2 * 2
    assert StepCost().per_held_token_s == pytest.approx(bytes_a_token / (0.6 * 3.35e12), rel=0.01)
    assert FLAT_COST.seconds(0, 1, 60_000) == FLAT_COST.seconds(0, 1, 0)


@pytest.mark.parametrize("text", ["", "8", "8,0.04", "8,0.04,0.2,0,0", "8,x,1", "0,1,1", "8,-1,1", "8,nan,1"])
def test_a_text_that_is_no_duration_is_refused(text: str):
    """Guards against a run with steps of a length that nobody asked for."""
    with pytest.raises(SettingError, match="prompt token"):
        StepCost.parse(text)


def test_a_duration_in_words():
    """Guards against units or an order that differ from the executor's in the benchmark of the real vLLM."""
    assert StepCost.parse("8,0.04,0.02,0.000065") == pytest.approx(StepCost())
    assert StepCost.parse("8,0.04,0.2") == pytest.approx(FLAT_COST)
