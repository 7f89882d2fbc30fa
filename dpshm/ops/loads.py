"""The loads of a group for routers that are not front-ends: gateways, schedulers, autoscalers in any language.

`Loads` is what ``GET /loads`` of `dpshm web` answers and what `dpshm feed` publishes. Each is read from the board
at that moment, so it has the bookings of a few microseconds ago. Within a schema version fields are only added.
"""

from __future__ import annotations

import threading
import time

import msgspec

from dpshm.board.board import Board
from dpshm.ops.groups import successor
from dpshm.rules.liveness import State

SCHEMA_VERSION = 1


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one rank.

    Attributes:
        state: as `dpshm stat` has it.
        routable: whether a request may be sent there: it is alive and not drained.
        waiting: requests in its queue.
        running: requests in its batch.
        in_flight: requests sent to it that it has not received.
        requests: the sum of the three.
        prefill_backlog: prompt tokens to compute, in flight included.
        kv_cache_usage: 0 to 1.
        age_us: since its last report; null where it is not known.
    """

    dp_rank: int
    state: State
    routable: bool
    waiting: int
    running: int
    in_flight: int
    requests: int
    prefill_backlog: int
    kv_cache_usage: float
    age_us: int | None


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    """The loads of a group at one moment.

    Attributes:
        time: when they were read, in seconds since 1970.
        linked: false once the group has ended.
        watched: whether a coordinator keeps the verdicts up to date.
    """

    schema_version: int
    group: str
    time: float
    linked: bool
    watched: bool
    ranks: list[RankLoad]


def read_loads(board: Board) -> Loads:
    """Reads the loads of a board's group."""
    board.segment.refresh()
    now_ns = time.monotonic_ns() if board.clocks_agree() else None
    watched = board.is_watched()
    ranks = [
        RankLoad(
            state=State(row["state"]),
            routable=row["verdict"] == "alive" and not row["drained"],
            age_us=row["age_ns"] // 1000 if row["age_ns"] >= 0 else None,
            **{name: row[name] for name in _SAME},
        )
        for row in board.snapshot(now_ns, watched=watched).to_dicts()
    ]
    segment = board.segment
    return Loads(
        schema_version=SCHEMA_VERSION,
        group=segment.group,
        time=time.time(),
        linked=segment.linked,
        watched=watched,
        ranks=ranks,
    )


_SAME = (*("dp_rank", "waiting", "running", "in_flight", "requests", "prefill_backlog", "kv_cache_usage"),)


class LoadReader:
    """Reads the loads of a group, and follows it to the board of its next start. Safe to use from several threads.

    Args:
        board: the group's board, attached read-only; `close` closes it.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._lock = threading.Lock()

    def read_json(self) -> bytes:
        """`Loads` as JSON."""
        with self._lock:
            if not self._board.segment.linked:
                self._follow()
            return msgspec.json.encode(read_loads(self._board))

    def _follow(self) -> None:
        if (new := successor(self._board)) is not None:
            self._board.close()
            self._board = new

    def close(self) -> None:
        """Closes the board."""
        with self._lock:
            self._board.close()
