"""When a run may be believed. One that breaks a condition is marked, and no ratio is taken from it.

The run measures the coordinator and the choice of ranks. It measures something else where the machine or one of
the processes has no time left, where the load generator is late, where steps cost more in one arm than in
another, where ranks are idle (nothing queues, so no choice matters), or where a prefix cache has prompts of an
earlier play.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_BUSY_PERCENT = 60.0
MOST_LATE_MS = 12.0
LEAST_BUSY, MOST_BUSY = 0.8, 1.0
MOST_CACHED = 0.01
"""Of the computed prompt tokens, where no two prompts share any."""
OVERHEAD_MS, OVERHEAD_SHARE = 0.3, 0.02
"""Steps cost the same if their overheads differ by less than one of these: ms, or a share of a step."""


def broken(run: Mapping[str, Any], stock: Mapping[str, Any] | None) -> list[str]:
    """What a run breaks, in words for the table; `stock` is the run to compare with, of the same round."""
    found = _of_processors(run)
    if run["failed"]:
        found.append(f"{run['failed']} requests failed: {'; '.join(run['said'])}")
    if run["sent_late_p99_ms"] >= MOST_LATE_MS:
        found.append(f"requests are sent {run['sent_late_p99_ms']:.1f} ms late (p99)")
    if not LEAST_BUSY <= run["busy_mean"] <= MOST_BUSY:
        found.append(f"ranks are busy for {run['busy_mean']:.2f} of the time")
    if (cached := _cached_share(run)) > MOST_CACHED:
        found.append(f"{cached:.1%} of the prompt tokens were cached, of prompts that share nothing")
    wanted = 0 if run["arm"] == "stock" else run["api_servers"]
    if run["dpshm_lines"] != wanted:
        found.append(f"{run['dpshm_lines']} API servers choose by the board, not {wanted}")
    if stock is not None:
        more = abs(run["overhead_ms"] - stock["overhead_ms"])
        if more >= max(OVERHEAD_MS, OVERHEAD_SHARE * stock["step_ms"]):
            found.append(
                f"steps cost {run['overhead_ms']:.2f} ms beside the model, stock {stock['overhead_ms']:.2f}"
            )
    return found


def _of_processors(run: Mapping[str, Any]) -> list[str]:
    found = []
    if run["cores_busy_percent"] >= MOST_BUSY_PERCENT:
        found.append(f"its cores are busy for {run['cores_busy_percent']:.0f} % of the time")
    for kind, percent in run["busiest_percent"].items():
        if percent >= MOST_BUSY_PERCENT:
            found.append(f"the busiest {kind} uses {percent:.0f} % of a core")
    return found


def _cached_share(run: Mapping[str, Any]) -> float:
    """Cached prompt tokens over computed ones, of a run whose prompts share none; older results do not tell."""
    if run.get("prompts_share", True):
        return 0.0
    return float(run["cached_tokens"] / max(1.0, sum(run["prompt_tokens"])))
