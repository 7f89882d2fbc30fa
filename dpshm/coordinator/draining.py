"""Where a rank has to be drained: on the board by which front-ends choose it."""

from __future__ import annotations

from dpshm.board.board import Board
from dpshm.board.words import RELAYED, REMOTE


def why_not_here(board: Board, dp_rank: int) -> str | None:
    """Why draining a rank on this board keeps no request from it, with the command that does; None if it would.

    Args:
        board: a group's.
        dp_rank: from 0 to dp_size - 1.
    """
    mark, header = int(board.engine_mark[dp_rank]), board.segment.header
    command = f"run `dpshm drain {dp_rank}` (or undrain)"
    if mark & RELAYED:
        return f"rank {dp_rank} is of another node: {command} there, and the boards of all nodes follow"
    if header.settings.get("balancing") == "internal":
        return None  # front-ends of this node choose it, wherever it is
    if mark & REMOTE:
        return f"rank {dp_rank} is of another node, whose front-ends choose it by their own board: {command} there"
    if header.head_address is not None and not board.engine_incarnation[dp_rank]:
        return (
            f"no process of this node has had rank {dp_rank}: {command} on the node that has it. The head is at "
            f"{header.head_address}"
        )
    return None
