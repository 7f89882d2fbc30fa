"""``dpshm replay``: asks another policy about the decisions that a front-end recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dpshm.frontend.recorder import read
from dpshm.ops.replay import Summary, export, summarise
from dpshm.ops.replay import replay as replay_decisions
from dpshm.policies import NAMES, by_name


def replay(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A decision ring: what Frontend.attach(record=FILE) names, or decisions-N in the folder of the "
            "group's sockets with record=True. It may still be written to.",
        ),
    ],
    policy: Annotated[str, typer.Option(help=f"The policy to ask: {', '.join(NAMES)}.")] = "least_loaded",
    export_to: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write a row for each decision and rank: .csv or .parquet."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    r"""Replay recorded decisions through another policy.

    \b
    Examples:
      dpshm replay /dev/shm/dpshm-GROUP.sockets/decisions-0 --policy least_work
      dpshm replay decisions.ring --policy vllm --export decisions.csv
    """
    header, decisions = read(file)
    replayed = replay_decisions(decisions, by_name(policy))
    summary = summarise(header.group, header.frontend, policy, replayed)
    if export_to:
        export(export_to, replayed)
    typer.echo(msgspec.json.encode(summary).decode() if as_json else as_text(summary))


def as_text(s: Summary) -> str:
    """The summary for people."""

    def pair(a: float | None, b: float | None, unit: str) -> str:
        return "not recorded" if a is None or b is None else f"{a:.2f} {unit} chosen, {b:.2f} {unit} by {s.policy}"

    figures = {
        "decisions": f"{s.decisions}, {s.agreed} of them the same ({s.agreed / s.decisions:.1%})",
        "chosen": " ".join(map(str, s.by_rank)),
        s.policy: " ".join(map(str, s.other_by_rank)),
        "requests there": pair(s.requests_at_choice, s.requests_at_other, "requests"),
        "first token in": pair(s.expected_ms_at_choice, s.expected_ms_at_other, "ms"),
        "cached there": pair(s.cached_tokens_at_choice, s.cached_tokens_at_other, "tokens"),
        "oldest report": "none"
        if s.age_ms_p50 is None
        else f"p50 {s.age_ms_p50:.2f} ms, p99 {s.age_ms_p99:.2f} ms",
    }
    title = f"group {s.group}, front-end {s.frontend}: recorded decisions, and those of {s.policy}"
    return "\n".join((title, *(f"  {name:<15} {text}" for name, text in figures.items())))
