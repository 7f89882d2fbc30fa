"""Finds the group that a command is about: the one that was named, or the only one that lives here."""

from __future__ import annotations

from typing import NamedTuple

from dpshm.board.board import Board
from dpshm.board.files import directory, groups
from dpshm.errors import SegmentError, SegmentNotFound, SettingError


class Found(NamedTuple):
    """A group on this node.

    Attributes:
        state: alive; orphaned (engines or front-ends, no coordinator); dead (no process holds a lock); unreadable.
        detail: ranks and coordinator, or why it cannot be read.
    """

    group: str
    state: str
    detail: str

    @property
    def readable(self) -> bool:
        """Whether its segment could be attached."""
        return self.state != "unreadable"


def find_groups() -> list[Found]:
    """Every group whose segment is on this node."""
    return [_describe(name) for name in groups()]


def _describe(group: str) -> Found:
    try:
        with Board.attach(group, any_owner=True) as board:
            ranks = f"{board.dp_size} ranks"
            if board.coordinator_alive():
                return Found(group, "alive", f"{ranks}, coordinator pid {int(board.coordinator_pid[0])}")
            if board.is_used():
                return Found(group, "orphaned", f"{ranks}, no coordinator")
            return Found(group, "dead", f"{ranks}, no process is attached")
    except SegmentError as e:
        return Found(group, "unreadable", str(e))
    except Exception as e:  # one group must not keep a tool from the others
        return Found(group, "unreadable", f"the board cannot be read: {e!r}")


def open_group(group: str | None) -> Board:
    """Attaches read-only to the group of that name, or without one to the only group that lives here.

    Raises:
        SegmentNotFound: there is none.
        SettingError: there are several; the message lists them.
        SegmentError: it cannot be opened.
    """
    if group is not None:
        return Board.attach(group, any_owner=True)
    found = find_groups()
    live = [f for f in found if f.state in ("alive", "orphaned")]
    if len(live) == 1:
        return Board.attach(live[0].group, any_owner=True)
    others = "".join(f"\n  {f.group:<24} {f.state}: {f.detail}" for f in live or found)
    if not live:
        raise SegmentNotFound(
            f"no live group in {directory()}: start one with `dpshm coordinator --group NAME --dp-size N`, or "
            "look from where its /dev/shm is (a container's is its own unless --ipc=host)"
            + (f". What is there:{others}" if found else "")
        )
    raise SettingError(f"{len(live)} groups are on this node: name one with --group{others}")
