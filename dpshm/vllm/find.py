"""How a process finds its board: by the address of the stats socket, which vLLM tells every process anyway.

The environment does not reach other launchers or Ray actors. The header of a board holds the addresses of its
group, so a process that knows an address finds the board. A process on another node, or in a container
with a /dev/shm of its own, finds none, and goes on the stock way.
"""

from __future__ import annotations

from hashlib import blake2s

from dpshm.board import files
from dpshm.board.board import Board
from dpshm.errors import SegmentError


def group_at(stats_address: str | None) -> str | None:
    """The group whose live board, or its head, has that address; None if this process can map none."""
    if not stats_address:
        return None
    for group in files.groups():
        try:
            with Board.attach(group) as board:
                # Each attached process holds a lock: without any, the board is a dead group's.
                header = board.segment.header
                if stats_address in (header.stats_address, header.head_address) and board.is_used():
                    return group
        except SegmentError:
            continue  # damaged, another user's, or just removed: another group's in each case
    return None


def owner_name(client_index: int, input_address: str) -> str:
    """The owner's name in the row of an API server, by which engines find the row.

    `client_index` restarts at 0 in every launcher, but the socket from which an engine gets the requests of an
    API server belongs to that server alone, and both know its address.
    """
    return f"vllm-api-{client_index}-{blake2s(input_address.encode(), digest_size=8).hexdigest()}"
