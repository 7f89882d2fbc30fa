"""Checks of a group's ranks: their states, numbers, locks and prefix indexes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

from dpshm.board.board import Board
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexReader
from dpshm.errors import SegmentError
from dpshm.linux import processes
from dpshm.ops.doctor.finding import Finding, requests, some_of
from dpshm.ops.frame import Frame, Rank

STALE_S = 10.0


def check_ranks(frame: Frame) -> Iterator[Finding]:
    """Finds ranks that are not in routing, or are about to leave it."""
    by_state: dict[str, list[Rank]] = defaultdict(list)
    for rank in frame.ranks:
        by_state[rank.state].append(rank)
    if dead := by_state["dead"]:
        yield Finding(
            severity="error",
            check="dead ranks",
            group=frame.group,
            what=f"{names_of(dead)}: the process is gone",
            why="requests that it had are lost; ranks in lockstep wait for it",
            fix=f"{_on_its_node(*dead)}see its log (dmesg | grep -i oom), and start the rank again",
        )
    for rank in by_state["stalled"]:
        yield Finding(
            severity="error",
            check="stalled ranks",
            group=frame.group,
            what=f"rank {rank.label} (pid {rank.pid}) has {requests(rank.requests)} and shows no sign of life",
            why="it gets no new requests, and those that it has wait",
            fix=f"{_on_its_node(rank)}kill -CONT {rank.pid} if it was stopped; else py-spy dump --pid {rank.pid}",
        )
    for rank in by_state["stuck"]:
        yield Finding(
            severity="error",
            check="stuck ranks",
            group=frame.group,
            what=(
                f"rank {rank.label} (pid {rank.pid}) has {rank.waiting} waiting and {rank.running} running, and "
                "admits, computes and finishes nothing, although it goes on publishing"
            ),
            why="it gets no new requests, and those that it has wait",
            fix=(
                f"{_on_its_node(rank)}see its log; py-spy dump --pid {rank.pid}; restart the rank if it does not "
                "come back by itself"
            ),
        )
    yield from _unknown(frame, by_state["unknown"])
    for rank in frame.ranks:
        stale = rank.age_s is not None and rank.age_s > STALE_S
        if stale and rank.requests and rank.state in ("running", "idle", "waking", "silent"):
            yield Finding(
                severity="warning",
                check="stale beats",
                group=frame.group,
                what=f"rank {rank.label} has {requests(rank.requests)} and last published {rank.age_s:.0f} s ago",
                why="it hangs, or its steps are long; stall_timeout is longer, so it still gets requests",
                fix=(
                    f"{_on_its_node(rank)}dpshm drain {rank.dp_rank} --group {frame.group} --no-wait; py-spy dump "
                    f"--pid {rank.pid}"
                ),
            )
    absent = by_state["absent"]
    if 0 < len(absent) < frame.dp_size and frame.head is None:  # else they are on other nodes
        yield Finding(
            severity="warning",
            check="absent ranks",
            group=frame.group,
            what=f"{names_of(absent)} of {frame.dp_size} never attached, or left",
            why="a group that is not complete is not ready; lockstep ranks wait",
            fix="start them; in a container they need the same /dev/shm: --ipc=container:NAME, or --ipc=host",
        )
    if drained := by_state["drained"]:
        numbers = " ".join(str(r.dp_rank) for r in drained)
        yield Finding(
            severity="note",
            check="drained ranks",
            group=frame.group,
            what=f"{names_of(drained)}: drained by an operator",
            why="they get no new requests",
            fix=f"dpshm undrain {numbers} --group {frame.group}",
        )
    if not any(rank.routable for rank in frame.ranks):
        yield Finding(
            severity="error",
            check="no rank",
            group=frame.group,
            what="no rank may be chosen" + (": none has attached" if len(absent) == frame.dp_size else ""),
            why="every request fails",
            fix=(
                f"start the engines, with {frame.group!r} as their group"
                if len(absent) == frame.dp_size
                else f"dpshm stat --group {frame.group}"
            ),
        )


def _unknown(frame: Frame, unknown: list[Rank]) -> Iterator[Finding]:
    if unknown:
        yield Finding(
            severity="error",
            check="unknown ranks",
            group=frame.group,
            what=f"{names_of(unknown)}: on another node, and not heard for a moment",
            why="it may be dead or cut off; it gets no new requests until it is heard",
            fix="see its log on its node, and whether that node reaches the coordinator's address",
        )


def check_beyond(board: Board, frame: Frame) -> Iterator[Finding]:
    """Finds engines whose rank the group does not have: it was scaled, and they were not ended."""
    for rank in frame.beyond:
        yield Finding(
            severity="warning",
            check="rank number",
            group=frame.group,
            what=(
                f"rank {rank} is attached (pid {int(board.engine_pid[rank])}), and the group has ranks 0 to "
                f"{frame.dp_size - 1}"
            ),
            why="it gets no requests",
            fix=(
                "start that engine with the right number; or, if the number is right: "
                f"dpshm scale {rank + 1} --group {frame.group}"
            ),
        )


def check_holders(board: Board, frame: Frame) -> Iterator[Finding]:
    """Finds rows whose process is gone and whose lock a forked child still holds."""
    ours = processes.namespace_inode("pid") if board.segment.has_locks else 0
    for rank in frame.ranks:
        e = rank.dp_rank
        visible = ours != 0 and int(board.engine_pid_namespace[e]) == ours
        if not visible or rank.pid <= 0 or not board.engine_alive(e):
            continue
        if processes.life_of(rank.pid, int(board.engine_start_time[e])) is processes.Life.GONE:
            yield Finding(
                severity="error",
                check="lock",
                group=frame.group,
                what=f"rank {e}'s process {rank.pid} is gone, and another process still holds its lock",
                why="no process can take the rank: a forked child inherited the lock's descriptor and keeps it",
                fix=f"fuser {board.segment.locks_path}    (end the child; attach after forking)",
            )


def check_prefix_indexes(board: Board, frame: Frame) -> Iterator[Finding]:
    """Finds ranks whose prefix indexes differ in kind, or cannot be read."""
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    lost, unindexed = [], []
    for rank in frame.ranks:
        if rank.state in ("absent", "dead") or not rank.num_blocks:
            continue
        if not rank.has_index:
            unindexed.append(rank)
            continue
        path = index_path(board.segment.sockets_path, rank.dp_rank)
        try:
            reader = PrefixIndexReader.open(path)
        except SegmentError:
            if os.access(path.parent, os.R_OK | os.X_OK):  # else the folder is another user's, and stays closed
                lost.append(rank)
            continue
        kinds[reader.block_tokens, reader.identity].append(f"rank {rank.label}")
    if len(kinds) > 1:
        words = "; ".join(f"{tokens} tokens a block: {some_of(who)}" for (tokens, _), who in sorted(kinds.items()))
        yield Finding(
            severity="warning",
            check="prefix index",
            group=frame.group,
            what=f"ranks disagree in block size or hash of their prefix caches: {words}",
            why="a prompt is hashed once for each kind, and hits of one kind cannot be compared with another's",
            fix="start all engines with the same block size, hash function and PYTHONHASHSEED",
        )
    for ranks, what in (
        (lost, "the file of the prefix index is gone or damaged"),
        (unindexed, "the engine caches prompts and has no prefix index: there was no room, or it failed"),
    ):
        if ranks:
            yield Finding(
                severity="warning",
                check="prefix index",
                group=frame.group,
                what=f"{names_of(ranks)}: {what}",
                why="requests go to these ranks by load alone, and prefixes are computed again",
                fix=f"look at the engine's log and at: df {board.segment.path.parent}; then restart the engine",
            )


def names_of(ranks: list[Rank]) -> str:
    """Ranks as words; of many the first ones."""
    return some_of([f"rank {rank.label}" for rank in ranks])


def _on_its_node(*ranks: Rank) -> str:
    """Where what mends ranks has to be done, if not here."""
    return "on its node: " if any(rank.remote for rank in ranks) else ""
