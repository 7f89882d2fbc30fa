"""``dpshm demo``: the options and the report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dpshm.cli import compare as comparison
from dpshm.cli.live import make_display
from dpshm.cli.options import TimeUnitOption, one_of_two
from dpshm.errors import SettingError
from dpshm.linux.signals import EndedError
from dpshm.policies import NAMES
from dpshm.sim.demo.report import Report
from dpshm.sim.demo.run import Screen, run_demo
from dpshm.sim.demo.workload import DemoSettings
from dpshm.sim.workloads.formats import KNOWN


class EngineKind(StrEnum):
    """The kind of model that an engine runs."""

    SIM = "sim"
    TORCH = "torch"


class BuiltIn(StrEnum):
    """The built-in workloads."""

    CODE = "code"
    CHAT = "chat"


class StatsPath(StrEnum):
    """The source of the load that front-ends see."""

    BOARD = "board"
    PUB = "pub"


def demo(
    engines: Annotated[int, typer.Option(help="Number of engine processes (1 to 64).")] = 8,
    frontends: Annotated[int, typer.Option(help="Number of front-end processes (1 to 64).")] = 4,
    seconds: Annotated[float, typer.Option(help="Duration of the workload in seconds.")] = 20.0,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Arrivals to replay. Known: {KNOWN}. Without it, a built-in workload.",
        ),
    ] = None,
    time_unit: TimeUnitOption = "",
    workload: Annotated[
        BuiltIn | None,
        typer.Option(
            help="Without a trace: code completion, in bursts of about 30 requests a second, or chat, 5 a second.",
            show_default="code; with --compare chat",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Speed of the arrivals, as a multiple of the recorded speed.",
            show_default=f"1; with --compare, without a trace, {comparison.RATE:g}",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"How an engine is chosen: {', '.join(NAMES)}.",
            show_default=f"least_work; with --compare {comparison.POLICY}",
        ),
    ] = None,
    stats: Annotated[
        StatsPath,
        typer.Option(help="What front-ends decide from: the board, or a broadcast every 100 ms."),
    ] = StatsPath.BOARD,
    prefix_index: Annotated[
        bool,
        typer.Option(
            help="Front-ends know what each engine has cached of a prompt, where the trace has hashes of blocks."
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(help="Seed of the built-in workload and of how requests are shared among front-ends.")
    ] = 0,
    engine: Annotated[
        EngineKind,
        typer.Option(help="A simulated model, or a small one in PyTorch that computes (extra: torch)."),
    ] = EngineKind.SIM,
    dense: Annotated[
        bool, typer.Option("--dense", help="Independent ranks, as dense models have: no lockstep, no waves.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Begin the arrivals again until Ctrl-C: a group to try the tools on.")
    ] = False,
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos",
            help="Stop, kill and restart engines, front-ends and the coordinator while it runs. Implies --dense.",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Play the same arrivals on the board and on a broadcast as vLLM has it, with vLLM's policy, and "
            "compare. --policy least_work compares that one with vLLM's on the broadcast. Implies --dense.",
        ),
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(help="With --compare: how many seeds are played.", show_default=str(comparison.SEEDS)),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object, the last line of stdout.")
    ] = False,
) -> None:
    r"""Run a whole deployment here: a coordinator, simulated engines, front-ends, and a workload.

    Every process, socket and shared-memory word is real; only the model is a sleep. With --engine torch the model
    is real too: each rank computes on a GPU of its own, on a shared GPU, or on the CPU. Engines batch
    continuously, step together, pause when all are idle, and wake at the next request. The demo leaves nothing
    behind, however it ends. The exit status is 1 if a request was lost.

    \b
    Examples:
      dpshm demo
      dpshm demo --compare                         the board and a broadcast every 100 ms, in one table
      dpshm demo --compare --policy least_work     the default on the board, and vLLM's on the broadcast
      dpshm demo --chaos --keep                    a group to practise on; dpshm top in another terminal
      dpshm demo --trace AzureLLMInferenceTrace_code.csv --rate 12
      dpshm demo --engines 4 --seconds 5 --json | jq .ttft_ms
      dpshm demo --engine torch --engines 2        a small mixture-of-experts transformer in PyTorch
    """
    one_of_two(workload, trace)
    if seeds is not None and not compare:
        raise SettingError("--seeds is for --compare: leave it out, or say --seed for the seed of one demo")
    if keep and as_json:
        raise SettingError("--keep has no end, and so no report: leave --keep or --json out")
    settings = DemoSettings(
        engines=engines,
        frontends=frontends,
        seconds=seconds,
        rate=(comparison.RATE if compare and trace is None else 1.0) if rate is None else rate,
        trace=trace,
        workload=(workload or (BuiltIn.CHAT if compare else BuiltIn.CODE)).value,
        time_unit=time_unit,
        stats=stats.value,
        policy=policy or (comparison.POLICY if compare else "least_work"),
        seed=seed,
        engine=engine.value,
        prefix_index=prefix_index,
        dense=dense or compare,
        keep=keep,
        chaos=chaos,
    )
    pairs = comparison.play_both(settings, comparison.SEEDS if seeds is None else seeds, _run) if compare else []
    reports = [report for pair in pairs for report in pair] if compare else [_run(settings)]
    for problem in [problem for report in reports for problem in report.problems]:
        typer.echo(f"dpshm: {problem}", err=True)
    if as_json:
        typer.echo(msgspec.json.encode(reports if compare else reports[0]).decode())
    else:
        typer.echo(comparison.as_table(pairs) if compare else as_text(reports[0]))
    if any(report.lost for report in reports):
        raise typer.Exit(1)


def _run(settings: DemoSettings) -> Report:
    try:
        with make_display() as display:
            return run_demo(settings, Screen(display.show, display.tell))
    except EndedError as e:
        typer.echo(f"dpshm: ended by {e.name}; nothing is left behind", err=True)
        raise typer.Exit(128 + e.signum) from None


def as_text(report: Report) -> str:
    """The report for people."""

    def figure(value: float | None, unit: str) -> str:
        return "none" if value is None else f"{value:,.1f} {unit}"

    staleness, ttft, imbalance = report.staleness_us, report.ttft_ms, report.imbalance
    most = "none" if imbalance.max is None else imbalance.max
    figures = {
        "requests": f"{report.sent} sent, {report.completed} completed, {report.refused} refused, "
        f"{report.lost} lost" + (f", {report.cut_off} gone with killed front-ends" if report.cut_off else ""),
        "time": f"{report.seconds:.1f} s, {report.waves} waves, {report.steps} steps",
        "staleness": f"p50 {figure(staleness.p50, 'us')}, p99 {figure(staleness.p99, 'us')}",
        "time to first token": f"mean {figure(ttft.mean, 'ms')}, p50 {figure(ttft.p50, 'ms')}, "
        f"p99 {figure(ttft.p99, 'ms')}",
        "imbalance": f"mean {figure(imbalance.mean, 'requests')}, max {most} (the most on a rank less the fewest)",
        "prefix hits": "the workload has no blocks"
        if report.prefix_hit_rate is None
        else f"{report.prefix_hit_rate:.1%} of prompt tokens were cached",
        "by engine": " ".join(map(str, report.finished_by_engine)) + " finished",
        "by front-end": " ".join(map(str, report.sent_by_frontend)) + " sent",
    }
    title = (
        f"{report.engines} engines, {report.frontends} front-ends, stats: {report.stats}, "
        f"policy: {report.policy}, workload: {report.trace or report.workload} at {report.rate:g}x"
    )
    return "\n".join((title, *(f"  {name:<20} {text}" for name, text in figures.items())))
