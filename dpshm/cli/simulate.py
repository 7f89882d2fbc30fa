"""``dpshm simulate``: the options and the report."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dpshm.cli.options import TimeUnitOption, one_of_two
from dpshm.errors import SettingError
from dpshm.linux.signals import EndedError, raising_once
from dpshm.policies import NAMES
from dpshm.sim.lab.figures import Comparison, Estimate, Result
from dpshm.sim.lab.information import NAMES as INFORMATION
from dpshm.sim.lab.plant import Plant, RequestTime
from dpshm.sim.lab.study import WORKLOADS, SimulationSettings, compare
from dpshm.sim.step_cost import StepCost
from dpshm.sim.workloads.formats import KNOWN

PROGRESS_S = 2.0
BAR_COLUMNS = 40
LONGEST_BAR = 8
"""The longest bar, as a multiple of the shortest p99. Longer bars are cut off so that the others stay visible."""
HEADER: tuple[str, ...] = (
    *("policy", "information", "TTFT mean", "p50", "p99", "ratio mean", "ratio p99", "total", "per token"),
    *("tokens/s", "imbalance", "prefix hits", "regret"),
)


def simulate(
    policies: Annotated[
        str,
        typer.Option(
            help=f"Policies to compare, with commas: {', '.join(NAMES)}, oracle. Parameters: NAME:KEY=VALUE. "
            "NAME@INFORMATION says what that one knows."
        ),
    ] = "vllm,round_robin,least_loaded,power_of_two,least_work",
    information: Annotated[
        str,
        typer.Option(
            help=f"What the policies know, with commas: {', '.join(INFORMATION)}. Default: the broadcast "
            "for vllm and round_robin, the live board for the others."
        ),
    ] = "",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Arrivals to replay. Known: {KNOWN}. Without it, a built-in workload of 5 requests a second.",
        ),
    ] = None,
    time_unit: TimeUnitOption = "",
    block_tokens: Annotated[
        int, typer.Option(help="Prompt tokens that a hash of the trace is for. Default: as its prompts tell.")
    ] = 0,
    workload: Annotated[
        str | None,
        typer.Option(help=f"Without a trace, which built-in one: {', '.join(WORKLOADS)}.", show_default="chat"),
    ] = None,
    rate: Annotated[float, typer.Option(help="Speed of the trace, as a multiple of the recorded speed.")] = 1.0,
    requests: Annotated[
        int | None, typer.Option(help="Most requests in a run. Default: the whole trace, or 12000.")
    ] = None,
    engines: Annotated[int, typer.Option(help="Engines.")] = 8,
    frontends: Annotated[int, typer.Option(help="Front-ends.")] = 8,
    slow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RANK:FACTOR[:AT:FOR]",
            help="Make the steps of an engine FACTOR times as long; from AT seconds on, for FOR seconds.",
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(help="How much equal steps differ: their coefficient of variation. 0.3 is a noisy machine."),
    ] = 0.0,
    skew: Annotated[
        float, typer.Option(help="Unevenness of the front-ends' shares: front-end i gets 1 / (i + 1) ** SKEW.")
    ] = 0.0,
    lockstep: Annotated[
        bool, typer.Option("--lockstep", help="Let all ranks step together (mixture of experts).")
    ] = False,
    clients: Annotated[
        int, typer.Option(help="Closed loop: number of clients. Each sends when its last request is complete.")
    ] = 0,
    restart: Annotated[
        str | None,
        typer.Option(
            metavar="RANK:AT:FOR", help="An engine loses all its requests AT seconds and is away FOR seconds."
        ),
    ] = None,
    kv_tokens: Annotated[int, typer.Option(help="KV cache of an engine, in tokens.")] = 1_000_000,
    step_ms: Annotated[
        str,
        typer.Option(
            metavar="BASE,TOKEN,REQUEST[,HELD]",
            help="Duration of a step in ms: by itself, for a prompt token, a request, and a token of context that "
            "running requests hold (0 if left out). Default: 8,0.04,0.02,0.000065.",
        ),
    ] = "",
    request_ms: Annotated[
        str,
        typer.Option(
            metavar="REQUEST,TOKEN",
            help="Time in ms that a front-end takes to read a request, before it decides: for any, and for a "
            "token of its prompt. Default: 0,0. An API server of vLLM: 3.6,0.00033.",
        ),
    ] = "",
    told: Annotated[
        bool, typer.Option("--told", help="Give the policies the true step times instead of the learnt ones.")
    ] = False,
    oracle: Annotated[bool, typer.Option(help="Run the clairvoyant policy too, for the regret.")] = True,
    seeds: Annotated[int, typer.Option(help="Runs of each combination; intervals need two or more.")] = 3,
    processes: Annotated[
        int, typer.Option(min=0, max=1024, help="Runs at a time. Default: the number of processors.")
    ] = 0,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the times to first token as bars.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, the last line of stdout.")
    ] = False,
) -> None:
    r"""Compare routing policies on a simulated deployment.

    A discrete-event simulation: engines with continuous batching, chunked prefill, a KV and a prefix cache;
    front-ends that run the same policy code as the real ones. No real process is started.

    \b
    Examples:
      dpshm simulate --rate 9
      dpshm simulate --rate 9 --slow 3:2 --policies vllm,least_loaded,least_work --plot
      dpshm simulate --policies least_work --information live,broadcast,broadcast:10,scrape --rate 9
      dpshm simulate --trace mooncake_conversation_trace.jsonl --policies least_work,affinity
    """
    one_of_two(workload, trace)
    settings = SimulationSettings(
        plant=Plant(
            engines=engines,
            frontends=frontends,
            cost=(StepCost.parse(step_ms) if step_ms else StepCost())._replace(kv_tokens=kv_tokens),
            slow=tuple(s[:2] for s in map(_slow, slow or ()) if len(s) == 2),
            spells=tuple(s for s in map(_slow, slow or ()) if len(s) == 4),
            noise=noise,
            lockstep=lockstep,
            restart=_restart(restart) if restart else None,
            coefficients="true" if told else "learnt",
            clients=clients,
            request_time=RequestTime.parse(request_ms) if request_ms else RequestTime(),
        ),
        policies=_names(policies),
        information=_names(information),
        trace=trace,
        time_unit=time_unit,
        block_tokens=block_tokens,
        workload=workload or "chat",
        rate=rate,
        requests=requests,
        skew=skew,
        seeds=seeds,
        oracle=oracle,
    )
    try:
        with raising_once():  # the pool ends its processes on the way out
            progress = _Progress()
            comparison = compare(settings, processes or os.cpu_count() or 1, progress.show, progress.show_reading)
    except EndedError as e:
        sys.stderr.write(f"dpshm: ended by {e.name}; nothing is left behind\n")
        raise typer.Exit(128 + e.signum) from None
    if as_json:
        typer.echo(msgspec.json.encode(comparison).decode())
        return
    typer.echo(as_text(comparison))
    if plot:
        typer.echo("\n" + as_bars(comparison))


class _Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + PROGRESS_S

    def show(self, done: int, of: int) -> None:
        self._say(f"{done} of {of} runs")

    def show_reading(self, count: int) -> None:
        self._say(f"reading the trace: {count} requests")

    def _say(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + PROGRESS_S
            sys.stderr.write(f"dpshm simulate: {text}\n")
            sys.stderr.flush()


def _names(text: str) -> tuple[str, ...]:
    """Names between commas. A parameter after a comma belongs to the name before it: ``a:x=1,y=2,b``."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def _slow(text: str) -> tuple[int, float] | tuple[int, float, float, float]:
    rank, *numbers = text.split(":")
    try:
        if len(numbers) == 1:
            return int(rank), float(numbers[0])
        factor, at_s, for_s = map(float, numbers)
        return int(rank), factor, at_s, for_s
    except ValueError:
        raise SettingError(
            f"--slow {text!r} is not RANK:FACTOR, such as 3:2, or RANK:FACTOR:AT:FOR, such as 3:2:20:10 (seconds)"
        ) from None


