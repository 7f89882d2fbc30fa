"""Takes ranks out of routing and puts them back: through the coordinator, or under its lock when there is none.

The coordinator alone writes marks. This module asks it over the front-ends' socket, and the board shows the
result. If no coordinator lives, this module takes the coordinator's lock, writes the marks itself, and lets go of
the lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import zmq

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.segment import Segment
from dpshm.board.words import DRAINED
from dpshm.coordinator.draining import why_not_here
from dpshm.coordinator.row import CoordinatorRow
from dpshm.errors import DpshmError, SettingError
from dpshm.net import wire
from dpshm.net.context import Socket, context
from dpshm.net.keys import Folder, connect, keys_for
from dpshm.ops.frame import Frame

TIMEOUT_S = 3.0
ASK_AGAIN_S = 0.5
LOOK_S = 0.002
_MAX_DIGITS = 20


class NotHeeded(DpshmError):
    """The coordinator did not do in time what it was asked for."""


def parse_ranks(words: Iterable[str], dp_size: int) -> list[int]:
    """Ranks from words such as ``3`` and ``4-7``.

    Raises:
        SettingError: a word has another form, or names a rank outside the group.
    """
    ranks: set[int] = set()
    for word in words:
        first, dash, last = word.partition("-")
        if not first.isdecimal() or not (last.isdecimal() if dash else True):
            raise SettingError(f"{word!r} names no ranks: write 3, or 4-7")
        if not _number(first) <= _number(last or first) < dp_size:
            raise SettingError(f"{word!r} names no ranks of this group: it has 0 to {dp_size - 1}")
        ranks.update(range(int(first), int(last or first) + 1))
    return sorted(ranks)


def _number(digits: str) -> int:
    """The number, or one that no rank has: int() refuses thousands of digits."""
    return int(digits) if len(digits) < _MAX_DIGITS else layout.MAX_ENGINES


def check_some_stay(frame: Frame, ranks: Sequence[int]) -> None:
    """Refuses to drain the last ranks that requests can go to.

    Raises:
        SettingError: no rank would be left to route to.
    """
    if not any(rank.routable and rank.dp_rank not in ranks for rank in frame.ranks):
        states = ", ".join(f"{rank.dp_rank} {rank.state}" for rank in frame.ranks)
        raise SettingError(
            f"draining {_words(ranks)} would leave no rank of group {frame.group!r} to route to, and all requests "
            f"would fail ({states}). Undrain or restart another rank first, or say --force"
        )


def set_drained(board: Board, ranks: Sequence[int], drained: bool, *, curve_dir: Folder | None = None) -> None:
    """Drains ranks or puts them back. Returns once the board shows it; the next decision then follows it.

    Args:
        board: the group's board; it may be read-only.
        ranks: ranks from 0 to dp_size - 1.
        drained: true takes the ranks out of routing, false puts them back.
        curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's.

    Raises:
        SettingError: a rank is of another node, and has to be drained there.
        NotHeeded: the coordinator lives and did not change the marks in time.
        SegmentError: there is no coordinator, and this user may not write to the board.
    """
    if elsewhere := [why for e in ranks if (why := why_not_here(board, e)) is not None]:
        raise SettingError("; ".join(elsewhere))
    deadline = time.monotonic() + TIMEOUT_S
    while wrong := _wrong(board, ranks, drained):
        if time.monotonic() > deadline:
            raise not_heeded(board, f"{'drain' if drained else 'undrain'} {_words(wrong)}")
        if board.coordinator_alive():
            messages = [wire.encode_drain(e, drained) for e in wrong]
            ask(board, messages, lambda: not _wrong(board, ranks, drained), curve_dir)
        else:
            _write(board.segment.group, wrong, drained)
    board.wait_for_coordinator(lambda: True)  # the revision counts it, too


def _wrong(board: Board, ranks: Sequence[int], drained: bool) -> list[int]:
    """The ranks whose mark does not show it yet."""
    board.segment.refresh()
    return [e for e in ranks if bool(board.engine_mark[e] & DRAINED) != drained]


def not_heeded(board: Board, what: str) -> NotHeeded:
    """The error of a coordinator that did not do something in time."""
    return NotHeeded(
        f"the coordinator of group {board.segment.group!r}, pid {int(board.coordinator_pid[0])}, did not {what} "
        f"within {TIMEOUT_S:g} s: it is stopped or wedged, or its sockets cannot be reached from here. See: "
        "dpshm doctor"
    )


def ask(board: Board, messages: Iterable[bytes], done: Callable[[], bool], curve_dir: Folder | None) -> None:
    """Sends messages to the coordinator, and waits a while for the board to show that they are done.

    Raises:
        NotHeeded: the coordinator's socket cannot be used.
        SettingError: the group's keys are needed.
    """
    keys = keys_for(board.segment.header, curve_dir)
    socket: Socket = context().socket(zmq.XSUB)  # subscribes to nothing: nothing is published to it
    try:
        socket.linger = 0
        connect(socket, board.segment.header.stats_address, keys)
        for message in messages:
            socket.send(message, zmq.NOBLOCK)
        again = time.monotonic() + ASK_AGAIN_S
        while not done():
            if time.monotonic() > again:
                return
            time.sleep(LOOK_S)
    except zmq.ZMQError as e:
        raise NotHeeded(f"cannot reach the coordinator at {board.segment.header.stats_address}: {e}") from e
    finally:
        socket.close()


def _write(group: str, ranks: Sequence[int], drained: bool) -> None:
    """Writes the marks in the coordinator's place; does nothing if a coordinator holds the lock."""
    with Board(Segment.attach(group)) as board:
        if board.lock_coordinator():
            marks = CoordinatorRow(board)
            for e in ranks:
                marks.set_engine(e, drained=drained)


def _words(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
