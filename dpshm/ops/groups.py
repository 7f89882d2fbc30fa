"""Finds the group that a command is about: the one that was named, or the only one that lives here."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import msgspec

from dpshm.board.board import Board
from dpshm.board.files import directory, groups, open_directory, owner_of, segment_path
from dpshm.errors import SegmentError, SegmentNotFound, SettingError
from dpshm.ops.read_frame import read_frame

_NAMED = 16


class Found(NamedTuple):
    """A group on this node.

    Attributes:
        state: alive; orphaned (engines or front-ends, no coordinator); dead (no process holds a lock); private (of
            another user, who does not let this one look); unreadable.
        detail: ranks and coordinator, or whose it is, or why it cannot be read.
    """

    group: str
    state: str
    detail: str

    @property
    def readable(self) -> bool:
        """Whether its segment could be attached."""
        return self.state not in ("private", "unreadable")


def successor(board: Board) -> Board | None:
    """The board made anew under the same name. None if the group has ended; its last state is still mapped."""
    try:
        return Board.attach(board.segment.group, any_owner=True)
    except SegmentError:
        return None


def find_groups() -> list[Found]:
    """Every group whose segment is on this node."""
    return [_describe(name) for name in groups()]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A group in one line.

    Attributes:
        state: as in `Found`.
        detail: ranks and coordinator in words, or why the group cannot be read.
        dp_size: number of ranks; 0 if unknown, as the fields after it.
        ranks: how many ranks are in each state.
        remote: ranks that are on other nodes, dead ones too.
        requests: requests on all ranks that live.
        frontends: front-ends that live.
        coordinator_pid: 0: none lives.
    """

    group: str
    state: str
    detail: str
    dp_size: int = 0
    ranks: dict[str, int] = {}
    remote: list[int] = []
    requests: int = 0
    frontends: int = 0
    coordinator_pid: int = 0


def summaries() -> list[Summary]:
    """Every group of this node, by name.

    Raises:
        SegmentError: there is none, since its directory cannot be read.
    """
    found = [summary_of(found) for found in find_groups()]
    if not found:
        _check_directory()
    return found


def _check_directory() -> None:
    """Raises `SegmentError` if groups cannot be seen: that is not the same as none."""
    os.close(open_directory(directory()))


def summary_of(found: Found) -> Summary:
    """A group in one line."""
    plain = Summary(group=found.group, state=found.state, detail=found.detail)
    if not found.readable:
        return plain
    try:
        with Board.attach(found.group, any_owner=True) as board:
            frame = read_frame(board)
    except Exception:  # it ended while we looked, or its words are damaged: `doctor` says more
        return plain
    living = [rank for rank in frame.ranks if rank.state not in ("dead", "absent")]
    return msgspec.structs.replace(
        plain,
        dp_size=frame.dp_size,
        ranks=dict(sorted(Counter(rank.state for rank in frame.ranks).items())),
        remote=[rank.dp_rank for rank in frame.ranks if rank.remote],
        requests=sum(rank.requests for rank in living),
        frontends=sum(frontend.state == "alive" for frontend in frame.frontends),
        coordinator_pid=0 if frame.coordinator.state == "none" else frame.coordinator.pid,
    )


def live_groups() -> list[Found]:
    """The groups of this node that have a process."""
    return [found for found in find_groups() if found.state in ("alive", "orphaned")]


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
        owner = owner_of(segment_path(group))
        if isinstance(e.__cause__, PermissionError) and owner not in (None, os.geteuid()):
            return Found(group, "private", f"of uid {owner}, who alone may look")
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
        _check_directory()
        raise SegmentNotFound(
            f"no live group in {directory()}: start one with `dpshm coordinator --group NAME --dp-size N`, or "
            "look from where its /dev/shm is (a container's is its own unless --ipc=host)"
            + (f". What is there:{others}" if found else "")
        )
    raise SettingError(f"{len(live)} groups are on this node: name one with --group{others}")


def elsewhere(ranks: list[int]) -> str:
    """Ranks on other nodes, for people: each with the sign that says so; of many the first ones."""
    if not ranks:
        return ""
    signs = " ".join(f"@{dp_rank}" for dp_rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"; on other nodes: {signs}{more}"
