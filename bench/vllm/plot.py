"""The chart: each figure of the default's as a ratio to stock, by scenario, with its least and greatest round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import style
from bench.vllm.ratios import Run, judged, ratio
from bench.vllm.scenarios import SCENARIOS

FIGURES = {
    "ttft_mean": ("time to first token, mean", style.GREEN),
    "ttft_p99": ("time to first token, p99", style.ORANGE),
    "per_token": ("time per output token", style.PURPLE),
}
WIDTH, HEIGHT = 7.2, 3.6


def plot(machine: dict[str, Any], runs: Sequence[Run], path: Path, arm: str = "default") -> Path:
    """Draws it; gives the file."""
    runs = judged(runs)
    names = [name for name in SCENARIOS if any(r["scenario"] == name for r in runs)][::-1]
    with style.chart(path, WIDTH, HEIGHT) as axes:
        height = 0.8 / len(FIGURES)
        for k, (key, (text, colour)) in enumerate(FIGURES.items()):
            for i, name in enumerate(names):
                found = ratio([r for r in runs if r["scenario"] == name], arm, key)
                if found is None:
                    continue
                at = i + 0.4 - height * (k + 0.5)
                spread = [[found.median - found.least], [found.greatest - found.median]]
                label = text if i == 0 else None
                axes.barh(at, found.median, height * 0.9, color=colour, label=label, xerr=spread, ecolor=style.INK)
                axes.text(0.01, at, f"{found.median:.2f}", va="center", color="white", fontsize=7)
        axes.axvline(1.0, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("share of stock vLLM's (dotted: as long as stock's)")
        axes.set_title(f"vLLM {machine['vLLM']} with dpshm, 8 ranks, 8 API servers", loc="left", fontsize=10)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.17), ncols=3)
    return path
