"""The tables of ``python -m bench vllm``, in Markdown: figures, ratios to stock, and what runs broke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.vllm.ratios import CPU, FIGURES, STOCK, Run, Spread, arm_figures, judged, ratio
from bench.vllm.scenarios import SCENARIOS

NEVER_WORSE = 1.02
"""No arm of ours may be slower than so many times stock, in mean or p99, where no other goal is given."""


def show(machine: dict[str, Any], runs: Sequence[Run]) -> str:
    """All tables of some runs."""
    arms = [STOCK, *dict.fromkeys(r["arm"] for r in runs if r["arm"] != STOCK)]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    for name in dict.fromkeys(r["scenario"] for r in runs):
        lines += [*_scenario(name, judged(r for r in runs if r["scenario"] == name), arms), ""]
    return "\n".join(lines)


def _scenario(name: str, runs: Sequence[Run], arms: list[str]) -> list[str]:
    scenario = SCENARIOS[name]
    sizes = [r["requests"] for r in runs]
    lines = [
        f"**{name}** ({scenario.text}): {runs[0]['source']}, {min(sizes)} to {max(sizes)} requests a round, "
        f"{runs[0]['ranks']} ranks, {runs[0]['api_servers']} API servers.",
        "",
        "| | " + " | ".join([*arms, *(f"{arm} / stock" for arm in arms[1:]), "goal"]) + " |",
        "|---" * (2 * len(arms) + 1) + "|",
    ]
    for figure, text in (FIGURES | CPU).items():
        cells = [_cell(arm_figures(runs, arm, figure)) for arm in arms]
        ratios = [ratio(runs, arm, figure) for arm in arms[1:]]
        cells += [_cell(r, 3) for r in ratios]
        lines.append(f"| {text} | " + " | ".join([*cells, _goal(scenario.goals.get(figure), ratios)]) + " |")
    for figure, text, digits in (
        ("busy_mean", "ranks busy, share of the time", 3),
        ("step_ms", "a step, ms", 4),
        ("overhead_ms", "between two steps of a rank, median, ms", 3),
        ("between_ms", "with the wait for other ranks, mean, ms", 3),
        ("request_imbalance", "requests of the fullest rank / mean", 3),
        ("prompt_imbalance", "computed prompt tokens, the same", 3),
        ("held_imbalance", "held tokens, the same at each instant", 3),
        ("cores_busy_percent", "its cores busy, %", 3),
        ("sent_late_p99_ms", "sent late, p99, ms", 3),
        ("coordinator_mb", "coordinator, MB", 3),
    ):
        cells = [_cell(arm_figures(runs, arm, figure), digits) for arm in arms]
        lines.append(f"| {text} | " + " | ".join([*cells, *("" for _ in arms)]) + " |")
    used = [sum(1 for r in runs if r["arm"] == arm and not r["broken"]) for arm in arms]
    lines += [
        "",
        "Runs that may be believed: " + ", ".join(f"{a} {n}" for a, n in zip(arms, used, strict=True)) + ".",
    ]
    lines += [f"- not used: {r['arm']}, round {r['round']}: {'; '.join(r['broken'])}" for r in runs if r["broken"]]
    return lines


def _cell(s: Spread | None, digits: int = 4) -> str:
    if s is None:
        return "-"
    if s.rounds == 1:
        return f"{s.median:.{digits}g}"
    return f"{s.median:.{digits}g} ({s.least:.{digits}g}-{s.greatest:.{digits}g})"


def _goal(goal: float | None, ratios: Sequence[Spread | None]) -> str:
    """The first arm of ours is the default, which the goal is for."""
    if goal is None or not ratios or ratios[0] is None:
        return ""
    return f"{goal:g}: {'yes' if ratios[0].median <= goal else 'no'}"


def line(run: Run) -> str:
    """One run in a line, for the terminal."""
    figures = ", ".join(f"{name} {run[name]:.4g}" for name in FIGURES)
    busiest = {kind: round(percent) for kind, percent in run["busiest_percent"].items()}
    return (
        f"{run['scenario']} round {run['round']} {run['arm']}: {run['requests']} requests, "
        f"{run['failed']} failed, {figures}; busy {run['busy_mean']:.2f}, step {run['step_ms']:.1f}, "
        f"overhead {run['overhead_ms']:.2f}, late {run['sent_late_p99_ms']:.1f}, "
        f"cores {run['cores_busy_percent']:.0f} %, busiest {busiest}, by rank {run['by_rank']}"
    )
