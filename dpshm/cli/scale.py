"""``dpshm scale``: changes the number of a group's ranks."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dpshm.board.board import Board
from dpshm.cli.options import GroupOption
from dpshm.coordinator.scaling import check_size, living_ranks
from dpshm.errors import SettingError
from dpshm.linux.signals import EndedError, raising_once
from dpshm.ops.groups import open_group
from dpshm.ops.read_frame import read_frame
from dpshm.ops.scale import set_size, set_size_at_rest
from dpshm.ops.screen.table import GONE


def scale(
    ranks: Annotated[int, typer.Argument(metavar="N", help="The new number of ranks.")],
    group: GroupOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0.0, max=31_536_000, help="Longest wait for ranks in lockstep to come to rest."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also if ranks have requests, or lockstep ranks are not at rest."),
    ] = False,
) -> None:
    r"""Change the number of ranks of a group.

    Ranks of their own (dense models): new ranks get requests as soon as their engines attach. Drain ranks before
    you take them away: the group has ranks 0 to N-1, and what an engine beyond them has is not seen any more.

    Ranks in lockstep share a collective of a fixed size. This command drains all of them, waits until they are
    paused, and changes the number. They stay drained, the new ones too: restart all of them, and then say
    `dpshm undrain`. Requests wait in the API servers meanwhile.

    \b
    Examples:
      dpshm scale 12
      dpshm drain 6-7 && dpshm scale 6
    """
    with open_group(group) as board:
        name, before = board.segment.group, board.dp_size
        check_size(board, ranks)
        lockstep = board.segment.header.waves and ranks != before and living_ranks(board) and not force
        if lockstep:
            _scale_at_rest(board, ranks, timeout)
        else:
            if not force:
                _check_empty(board, ranks)
            set_size(board, ranks, force=force)
    typer.echo(f"{name}: {ranks} rank{'s' * (ranks != 1)} (before: {before})")
    if lockstep:
        typer.echo(
            f"All are drained. Restart every rank, in a collective of {ranks}, and then: "
            f"dpshm undrain {_range(0, ranks)} --group {name}"
        )


def _scale_at_rest(board: Board, ranks: int, timeout: float | None) -> None:
    def tell(doing: str) -> None:
        sys.stderr.write(f"dpshm: all ranks are drained; waiting until they are at rest: {doing}\n")

    try:
        with raising_once():  # also when the terminal is closed: else all ranks would stay drained
            set_size_at_rest(board, ranks, timeout_s=timeout, tell=tell)
    except EndedError as e:
        sys.stderr.write(
            f"\ndpshm: stopped waiting ({e.name}); nothing was changed, and the ranks are routed to again\n"
        )
        raise typer.Exit(128 + e.signum) from None


def _check_empty(board: Board, ranks: int) -> None:
    # What a dead rank had is lost.
    busy = {r.dp_rank: r.requests for r in read_frame(board).ranks[ranks:] if r.requests and r.state not in GONE}
    if busy:
        names = ", ".join(f"rank {e} has {n}" for e, n in busy.items())
        raise SettingError(
            f"ranks that would be taken away have requests: {names}. Drain them first: dpshm drain "
            f"{_range(min(busy), board.dp_size)} --group {board.segment.group}, or say --force"
        )


def _range(first: int, stop: int) -> str:
    return str(first) if stop - first == 1 else f"{first}-{stop - 1}"
