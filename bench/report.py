"""The tables in the terminal: every figure by peer, the ratios, and what was to be reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.comparison import flat

Result = dict[str, Any]


def show(result: Result) -> None:
    """Prints them."""
    console = Console()
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{machine['date']}, load {machine['load_before']:.1f} before; vLLM {result['vllm']}"
    )
    console.print(_figures(result))
    console.print(_ratios(result))
    console.print(_targets(result))


def _figures(result: Result) -> Table:
    table = Table("figure", "peer", "medians over the rounds", title="Figures (us unless named otherwise)")
    table.add_row("limit", "", _numbers(result["limit"]))
    section_before = ""
    for section, peer, record in flat(result):
        table.add_row(section if section != section_before else "", peer, _numbers(record))
        section_before = section
    for count, peers in result["freshness_by_frontends"].items():
        for peer, record in peers.items():
            if not peer.startswith("ratios"):
                chosen = {key: record[key] for key in ("p50", "p99", "age_p50", "age_p99", "middle_cpu_us")}
                table.add_row(f"freshness, {count} front-ends" if peer == "board" else "", peer, _numbers(chosen))
    return table


def _ratios(result: Result) -> Table:
    table = Table(
        "figure", "peer / board", "min", "median", "max", title="Ratios within rounds; above 1: board is less"
    )
    for section, peers in result.items():
        for peer, ratio in (peers.get("ratios", {}) if isinstance(peers, dict) else {}).items():
            if section == "decide":
                for engines, inner in ratio.items():
                    table.add_row(f"decide {engines}", peer, *_spread(inner))
            else:
                table.add_row(section, peer, *_spread(ratio))
    return table


def _spread(ratio: dict[str, float]) -> list[str]:
    return [f"{ratio[name]:.3g}" for name in ("min", "median", "max")]


def _numbers(record: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.3g}"
        for name, value in record.items()
        if name != "rounds"
    )


Check = tuple[str, str, Callable[[Result], str], Callable[[Result], bool]]


def _targets(result: Result) -> Table:
    table = Table("figure", "reach", "measured", "", title="Figures to reach")
    for name, reach, measured, reached in TARGETS:
        try:
            table.add_row(
                name, reach, measured(result), "reached" if reached(result) else "[bold]not reached[/bold]"
            )
        except KeyError:
            table.add_row(name, reach, "not measured in this run", "")
    return table


def _vllm_share(result: Result, engines: str) -> float:
    return float(1 / result["decide"]["ratios"]["vllm"][engines]["median"])


def _growth(result: Result) -> float:
    by_count = result["freshness_by_frontends"]
    counts = sorted(by_count, key=int)
    return float(by_count[counts[-1]]["board"]["p50"] / by_count[counts[0]]["board"]["p50"])


def _wake_share(result: Result, key: str) -> float:
    return float(1 / result["wake"]["ratios" if key == "p50" else "ratios_p99"]["vllm"]["median"])


TARGETS: list[Check] = [
    (
        "freshness p50, 8 engines, 800/s",
        "<= 3 us",
        lambda r: f"{r['freshness']['board']['p50']:.1f} us",
        lambda r: r["freshness"]["board"]["p50"] <= 3,
    ),
    (
        "freshness p99",
        "<= 50 us",
        lambda r: f"{r['freshness']['board']['p99']:.0f} us",
        lambda r: r["freshness"]["board"]["p99"] <= 50,
    ),
    (
        "freshness p50 / limit p50",
        "<= 10",
        lambda r: f"{r['freshness']['board']['p50'] / r['limit']['p50']:.1f}",
        lambda r: r["freshness"]["board"]["p50"] <= 10 * r["limit"]["p50"],
    ),
    (
        "freshness, unlimited PUB / board",
        ">= 20",
        lambda r: f"{r['freshness']['ratios']['pub_unlimited']['median']:.0f}",
        lambda r: r["freshness"]["ratios"]["pub_unlimited"]["median"] >= 20,
    ),
    (
        "CPU per update, all processes",
        "<= 1 us",
        lambda r: f"{r['cpu_per_update']['board']['us']:.2f} us",
        lambda r: r["cpu_per_update"]["board"]["us"] <= 1,
    ),
    *(
        (
            f"decide, {engines} engines, share of vLLM's",
            f"<= {share:g}",
            lambda r, e=engines: f"{_vllm_share(r, e):.2f}",
            lambda r, e=engines, s=share: _vllm_share(r, e) <= s,
        )
        for engines, share in (("8", 1.0), ("64", 0.3), ("1024", 0.05))
    ),
    (
        "route, 8 engines x 4 front-ends",
        "<= 5 us",
        lambda r: f"{r['route']['board']['us']:.1f} us ({r['route']['board']['us_all']:.1f} at worst)",
        lambda r: r["route"]["board"]["us"] <= 5,
    ),
    (
        "publish",
        "<= 1 us",
        lambda r: f"{r['publish']['board']['us']:.2f} us",
        lambda r: r["publish"]["board"]["us"] <= 1,
    ),
    (
        "coordinator start-up",
        "<= 0.3 s",
        lambda r: f"{r['startup']['board']['s']:.2f} s",
        lambda r: r["startup"]["board"]["s"] <= 0.3,
    ),
    (
        "coordinator memory, RSS",
        "<= 45 MB",
        lambda r: f"{r['rss']['board']['rss_mb']:.0f} MB (PSS {r['rss']['board']['pss_mb']:.0f})",
        lambda r: r["rss"]["board"]["rss_mb"] <= 45,
    ),
    *(
        (
            f"wake {key}, share of vLLM's",
            "<= 1",
            lambda r, k=key: f"{_wake_share(r, k):.2f} ({r['wake']['board'][k]:.0f} us)",
            lambda r, k=key: _wake_share(r, k) <= 1,
        )
        for key in ("p50", "p99")
    ),
    (
        "coordinator, idle",
        "<= 0.2 %",
        lambda r: f"{r['idle_cpu']['board']['percent']:.2f} %",
        lambda r: r["idle_cpu"]["board"]["percent"] <= 0.2,
    ),
    (
        "freshness p50, most front-ends / one",
        "<= 2",
        lambda r: f"{_growth(r):.1f}",
        lambda r: _growth(r) <= 2,
    ),
]
