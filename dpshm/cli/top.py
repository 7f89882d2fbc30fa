"""``dpshm top``: shows a group live in a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from dpshm.board.board import Board
from dpshm.board.events import EventReader
from dpshm.cli.options import AsciiOption, GroupOption, glyphs, interrupted
from dpshm.errors import SettingError
from dpshm.ops.groups import live_groups, open_group
from dpshm.ops.screen.headline import screen
from dpshm.ops.screen.table import History
from dpshm.ops.screen.text import Glyphs
from dpshm.ops.watcher import LATENCY_WINDOW_S, Watcher

PIPE_WIDTH = 120
ONCE_LOOKS, ONCE_S = 10, 0.1


def top(
    group: GroupOption = None,
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="S", min=0.1, max=86_400, help="Between frames.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame, with rates over one second, and exit.")
    ] = False,
    ascii_only: AsciiOption = False,
) -> None:
    r"""Watch a group: load, state and history of each rank, front-ends, waves; drain ranks.

    Attaches read-only and costs the engines nothing. Keys: ? explains the columns, s sort, r reverse, / filter,
    Tab ranks or front-ends, Space pause, d drain and u undrain the rank under the cursor, q quit.

    \b
    flight = in flight: sent to the rank, not received yet; age = since its last publish; step = mean time of
    a step, or how long the present one has lasted; ttft, p99 = time to first token, of the last minute.

    \b
    Examples:
      dpshm top
      dpshm top --group prod --interval 0.5
      dpshm top --once | head -20
    """
    signs = glyphs(ascii_only, sys.stdout.encoding)
    if group is None and not once and sys.stdin.isatty() and sys.stdout.isatty():
        group = _choose()
    with Watcher(open_group(group), latency_window_s=None if once else LATENCY_WINDOW_S) as watcher:
        try:
            if once:
                _print_once(watcher, signs)
                return
            if not sys.stdout.isatty() or not sys.stdin.isatty():
                raise SettingError("top needs a terminal: use `dpshm top --once`, or `dpshm stat --watch 1`")
            try:
                from dpshm.ops.screen.app import Top
            except ModuleNotFoundError as e:
                raise SettingError(
                    f"the live screen needs textual ({e}): pip install 'dpshm[cli]', or use `dpshm top --once`"
                ) from None
            with EventReader(Board.attach(watcher.board.segment.group, any_owner=True)) as events:
                Top(watcher, events, interval, signs).run()
        except KeyboardInterrupt:
            interrupted()


def _choose() -> str | None:
    """Asks which group to show if several live here; None: there is nothing to ask."""
    live = live_groups()
    if len(live) < 2:
        return None
    for number, found in enumerate(live, 1):
        typer.echo(f"{number:>3}  {found.group:<24} {found.state}: {found.detail}")
    names = {str(number): found.group for number, found in enumerate(live, 1)}
    while True:
        answer: str = typer.prompt("Which group (number or name)", default="1")
        group = names.get(answer, answer)
        if group in names.values():
            return group
        typer.echo(f"there is no {answer!r} in this list")


def _print_once(watcher: Watcher, signs: Glyphs) -> None:
    history = History()
    for _ in range(ONCE_LOOKS):
        history.add(watcher.read())
        time.sleep(ONCE_S)
    console = Console(width=shutil.get_terminal_size((PIPE_WIDTH, 24)).columns, highlight=False)
    for line in screen(watcher.read(), history, console.width, signs):
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop", crop=True)