def _restart(text: str) -> tuple[int, float, float]:
    try:
        rank, at_s, for_s = text.split(":")
        return int(rank), float(at_s), float(for_s)
    except ValueError:
        raise SettingError(f"--restart {text!r} is not RANK:AT:FOR, such as 3:60:10 (seconds)") from None


def as_text(comparison: Comparison) -> str:
    """The comparison for people."""
    c = comparison
    rows = [HEADER, *(_row(result) for result in c.results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [
        "  ".join(
            text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rate = f"{c.requests_per_s:.1f}/s" if c.requests_per_s else "all at once"
    to = f"; ratios of time to first token to {' on '.join(c.baseline)}" if c.baseline else ""
    return "\n".join(
        (
            f"{c.engines} engines, {c.frontends} front-ends, workload: {c.workload} at {c.rate:g}x, {c.requests} "
            f"request{'s' * (c.requests != 1)} ({rate}), {c.seeds} seed(s)",
            f"times in ms, +- half of a 95 % interval over the seeds{to}",
            "",
            *(line.rstrip() for line in lines),
        )
    )


def _row(r: Result) -> tuple[str, ...]:
    def with_interval(value: float, half: float | None, digits: int) -> str:
        return f"{value:.{digits}f}" + (f" +-{half:.{digits}f}" if half is not None else "")

    def ratio(e: Estimate) -> str:
        return with_interval(e.value, e.plus_minus, 3)

    ttft = r.ttft_ms
    return (
        r.policy,
        r.information,
        with_interval(ttft.mean, ttft.mean_ci, 1),
        f"{ttft.p50:.1f}",
        with_interval(ttft.p99, ttft.p99_ci, 0),
        ratio(r.ratio.mean) if r.ratio else "",
        ratio(r.ratio.p99) if r.ratio else "",
        f"{r.e2e_ms.mean:.0f}",
        f"{r.tpot_ms:.2f}",
        f"{r.tokens_per_s:.0f}",
        f"{r.imbalance:.1f}",
        "" if r.prefix_hit_rate is None else f"{r.prefix_hit_rate:.1%}",
        "" if r.regret is None else f"{r.regret:+.1%}",
    )


def as_bars(comparison: Comparison) -> str:
    """Mean (full block) and p99 (light block) of the times to first token, as bars; ``>`` where one is cut off."""
    p99s = [result.ttft_ms.p99 for result in comparison.results]
    longest = min(max(p99s), LONGEST_BAR * min(p99s)) or 1.0
    width = max(len(f"{r.policy} on {r.information}") for r in comparison.results)
    lines = ["time to first token: mean (dark) and p99 (light), ms"]
    for r in comparison.results:
        mean = round(BAR_COLUMNS * r.ttft_ms.mean / longest)
        p99 = round(BAR_COLUMNS * r.ttft_ms.p99 / longest)
        bar = "\u2588" * mean + "\u2591" * (p99 - mean)
        if p99 > BAR_COLUMNS:
            bar = bar[: BAR_COLUMNS - 1] + ">"
        name = f"{r.policy} on {r.information}"
        lines.append(f"{name:<{width}}  {bar:<{BAR_COLUMNS}}  {r.ttft_ms.mean:.0f} / {r.ttft_ms.p99:.0f}")
    return "\n".join(lines)
