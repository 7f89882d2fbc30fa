"""``dpshm demo --compare``: the same arrivals on the board and on a broadcast, for several seeds.

By itself both sides have vLLM's policy, so only the source of the load differs: the board, or a broadcast every
100 ms. A policy that reads work, which no broadcast carries, is compared with vLLM's policy on the broadcast.

The sides take turns in playing first, because a machine gets busier or calmer. Ratios are taken seed by seed, of
the same arrivals. The sentence at the end claims no more than Student's 95 % interval over the seeds supports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from dpshm.errors import SettingError
from dpshm.policies import by_name
from dpshm.sim.demo.report import Report
from dpshm.sim.demo.workload import DemoSettings
from dpshm.sim.lab.figures import estimate

RATE = 9.0
"""Of the chat workload: about 45 requests a second. On 8 engines it matters then where each of them goes."""
SEEDS = 5
POLICY = "vllm"


class Pair(NamedTuple):
    """Two reports of the same arrivals."""

    board: Report
    broadcast: Report


def play_both(settings: DemoSettings, seeds: int, run: Callable[[DemoSettings], Report]) -> list[Pair]:
    """Plays each seed on both sides.

    Raises:
        SettingError: the settings are not for a comparison.
    """
    if settings.keep or settings.chaos or settings.stats != "board":
        raise SettingError("--compare plays the board and the broadcast: leave out --keep, --chaos and --stats")
    if seeds < 1:
        raise SettingError(f"seeds is {seeds}: choose a number from 1")
    needs_work = getattr(by_name(settings.policy), "sees_work", False)
    pairs = []
    for i in range(seeds):
        board = replace(settings, seed=settings.seed + i)
        broadcast = replace(board, stats="pub", policy=POLICY if needs_work else settings.policy)
        if i % 2:
            other = run(broadcast)
            pairs.append(Pair(run(board), other))
        else:
            pairs.append(Pair(run(board), run(broadcast)))
    return pairs


class _Row(NamedTuple):
    """One figure of both sides: means over the seeds, and the ratio of each seed."""

    name: str
    means: tuple[float, float] | None
    ratios: list[float]


def as_table(pairs: Sequence[Pair]) -> str:
    """The figures of both sides in one table, and what it comes to in a sentence."""
    rows = [
        _row(pairs, "first token, mean (ms)", lambda report: report.ttft_ms.mean),
        _row(pairs, "first token, p50 (ms)", lambda report: report.ttft_ms.p50),
        _row(pairs, "first token, p99 (ms)", lambda report: report.ttft_ms.p99),
        _row(pairs, "requests apart, mean", lambda report: report.imbalance.mean),
        _row(pairs, "old numbers (%)", lambda report: _percent(report.staleness_us.share)),
        _row(pairs, "completed", lambda report: float(report.completed)),
    ]
    table = [("", "board", "broadcast", "ratio", "of each seed")]
    for row in rows:
        one, other = row.means or (None, None)
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else "-"
        table.append((row.name, _figure(one), _figure(other), _interval(row.ratios), spread))
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
    first = pairs[0].board
    sides = {report.stats: report.policy for report in pairs[0]}
    arrivals = f"{first.trace or first.workload} at {first.rate:g}x"
    title = (
        f"{first.engines} engines, {first.frontends} front-ends, {arrivals}, {len(pairs)} seeds\n"
        f"  board: {sides['board']}; broadcast: {sides['pub']}; ratios with 95 % intervals"
    )
    return "\n".join((title, *(f"  {line}".rstrip() for line in lines), _sentence(rows[0])))


def _row(pairs: Sequence[Pair], name: str, value: Callable[[Report], float | None]) -> _Row:
    both = [(value(pair.board), value(pair.broadcast)) for pair in pairs]
    known = [(one, other) for one, other in both if one is not None and other is not None]
    if not known:
        return _Row(name, None, [])
    means = sum(one for one, _ in known) / len(known), sum(other for _, other in known) / len(known)
    return _Row(name, means, [one / other for one, other in known if other])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _interval(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    ratio = estimate(ratios)
    return f"{ratio.value:.2f}" + ("" if ratio.plus_minus is None else f" ± {ratio.plus_minus:.2f}")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _sentence(mean: _Row) -> str:
    if not mean.ratios:
        return "No request was answered, so there is nothing to compare."
    ratio = estimate(mean.ratios)
    if ratio.plus_minus is None:
        return f"One run of each, a ratio of {ratio.value:.2f}, shows nothing: say --seeds 5."
    figure = f"{ratio.value:.2f} ± {ratio.plus_minus:.2f} of the broadcast's mean"
    if abs(ratio.value - 1) <= ratio.plus_minus:
        return f"No difference is shown: {figure} time to first token."
    return f"On the board the first token comes {'sooner' if ratio.value < 1 else 'later'}: {figure}."
