"""The tables in the terminal: every figure by peer, the ratios, and what was to be reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.comparison import flat

Result = dict[str, Any]

TOO_BUSY = 0.15
"""Share of all CPU time. A reader that waits for a core for a millisecond moves a median of some microseconds."""


def show(result: Result) -> None:
    """Prints them."""
    console = Console()
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{machine['date']}, load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after; "
        f"vLLM {result['vllm']}"
    )
    if warning := too_busy(machine):
        console.print(f"[bold red]{warning}[/bold red]")
    console.print(_figures(result))
    console.print(_ratios(result))
    console.print(_targets(result))


def markdown(result: Result) -> str:
    """What was to be reached and what was, as a table for bench/README.md, with the machine and the date."""
    machine = result["machine"]
    lines = [
        f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python "
        f"{machine['python']}, numpy {machine['numpy']}, libzmq {machine['libzmq']}, vLLM {result['vllm']}; "
        f"load average {machine['load_before']:.1f} when it began, {machine['load_after']:.1f} when it ended; "
        f"{machine['sizes']['rounds']} rounds.",
        *filter(None, [too_busy(machine)]),
        "",
        "| figure | reach | measured | vLLM, same run | reached |",
        "|---|---|---|---|---|",
    ]
    for name, reach, measured, reached, theirs in TARGETS:
        try:
            ours = measured(result)
            ok = "" if reach == "none" else "yes" if reached(result) else "**no**"
        except KeyError:
            ours, ok = "not measured in this run", ""
        try:
            vllm = theirs(result)
        except KeyError:
            vllm = ""
        lines.append(f"| {name} | {reach} | {ours} | {vllm} | {ok} |")
    return "\n".join(lines)


def _figures(result: Result) -> Table:
    table = Table("figure", "peer", "medians over the rounds", title="Figures")
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


UNITS = {"us": "us", "ms": "ms", "s": "s", "mb": "MB", "percent": "%", "requests": "requests"}
_IN_US = {"p50", "p99", "p99.9", "age_p50", "age_p99", "engines", "middle", "frontends"}
"""Figures whose names have no unit."""


def figure(name: str, value: float) -> str:
    """A figure with its name and unit, such as ``receive 0.718 us`` of `receive_us`."""
    parts = name.split("_")
    unit = next((part for part in parts if part in UNITS), "")
    words = " ".join(part for part in parts if part != unit)
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    unit = UNITS.get(unit, "us" if name in _IN_US else "")
    return " ".join(part for part in (words, number, unit) if part)


def _numbers(record: dict[str, Any]) -> str:
    return ", ".join(figure(name, value) for name, value in record.items() if name != "rounds")


def too_busy(machine: Result) -> str:
    """A warning if other processes took much of the machine just before the run; else nothing."""
    busy = machine.get("busy_before", 0.0)
    if busy < TOO_BUSY:
        return ""
    return (
        f"The machine was too busy for figures: other processes took {busy:.0%} of it just before the run. "
        "The order of the peers may hold; do not quote the numbers."
    )


Check = tuple[str, str, Callable[[Result], str], Callable[[Result], bool], Callable[[Result], str]]
"""Its name, what to reach, what was measured, whether that is reached, and vLLM's own figure."""


def _targets(result: Result) -> Table:
    table = Table("figure", "reach", "measured", "", title="Figures to reach")
    for name, reach, measured, reached, _ in TARGETS:
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


def _nothing(_: Result) -> str:
    return ""


