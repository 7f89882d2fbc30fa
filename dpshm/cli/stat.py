"""``dpshm stat``: prints the state of a group once, for scripts and pipes."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated

import msgspec
import typer

from dpshm.cli.options import AsciiOption, GroupOption, JsonOption, glyphs, interrupted
from dpshm.ops.frame import Frame
from dpshm.ops.groups import open_group
from dpshm.ops.screen.headline import screen
from dpshm.ops.screen.table import History
from dpshm.ops.screen.text import Glyphs
from dpshm.ops.watcher import LATENCY_WINDOW_S, Watcher

PIPE_WIDTH = 120


def stat(
    group: GroupOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.05, max=86_400, help="Print again every S seconds, until Ctrl-C."),
    ] = None,
    over: Annotated[
        float, typer.Option(metavar="S", min=0.0, max=86_400, help="Window of the rates in seconds. 0: no rates.")
    ] = 0.5,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of --json and exit.")] = False,
    ascii_only: AsciiOption = False,
) -> None:
    r"""Print the state of a group: ranks, front-ends, wave, coordinator.

    Reads shared memory and asks no process, so it answers even while every process hangs. Latencies (ttft, queue,
    per_token) count since the group began; with --watch over the last minute.

    \b
    Examples:
      dpshm stat
      dpshm stat --json | jq '.ranks[] | select(.state == "dead") | .dp_rank'
      dpshm stat --json --watch 1 >> load.jsonl
    """
    if schema:
        typer.echo(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Frame))).decode())
        return
    signs = glyphs(ascii_only, sys.stdout.encoding)
    with Watcher(open_group(group), watch or over, LATENCY_WINDOW_S if watch else None) as watcher:
        try:
            frame = watcher.read()
            if over and not watch:
                time.sleep(over)
                frame = watcher.read()
            while True:
                typer.echo(msgspec.json.encode(frame).decode() if as_json else as_text(frame, signs))
                if not watch:
                    return
                sys.stdout.flush()
                time.sleep(watch)
                frame = watcher.read()
        except KeyboardInterrupt:
            interrupted()


def as_text(frame: Frame, signs: Glyphs, width: int | None = None) -> str:
    """A frame without colours, as wide as the terminal, or `PIPE_WIDTH` where there is none."""
    width = width or shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return "\n".join(line.plain.rstrip() for line in screen(frame, History(), width, signs))
