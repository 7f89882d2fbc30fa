"""``--predict``: what the laboratory says of the same requests, beside what was measured.

The laboratory simulates ranks with the same steps. Stock is vLLM's policy on its broadcast; the other arms know
the board and the prefix caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from bench.vllm.ratios import FIGURES, STOCK, Run, Spread, arm_figures, judged, ratio, spread
from bench.vllm.rounds import Plan, load_of
from bench.vllm.scenarios import DEPLOYMENTS, SCENARIOS
from dpshm.sim.lab.rank import Job
from dpshm.sim.lab.run import Plant, run
from dpshm.sim.step_cost import StepCost

KV_TOKENS = 1_000_000
KNOWN = {STOCK: ("vllm", "broadcast"), "default": ("least_work", "live-index-sent")}


def predicted(plan: Plan, name: str, number: int, arm: str) -> dict[str, float]:
    """The figures of one arm in one round, by the laboratory."""
    deployment = DEPLOYMENTS[SCENARIOS[name].deployment]
    base, prompt_token, request, held_token = (float(ms) / 1e3 for ms in deployment.step_ms.split(","))
    cost = StepCost(base, request, prompt_token, held_token, kv_tokens=KV_TOKENS)
    load = load_of(plan, SCENARIOS[name], number)
    plant = Plant(
        plan.sizes.ranks,
        plan.sizes.api_servers,
        cost,
        lockstep=deployment.model == "moe",
        block_tokens=load.block_tokens or 512,
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


def compare(plan: Plan, measured: Sequence[Run]) -> str:
    """Tables of both: of stock the figures, of the other arms the ratios to stock within a round."""
    lines: list[str] = []
    for name in plan.scenarios:
        numbers = range(plan.first_round, plan.first_round + plan.rounds)
        said = {arm: [predicted(plan, name, number, arm) for number in numbers] for arm in plan.arms}
        runs = judged(r for r in measured if r["scenario"] == name)
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
