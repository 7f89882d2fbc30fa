"""What is believed and what is computed from it, on values worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.vllm import adapters, predict, steps
from bench.vllm.conditions import broken
from bench.vllm.lane import client_figures
from bench.vllm.player import Answer
from bench.vllm.ratios import FIGURES, STOCK, arm_figures, judged, ratio
from bench.vllm.table import show


def a_run(arm: str = "stock", number: int = 1, **other: Any) -> dict[str, Any]:
    """A run that breaks nothing."""
    return {
        "scenario": "chat",
        "source": "made",
        "round": number,
        "arm": arm,
        "ranks": 8,
        "requests": 1000,
        "failed": 0,
        "said": [],
        "cores_busy_percent": 20.0,
        "busiest_percent": {"engine": 30.0, "load generator": 20.0},
        "cpu_percent": {"engine": 48.0, "API server": 120.0, "coordinator": 1.0},
        "sent_late_p99_ms": 2.0,
        "busy_mean": 0.9,
        "api_servers": 8,
        "dpshm_lines": 0 if arm == "stock" else 8,
        "overhead_ms": 0.5,
        "step_ms": 15.0,
        "request_imbalance": 1.1,
        "prompt_imbalance": 1.1,
        "held_imbalance": 1.1,
        "coordinator_mb": 45.0,
        **dict.fromkeys(FIGURES, 100.0),
        **other,
    }


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"failed": 1, "said": ["refused"]}, "1 requests failed: refused"),
        ({"cores_busy_percent": 60.0}, "its cores are busy for 60 %"),
        ({"busiest_percent": {"engine": 10.0, "API server": 61.0}}, "the busiest API server uses 61 %"),
        ({"sent_late_p99_ms": 12.0}, "12.0 ms late"),
        ({"busy_mean": 0.79}, "busy for 0.79"),
        ({"dpshm_lines": 7}, "7 API servers choose by the board, not 8"),
        (
            {"prompts_share": False, "cached_tokens": 1600.0, "prompt_tokens": [9000.0, 7000.0]},
            "10.0% of the prompt tokens were cached",
        ),
        ({"overhead_ms": 0.81}, "steps cost 0.81 ms beside the model, stock 0.50"),
    ],
)
def test_each_condition_is_checked(other: dict[str, Any], said: str) -> None:
    """Guards against a figure from a run that measured something else."""
    assert broken(a_run("default"), a_run()) == []
    (found,) = broken(a_run("default", **other), a_run())
    assert said in found


def test_stock_may_have_no_line_of_ours() -> None:
    """Guards against a comparison of dpshm with itself."""
    assert broken(a_run(), a_run()) == []
    assert broken(a_run(dpshm_lines=8), None) == ["8 API servers choose by the board, not 0"]


def test_longer_steps_may_cost_a_share_more() -> None:
    """Guards against refusing lockstep runs for a difference that is small beside their steps."""
    assert broken(a_run("default", overhead_ms=1.0), a_run(step_ms=40.0)) == []


def test_ratios_are_of_rounds_of_which_both_arms_are_believed() -> None:
    """Guards against ratios of different requests, and of runs that are not used."""
    runs = judged(
        [
            a_run(number=1, total=100.0),
            a_run("default", 1, total=90.0),
            a_run(number=2, total=200.0),
            a_run("default", 2, total=140.0),
            a_run(number=3, total=100.0, failed=1),
            a_run("default", 3, total=10.0),
            a_run(number=4, total=100.0),
            a_run("default", 4, total=10.0, busy_mean=0.5),
        ]
    )
    total = ratio(runs, "default", "total")
    assert total is not None
    assert total.rounds == 2
    assert total[:3] == pytest.approx((0.8, 0.7, 0.9))
    assert arm_figures(runs, "stock", "total") == (100.0, 100.0, 200.0, 3)
    assert ratio(runs, "default", "ttft_mean") == (1.0, 1.0, 1.0, 2)
    assert ratio(runs, "round_robin", "total") is None


def test_the_table_names_what_was_not_used() -> None:
    """Guards against a run that disappears without a word."""
    text = show({"cores": 32}, [a_run(), a_run("default", ttft_mean=60.0), a_run("least_loaded", busy_mean=0.2)])
    assert "| time to first token, mean, ms | 100 | 60 | - | 0.6 | - | 0.62: yes |" in text
    assert "- not used: least_loaded, round 1: ranks are busy for 0.20 of the time" in text
    assert "Runs that may be believed: stock 1, default 1, least_loaded 0." in text


def test_the_cpu_of_engines_is_compared_by_step() -> None:
    """Guards against an arm that looks dear because its engines had more steps."""
    runs = judged(
        [
            a_run(),
            a_run("default", cpu_percent={"engine": 96.0, "API server": 60.0, "coordinator": 0.5}, step_ms=7.5),
        ]
    )
    # 8 ranks, busy for 0.9 of the time, 15 ms a step: 480 steps a second, in 0.48 s of CPU.
    assert arm_figures(runs, "stock", "engine_step_us") == pytest.approx((1000.0, 1000.0, 1000.0, 1))
    assert ratio(runs, "default", "engine_percent") == (2.0, 2.0, 2.0, 1)
    assert ratio(runs, "default", "engine_step_us") == pytest.approx((1.0, 1.0, 1.0, 1))
    assert ratio(runs, "default", "api_server_percent") == (0.5, 0.5, 0.5, 1)


def test_clients_figures() -> None:
    """Guards against times of requests that failed, and against a first token that counts as an interval."""
    answers = [
        Answer(0.001, 0.1, 1.1, 11, 5.0),
        Answer(0.002, 0.3, 0.3, 1, 5.0),
        Answer(0.003, None, None, 9, 5.0, "HTTP/1.1 500"),
    ]
    found = client_figures(answers)
    assert found["requests"] == 3
    assert found["failed"] == 1
    assert found["said"] == ["HTTP/1.1 500"]
    assert found["ttft_mean"] == pytest.approx(200.0)
    assert found["per_token"] == pytest.approx(100.0)
    assert found["total"] == pytest.approx(700.0)


def test_steps_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    """Guards against a line that the executor is just writing."""
    (tmp_path / "rank-0").write_text("1.0 0.1 0.2 3 40 500\n2.0 0.0 0.")
    (read,) = steps.read(tmp_path, 1)
    assert read.tolist() == [[1.0, 0.1, 0.2, 3, 40, 500]]


def test_figures_of_steps() -> None:
    """Guards against busy time of steps without requests, and against pauses that count as overhead."""
    one = np.array(
        [
            [0.0, 0.1, 0.2, 2, 100, 10],
            [0.31, 0.0, 0.2, 2, 0, 10],
            [0.6, 0.0, 0.1, 0, 0, 0],
            [0.8, 0.0, 0.1, 1, 0, 4],
        ]
    )
    two = np.array([[0.0, 0.0, 0.5, 1, 300, 30], [0.52, 0.0, 0.1, 1, 0, 30], [1.5, 0.0, 0.1, 9, 900, 9]])
    found = steps.figures([one, two], 0.0, 1.0)
    assert found["busy_mean"] == pytest.approx(0.6)
    assert found["busy_min"] == pytest.approx(0.6)
    assert found["overhead_ms"] == pytest.approx(15.0)
    assert found["between_ms"] == pytest.approx(15.0)
    assert found["prompt_tokens"] == [100.0, 300.0]
    assert found["prompt_imbalance"] == pytest.approx(1.5)
    assert found["step_ms"] == pytest.approx(240.0)


def test_the_table_of_adapters() -> None:
    """Guards against ratios of figures that are of different rounds."""
    rounds = [
        {"stock": [0.1, 0.3], "affinity": [0.2, 0.2]},
        {"stock": [0.2, 0.2], "affinity": [0.1, 0.1]},
        {"stock": [0.2, 0.4], "affinity": [0.3, 0.9]},
    ]
    *_, stock, affinity = adapters.table(rounds).splitlines()
    assert stock == "| stock | 6 | 200 ms | 300 ms | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |"
    assert affinity == "| affinity | 6 | 200 ms | 200 ms | 1.00 (0.50-2.00) | 0.67 (0.50-2.25) |"


def test_in_lockstep_the_wait_for_others_lies_between_steps() -> None:
    """Guards against a laboratory that is told of the median rank's time between steps, not of the slowest's."""
    # Entered, waited, slept: the second rank is late for the second step, and has no request in the third.
    one = np.array([[0.0, 0.001, 0.1, 1, 0, 0], [0.102, 0.009, 0.1, 1, 0, 0], [0.212, 0.002, 0.1, 1, 0, 0]])
    two = np.array([[0.0, 0.001, 0.1, 1, 0, 0], [0.110, 0.001, 0.1, 1, 0, 0], [0.213, 0.001, 0.1, 0, 0, 0]])
    found = steps.figures([one, two], 0.0, 1.0)
    assert found["between_ms"] == pytest.approx((10 + 3) / 2)
    assert found["overhead_ms"] == pytest.approx(1.0)


def test_the_laboratory_is_told_of_the_whole_time_between_steps() -> None:
    """Guards against a laboratory whose lockstep ranks wait for none, and against one whose other ranks wait."""
    runs = judged([a_run(STOCK, between_ms=2.5)])
    assert predict.between_ms(runs, "stock", "moe") == 2.5
    older = judged([a_run(STOCK)])
    assert predict.between_ms(older, "stock", "dense") == 0.5
    assert predict.between_ms(older, "stock", "moe") == 0.5 + predict.LOCKSTEP_WAIT_MS
    assert predict.between_ms([], "stock", "dense") == predict.BETWEEN_STEPS_MS
