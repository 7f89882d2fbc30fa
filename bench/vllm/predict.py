"""``--predict``: what the laboratory says of the same requests, beside what was measured.

The laboratory simulates ranks with the same steps, and API servers that read one request after another. What a
rank does between two steps is part of its steps here: as much as was measured, where results are given. In
lockstep it has the wait for the slowest rank in it (`between_ms` of `bench.vllm.steps`). Stock is vLLM's policy on
its broadcast; the other arms know the board and the prefix caches. ``--arms oracle`` asks the clairvoyant, which
sends each request where its first token comes soonest.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from bench.vllm.ratios import FIGURES, STOCK, Run, Spread, arm_figures, judged, ratio, spread
from bench.vllm.rounds import Plan, load_of
from bench.vllm.scenarios import DEPLOYMENTS, SCENARIOS
from dpshm.sim.lab.plant import Plant, RequestTime
from dpshm.sim.lab.rank import Job
from dpshm.sim.lab.run import run
from dpshm.sim.step_cost import StepCost

KV_TOKENS = 1_000_000
BETWEEN_STEPS_MS = 0.7
"""Of any arm, where nothing was measured."""
LOCKSTEP_WAIT_MS = 4.5
"""What a rank in lockstep waits for the others beside that, where results have no `between_ms`. Not measured:
fitted to the time per token of both lockstep scenarios and all arms of 2026-11-28 (8 ranks and 8 API servers on 5
cores)."""
REQUEST_TIME = RequestTime(3.6e-3, 0.33e-6)
"""Measured on 2026-11-29 (32 cores of an Intel Xeon, vLLM 0.32.0): from sending a request to the decision 2.2 ms
and 0.14 us a prompt token, from there to the engine's step 1.4 ms and 0.19 us. Most of it is a thread that reads
JSON, hashes or decodes, one request after another."""
KNOWN = {STOCK: ("vllm", "broadcast"), "default": ("least_work", "live-index-sent")}


def predicted(plan: Plan, name: str, number: int, arm: str, between: float = BETWEEN_STEPS_MS) -> dict[str, float]:
    """The figures of one arm in one round, by the laboratory; with so many ms between two steps."""
    deployment = DEPLOYMENTS[SCENARIOS[name].deployment]
    base, prompt_token, request, held_token = (float(ms) / 1e3 for ms in deployment.step_ms.split(","))
    cost = StepCost(base + between / 1e3, request, prompt_token, held_token, kv_tokens=KV_TOKENS)
    load = load_of(plan, SCENARIOS[name], number)
    plant = Plant(
        plan.sizes.ranks,
        plan.sizes.api_servers,
        cost,
        lockstep=deployment.model == "moe",
        block_tokens=load.block_tokens or 512,
        request_time=REQUEST_TIME,
    )
    random = Random(number)
    jobs = [
        Job(a.time_s, random.randrange(plant.frontends), a.prompt_tokens, a.output_tokens, None, a.block_hashes)
        for a in load.arrivals
    ]
    outcome = run(plant, jobs, *KNOWN.get(arm, (arm, "live-index-sent")))
    first = np.asarray(outcome.ttft_s) * 1e3
    p50, p90, p99 = np.percentile(first, (50, 90, 99))
    return {
        "ttft_mean": float(first.mean()),
        "ttft_p50": float(p50),
        "ttft_p90": float(p90),
        "ttft_p99": float(p99),
        "per_token": float(np.mean(outcome.tpot_s)) * 1e3,
        "total": float(np.mean(outcome.e2e_s)) * 1e3,
    }


def between_ms(runs: Sequence[Run], arm: str, model: str) -> float:
    """The time between two steps of an arm, as it was measured.

    Args:
        runs: `judged`, of one scenario.
        arm: whose.
        model: ``dense`` or ``moe``.
    """
    if whole := arm_figures(runs, arm, "between_ms"):
        return whole.median
    overhead = arm_figures(runs, arm, "overhead_ms")
    return (overhead.median if overhead else BETWEEN_STEPS_MS) + LOCKSTEP_WAIT_MS * (model == "moe")


def compare(plan: Plan, measured: Sequence[Run]) -> str:
    """Tables of both: of stock the figures, of the other arms the ratios to stock within a round."""
    lines: list[str] = []
    for name in plan.scenarios:
        numbers = range(plan.first_round, plan.first_round + plan.rounds)
        runs = judged(r for r in measured if r["scenario"] == name)
        between = {arm: between_ms(runs, arm, DEPLOYMENTS[SCENARIOS[name].deployment].model) for arm in plan.arms}
        said = {
            arm: [predicted(plan, name, number, arm, found) for number in numbers]
            for arm, found in between.items()
        }
        lines += [
            f"**{name}** ({SCENARIOS[name].text})",
            "",
            "| | stock, laboratory | stock, measured | "
            + " | ".join(
                f"{arm} / stock, {which}" for arm in plan.arms[1:] for which in ("laboratory", "measured")
            )
            + " |",
            "|---" * (2 * len(plan.arms) + 1) + "|",
        ]
        for figure, text in FIGURES.items():
            cells = [spread([s[figure] for s in said[STOCK]]), arm_figures(runs, STOCK, figure)]
            for arm in plan.arms[1:]:
                pairs = zip(said[arm], said[STOCK], strict=True)
                cells += [
                    spread([ours[figure] / stock[figure] for ours, stock in pairs]),
                    ratio(runs, arm, figure),
                ]
            lines.append(f"| {text} | " + " | ".join(map(_cell, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(s: Spread | None) -> Any:
    return "-" if s is None else f"{s.median:.3g} ({s.least:.3g}-{s.greatest:.3g})"
