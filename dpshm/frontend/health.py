"""What a front-end tells a balancer or an orchestrator: whether it can route now, and what each rank is."""

from __future__ import annotations

from typing import Any

import msgspec

from dpshm.board.board import Board
from dpshm.rules.liveness import State


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The health of a group as one front-end sees it.

    Attributes:
        ok: whether `route` would find a rank now.
        routable: the ranks that a policy may choose.
        ranks: the state of each rank.
        coordinator: whether a coordinator watches the group. Without one routing goes on, and no rank is called
            stalled or stuck.
        linked: whether other processes can still attach.
    """

    ok: bool
    routable: list[int]
    ranks: list[State]
    coordinator: bool
    linked: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as a dict, for ``json.dumps``."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def read_health(board: Board, routable: frozenset[int], now_ns: int) -> Health:
    """The health of a board's group.

    Args:
        board: the board.
        routable: the ranks that the front-end's policy may choose.
        now_ns: CLOCK_MONOTONIC.
    """
    return Health(
        ok=bool(routable),
        routable=sorted(routable),
        ranks=[State(state) for state in board.snapshot(now_ns)["state"].tolist()],
        coordinator=board.is_watched(),
        linked=board.segment.linked,
    )
