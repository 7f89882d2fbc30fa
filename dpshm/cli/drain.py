"""``dpshm drain`` and ``dpshm undrain``: take ranks out of routing, and put them back."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from dpshm.cli.options import GroupOption, JsonOption, interrupted
from dpshm.ops.drain import check_some_stay, parse_ranks, set_drained
from dpshm.ops.frame import Rank
from dpshm.ops.groups import open_group
from dpshm.ops.watcher import Watcher

EXIT_TIMEOUT = 1
LOOK_S = 0.1
PROGRESS_S = 2.0

Ranks = Annotated[list[str], typer.Argument(metavar="RANK...", help="Ranks, such as 3 or 4-7.")]


class Drained(msgspec.Struct):
    """The outcome: which ranks are empty, which still have requests."""

    group: str
    drained: list[int]
    empty: list[int]
    requests_left: dict[str, int]
    seconds: float


def drain(
    ranks: Ranks,
    group: GroupOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until they are empty.")] = True,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.0, max=31_536_000, help="Longest wait; then the exit status is 1."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Drain even if no rank is left to route to.")] = False,
    as_json: JsonOption = False,
) -> None:
    r"""Take ranks out of routing; they finish the requests that they have.

    Every front-end stops choosing a drained rank from its next decision on. The rank still steps with the others.
    It stays drained when it restarts, until `dpshm undrain`.

    \b
    Examples:
      dpshm drain 3
      dpshm drain 4-7 --timeout 120 && systemctl restart engine@{4..7}
    """
    started = time.monotonic()
    with Watcher(open_group(group)) as watcher:
        frame = watcher.read()
        wanted = parse_ranks(ranks, frame.dp_size)
        if not force:
            check_some_stay(frame, wanted)
        set_drained(watcher.board, wanted, True)
        name = watcher.board.segment.group
        try:
            busy = _wait(watcher, wanted, started, timeout if wait else 0.0)
        except KeyboardInterrupt:
            sys.stderr.write(f"\ndpshm: stopped waiting; the ranks stay drained ({_undrain(name, wanted)})\n")
            interrupted()
    outcome = Drained(
        name,
        wanted,
        [e for e in wanted if e not in busy],
        {str(e): requests for e, requests in busy.items()},
        round(time.monotonic() - started, 3),
    )
    if as_json:
        typer.echo(msgspec.json.encode(outcome).decode())
    else:
        typer.echo(f"{name}: drained {_list(wanted)}" + _rest(busy))
    if wait and busy:
        sys.stderr.write(
            f"dpshm: not empty after {timeout:g} s; they stay drained. Wait longer, or put them back with: "
            f"{_undrain(name, wanted)}\n"
        )
        raise typer.Exit(EXIT_TIMEOUT)


def undrain(ranks: Ranks, group: GroupOption = None) -> None:
    r"""Put drained ranks back into routing.

    \b
    Example:
      dpshm undrain 3
    """
    with open_group(group) as board:
        wanted = parse_ranks(ranks, board.dp_size)
        set_drained(board, wanted, False)
        typer.echo(f"{board.segment.group}: back in routing: {_list(wanted)}")


def _undrain(group: str, ranks: Sequence[int]) -> str:
    """The command that puts them back, also where there are several groups."""
    return f"dpshm undrain {_list(ranks)} --group {group}"


def _wait(watcher: Watcher, ranks: Sequence[int], started: float, timeout: float | None) -> dict[int, int]:
    """Waits until the ranks are empty or the time is over; the requests on those that are not."""
    next_line = started + PROGRESS_S
    while True:
        rows = [rank for rank in watcher.read().ranks if rank.dp_rank in ranks]
        busy = {rank.dp_rank: rank.requests for rank in rows if _has_work(rank)}
        now = time.monotonic()
        if not busy or (timeout is not None and now - started >= timeout):
            return busy
        if now >= next_line:
            next_line = now + PROGRESS_S
            sys.stderr.write(f"dpshm: waiting for {_list(ranks)} to finish{_rest(busy)}; {now - started:.0f} s\n")
        time.sleep(LOOK_S)


def _has_work(rank: Rank) -> bool:
    """Excludes ranks whose process is gone: their requests never finish."""
    return rank.requests > 0 and rank.state not in ("dead", "absent")


def _list(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks))


def _rest(busy: dict[int, int]) -> str:
    return (
        "; requests left: " + ", ".join(f"{e} has {n}" for e, n in busy.items())
        if busy
        else "; they have no requests"
    )