TARGETS: list[Check] = [
    (
        "freshness p50, 8 engines, 800/s",
        "<= 3 us",
        lambda r: f"{r['freshness']['board']['p50']:.1f} us",
        lambda r: r["freshness"]["board"]["p50"] <= 3,
        lambda r: f"{r['freshness']['vllm']['p50'] / 1e3:.0f} ms",
    ),
    (
        "freshness p99",
        "<= 50 us",
        lambda r: f"{r['freshness']['board']['p99']:.0f} us",
        lambda r: r["freshness"]["board"]["p99"] <= 50,
        lambda r: f"{r['freshness']['vllm']['p99'] / 1e3:.0f} ms",
    ),
    (
        "sampled age p50, p99",
        "none",
        lambda r: "{age_p50:.1f}, {age_p99:.0f} us".format(**r["freshness"]["board"]),
        lambda _: True,
        lambda r: (
            f"{r['freshness']['vllm']['age_p50'] / 1e3:.0f}, {r['freshness']['vllm']['age_p99'] / 1e3:.0f} ms"
        ),
    ),
    (
        "freshness p50 / limit p50",
        "<= 10",
        lambda r: f"{r['freshness']['board']['p50'] / r['limit']['p50']:.1f} (limit {r['limit']['p50']:.2f} us)",
        lambda r: r["freshness"]["board"]["p50"] <= 10 * r["limit"]["p50"],
        _nothing,
    ),
    (
        "freshness p50, unlimited PUB / board",
        ">= 20",
        lambda r: "{median:.0f} ({min:.0f} to {max:.0f})".format(**r["freshness"]["ratios"]["pub_unlimited"]),
        lambda r: r["freshness"]["ratios"]["pub_unlimited"]["median"] >= 20,
        _nothing,
    ),
    (
        "CPU per update, all processes, full speed",
        "<= 1 us",
        lambda r: "{us:.2f} us, coordinator {middle:.3f}".format(**r["cpu_per_update"]["board"]),
        lambda r: r["cpu_per_update"]["board"]["us"] <= 1,
        lambda r: "{us:.1f} us, coordinator {middle:.1f}".format(**r["cpu_per_update"]["vllm"]),
    ),
    (
        "CPU of the coordinator per update, 800/s",
        "0",
        lambda r: f"{r['freshness']['board']['middle_cpu_us']:.1f} us (its idle rounds)",
        lambda r: r["freshness"]["board"]["middle_cpu_us"] < 1,
        lambda r: f"{r['freshness']['vllm']['middle_cpu_us']:.0f} us",
    ),
    *(
        (
            f"decide, {engines} engines, share of vLLM's",
            f"<= {share:g}",
            lambda r, e=engines: f"{_vllm_share(r, e):.2f} ({r['decide']['board'][e]['us']:.1f} us)",
            lambda r, e=engines, s=share: _vllm_share(r, e) <= s,
            lambda r, e=engines: f"{r['decide']['vllm'][e]['us']:.1f} us",
        )
        for engines, share in (("8", 1.0), ("64", 0.3), ("1024", 0.05))
    ),
    (
        "route, 8 engines x 4 front-ends",
        "<= 5 us",
        lambda r: "{us:.1f} us ({us_all:.1f} at worst); done {done_us:.1f} us".format(**r["route"]["board"]),
        lambda r: r["route"]["board"]["us"] <= 5,
        _nothing,
    ),
    (
        "publish, one request received",
        "<= 1 us",
        lambda r: "{us:.2f} us, and {receive_us:.2f} in receive()".format(**r["publish"]["board"]),
        lambda r: r["publish"]["board"]["us"] <= 1,
        lambda r: "{us:.1f} us, with its output thread {cpu_us:.0f} us of CPU".format(**r["publish"]["vllm"]),
    ),
    (
        "coordinator start-up",
        "<= 0.3 s",
        lambda r: f"{r['startup']['board']['s']:.2f} s",
        lambda r: r["startup"]["board"]["s"] <= 0.3,
        lambda r: f"{r['startup']['vllm']['s']:.1f} s",
    ),
    (
        "coordinator memory, RSS and PSS",
        "<= 45 MB RSS",
        lambda r: "{rss_mb:.0f} and {pss_mb:.0f} MB".format(**r["rss"]["board"]),
        lambda r: r["rss"]["board"]["rss_mb"] <= 45,
        lambda r: "{rss_mb:.0f} and {pss_mb:.0f} MB".format(**r["rss"]["vllm"]),
    ),
    *(
        (
            f"wake, 8 engines, {key}, share of vLLM's",
            "<= 1",
            lambda r, k=key: f"{_wake_share(r, k):.2f} ({r['wake']['board'][k]:.0f} us)",
            lambda r, k=key: _wake_share(r, k) <= 1,
            lambda r, k=key: f"{r['wake']['vllm'][k]:.0f} us",
        )
        for key in ("p50", "p99")
    ),
    (
        "idle coordinator",
        "<= 0.2 %",
        lambda r: f"{r['idle_cpu']['board']['percent']:.2f} % of a core",
        lambda r: r["idle_cpu"]["board"]["percent"] <= 0.2,
        lambda r: f"{r['idle_cpu']['vllm']['percent']:.2f} %",
    ),
    (
        "freshness p50, most front-ends / one",
        "<= 2",
        lambda r: f"{_growth(r):.1f} ({max(map(int, r['freshness_by_frontends']))} front-ends)",
        lambda r: _growth(r) <= 2,
        _nothing,
    ),
]
