"""``dpshm scale``: changes the number of a group's ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from dpshm.cli.options import GroupOption
from dpshm.errors import SettingError
from dpshm.ops.groups import open_group
from dpshm.ops.read_frame import read_frame
from dpshm.ops.scale import set_size


def scale(
    ranks: Annotated[int, typer.Argument(metavar="N", help="The new number of ranks.")],
    group: GroupOption = None,
    force: Annotated[bool, typer.Option("--force", help="Take ranks away although they have requests.")] = False,
) -> None:
    r"""Change the number of ranks of a group.

    New ranks get requests as soon as their engines attach. Drain ranks before you take them away: the group has
    ranks 0 to N-1, and what an engine beyond them has is not seen any more.

    \b
    Examples:
      dpshm scale 12
      dpshm drain 6-7 && dpshm scale 6
    """
    with open_group(group) as board:
        before = board.dp_size
        busy = {r.dp_rank: r.requests for r in read_frame(board).ranks[max(0, ranks) :] if r.requests}
        if busy and not force:
            names = ", ".join(f"rank {e} has {n}" for e, n in busy.items())
            first = min(busy)
            raise SettingError(
                f"ranks that would be taken away have requests: {names}. Drain them first: dpshm drain "
                f"{first}-{before - 1} --group {board.segment.group}, or say --force"
            )
        set_size(board, ranks)
        typer.echo(f"{board.segment.group}: {ranks} ranks (before: {before})")
