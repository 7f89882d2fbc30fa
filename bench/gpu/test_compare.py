"""The comparison on GPUs: its requests and its table."""

from __future__ import annotations

from bench.gpu.compare import MOST_OUTPUT, MOST_PROMPT, arrivals, show


def test_requests_come_from_a_seed() -> None:
    """Guards against arms that play different requests, and a request that the model cannot hold."""
    assert arrivals("decode", 5.0, 2, 1) == arrivals("decode", 5.0, 2, 1)
    assert arrivals("decode", 5.0, 2, 1) != arrivals("decode", 5.0, 2, 2)
    for workload in ("decode", "prefill"):
        assert all(a.prompt_tokens <= MOST_PROMPT for a in arrivals(workload, 60.0, 2, 1))
        assert all(a.output_tokens <= MOST_OUTPUT for a in arrivals(workload, 60.0, 2, 1))


def test_ratios_are_of_rounds() -> None:
    """Guards against a ratio of medians."""

    def figures(ttft: float) -> dict[str, float]:
        return {
            "ttft_mean_ms": ttft,
            "ttft_p50_ms": ttft,
            "ttft_p99_ms": ttft,
            "tokens_per_s": 100.0,
            "imbalance": 0.0,
        }

    results = {
        ("decode", "stock"): [figures(100.0), figures(1000.0)],
        ("decode", "default"): [figures(50.0), figures(900.0)],
    }
    text = show(results)
    assert "| decode | ttft_mean_ms | 550 (100-1000) | 475 (50-900) | 0.7 (0.5-0.9) |" in text
    assert "| decode | imbalance | 0 (0-0) | 0 (0-0) | - |" in text
