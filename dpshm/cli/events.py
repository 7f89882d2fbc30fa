"""``dpshm events``: prints the recorded events of a group, then new ones as they come."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import Annotated

import msgspec
import typer

from dpshm.board.events import Event, EventReader
from dpshm.cli.options import GroupOption, JsonOption, interrupted
from dpshm.ops.groups import open_group

LOOK_S = 0.05


def events(
    group: GroupOption = None,
    as_json: JsonOption = False,
    history: Annotated[
        int, typer.Option(metavar="N", min=0, max=1_000_000_000, help="Begin with the newest N recorded events.")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print new events until Ctrl-C.")] = True,
    waves: Annotated[
        bool,
        typer.Option(
            "--waves/--no-waves", help="Print waves too. Only new waves are seen; a busy group has many."
        ),
    ] = True,
) -> None:
    r"""Print a group's events: waves, deaths, stalls, drains, joins, scaling, coordinators.

    The board keeps the newest 256 changes with their times, so events from before this command are here too.
    A time with ~ is when this command noticed the event; other times are when the event happened.

    \b
    Examples:
      dpshm events --no-follow --history 256
      dpshm events --json --no-waves | jq 'select(.kind == "rank_died")'
    """
    with EventReader(open_group(group), history=history > 0, any_owner=True) as reader:
        try:
            _print(reader.read()[-history:] if history else [], as_json=as_json, waves=waves)
            while follow:
                time.sleep(LOOK_S)
                _print(reader.read(), as_json=as_json, waves=waves)
        except KeyboardInterrupt:
            interrupted()


def _print(found: list[Event], *, as_json: bool, waves: bool) -> None:
    for event in found:
        if waves or not event.kind.startswith("wave"):
            typer.echo(msgspec.json.encode(event).decode() if as_json else as_text(event))
    if found:
        sys.stdout.flush()


def as_text(event: Event) -> str:
    """One line, in local time."""
    when = datetime.fromtimestamp(event.time).astimezone()
    sign = " " if event.recorded else "~"
    return f"{sign}{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}  {event.kind:<19}  {event.text}"
